"""A whole comparison: plan it, run what is missing, write the report."""

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.deploy.compare.budget import Budget, RoundBytes
from fedphd.deploy.compare.methods import Method, choose_methods
from fedphd.deploy.compare.plan import CommonSettings, Plan, PlannedRun, plan_run
from fedphd.deploy.compare.results import MethodResults, collect, result_of
from fedphd.deploy.compare.rows import Rows
from fedphd.deploy.compare.runner import Runner
from fedphd.deploy.compare.sheets import pairs_to_csv, to_csv
from fedphd.deploy.compare.table import to_markdown
from fedphd.deploy.compare.tuning import Tuner
from fedphd.deploy.launch.client_data import take_data
from fedphd.deploy.launch.render import human_bytes
from fedphd.deploy.launch.runs import Say
from fedphd.deploy.simulation.run_config import SimulatedClients

logger = logging.getLogger(__name__)

# A first round and a later one; of a method that prunes half way two more, of the pruned network.
_PROBE_ROUNDS, _PROBE_ROUNDS_PRUNED = 2, 4
SAMPLES = "samples.png"


@dataclass
class Comparison:
    """Every method with every seed on one budget, in one folder.

    ``plan`` includes what the folder has already (``Plan.extending``). The bytes that it leaves
    open are those of the first run of the method ``byte_reference``.
    """

    common: CommonSettings
    table: Mapping[str, Method]
    plan: Plan
    byte_reference: str = "fedphd"

    @cached_property
    def rows(self) -> Rows:
        """What the folder keeps of finished runs."""
        return Rows.read(self.common.out)

    @classmethod
    def stored(cls, out: Path, table: Mapping[str, Method]) -> Self:
        """The comparison that ``out`` holds, to report on it; raises ConfigError without one.

        ``table`` need not have the methods of a file that it was made with.
        """
        plan = Plan.read(out)
        if plan is None:
            raise ConfigError(f"--out {out}: no comparison here; run it without --report-only")
        settings, data = take_data(plan.common)
        common = CommonSettings(None, settings, SimulatedClients(data), out)
        # A newer version has more settings, which the plan does not have yet.
        return cls(
            common, plan.completing(table), plan.model_copy(update={"common": common.fixed()})
        )

    @property
    def methods(self) -> list[Method]:
        """All that the folder was ever asked for, in the table's order."""
        return choose_methods(self.table, self.plan.methods)

    def runs(self) -> list[PlannedRun]:
        """All runs of which the cloud rounds are known, every method of a seed before the next.

        Raises ConfigError if a method's settings are impossible, or a finished run had others.
        """
        rounds = self.plan.intervals
        runs = [
            self._plan_run(method, seed, intervals=rounds.get(method.name))
            for seed in self.plan.seeds
            for method in self.methods
            if self.plan.budget == Budget.rounds or rounds.get(method.name)
        ]
        for run in runs:
            run.check(self.plan.common)
        return runs

    def _plan_run(self, method: Method, seed: int, **how: Any) -> PlannedRun:
        """A run with the method's tuned settings, and its row if there is one."""
        run = plan_run(self.common, method, seed, tuned=self.plan.tuned(method), **how)
        return replace(run, row=None if run.purpose else self.rows.find(run.name))

    def check(self) -> None:
        """Raise ConfigError if a run that is planned, or would tune a method, cannot work."""
        for method in self.methods:
            self._plan_run(method, self.plan.seeds[0])
        finished = [run for run in self.runs() if run.finished]
        if self.tuner is None:
            return
        self.tuner.check()
        if untuned := self.tuner.untuned(finished):
            raise ConfigError(
                f"--tune: {self.common.out} holds finished runs of settings that nothing has "
                f"chosen ({', '.join(run.name for run in untuned)}); choose another --out"
            )

    def execute(self, *, jobs: int, stop: threading.Event, say: Say) -> dict[str, str]:
        """Run all that is missing; returns why runs failed, by name; raises as ``fit_rounds``."""
        # What cannot work is refused before anything starts, or is stored: the folder would keep
        # a wrong value, and refuse the corrected command.
        self.check()
        self.plan.write(self.common.out)
        logs = self.common.out / "logs"
        runner = Runner(logs, jobs=jobs, say=say, keep=lambda run: self.keep([run]))
        if self.tuner:
            self.tuner.choose(runner, stop, say)
        if stop.is_set():
            return {}
        self.runs()
        if self.plan.budget == Budget.cloud_bytes:
            self.fit_rounds(runner, stop, say)
        return {} if stop.is_set() else runner.run(self.runs(), stop)

    @cached_property
    def tuner(self) -> Tuner | None:
        """What tunes the methods, unless nothing is tuned here."""
        tuning = self.plan.tuning
        if tuning is None or tuning.taken_from:
            return None
        return Tuner(self.common, self.table, self.plan, self.rows)

    def keep(self, runs: Iterable[PlannedRun]) -> None:
        """Keep the rows and pictures of finished runs that have none yet; probes need none."""
        new = [
            run
            for run in runs
            if run.finished and run.row is None and (run.tuning or not run.purpose)
        ]
        found = [(result_of(run), run) for run in new]
        self.rows.keep(
            (
                row.model_copy(update={"settings": run.own_settings(self.plan.common)}),
                None if row.tuning else run.folder / SAMPLES,
            )
            for row, run in found
        )

    def fit_rounds(self, runner: Runner, stop: threading.Event, say: Say) -> None:
        """Find the number of bytes and each method's cloud rounds, unless known; store both.

        Returns early once ``stop`` is set; raises FedPhDError if a run that it needs fails.
        """
        plan, seed = self.plan, self.plan.seeds[0]
        if plan.cloud_bytes is None:
            (reference,) = choose_methods(self.table, [self.byte_reference])
            run = self._plan_run(reference, seed)
            if not _completes(run, runner, stop):
                return
            plan.cloud_bytes = int(result_of(run).costs["cloud_bytes"])
            plan.intervals[reference.name] = run.config.schedule.intervals
            plan.write(self.common.out)
        for method in self.methods:
            if method.name in plan.intervals:
                continue
            probe = self.byte_probe(method)
            if not _completes(probe, runner, stop):
                return
            moved = _bytes_of(probe)
            plan.intervals[method.name] = fitting = moved.rounds_within(plan.cloud_bytes)
            plan.write(self.common.out)
            say(
                f"budget    {method.name}: {fitting} cloud rounds fit in "
                f"{human_bytes(plan.cloud_bytes)} "
                f"({human_bytes(moved.first)} in the first, {human_bytes(moved.later)} later"
                f"{'' if moved.pruned is None else f', {human_bytes(moved.pruned)} once pruned'})"
            )

    def byte_probe(self, method: Method) -> PlannedRun:
        """The run that shows what a method sends: as little training and sampling as possible."""
        rounds = _PROBE_ROUNDS_PRUNED if method.prunes_half_way else _PROBE_ROUNDS
        settings = {
            "training.local_unit": "steps",
            "training.local_amount": 1,
            "evaluation.reference": None,
            "evaluation.every_intervals": rounds,
            "evaluation.num_samples": 2,
            "evaluation.sampling_steps": 1,
            "evaluation.grid_rows": 1,
        }
        seed = self.plan.seeds[0]
        run = self._plan_run(method, seed, intervals=rounds, settings=settings)
        folder = self.common.out / "probes" / method.name
        probe = replace(run, folder=folder, purpose="probe-", row=None)
        probe.check(self.plan.common)
        return probe

    def report(self, failed: Mapping[str, str], *, command: str) -> list[Path]:
        """Write tables and plots of all finished runs, and why runs failed; returns the files."""
        # It takes half a second to import, and is only needed here.
        from fedphd.deploy.compare.plots import draw_all

        out, runs = self.common.out, self.runs()
        out.mkdir(parents=True, exist_ok=True)
        self.keep(runs)
        results = collect(self.runs(), failed)
        left_out, tuning = self._left_out(), self._tuning_section()
        words: dict[str, Any] = {"command": command, "left_out": left_out, "tuning": tuning}
        files = {"table.csv": to_csv(results), "pairs.csv": pairs_to_csv(results)}
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
        plots = draw_all(results, self.rows)
        files["table.md"] = to_markdown(results, self.plan, plots=plots, **words)
        (out / "table.md").write_text(files["table.md"], encoding="utf-8")
        return [*(out / name for name in files), *plots, *self._page(results, words)]

    def _page(self, results: Sequence[MethodResults], words: Mapping[str, Any]) -> list[Path]:
        """Write the same as one page; none, and a warning, if that fails."""
        from fedphd.deploy.compare.page import comparison_page
        from fedphd.deploy.report.page import REPORT, write_page

        try:
            page = comparison_page(results, self.plan, self.rows, **words)
            return [write_page(self.common.out / REPORT, page)]
        except Exception as error:
            logger.warning("%s: no report was written: %s", self.common.out, error, exc_info=True)
            return []

    def _tuning_section(self) -> str:
        tuning = self.plan.tuning
        if tuning is None:
            return ""
        if self.tuner is None:
            lines = [f"- {name}: {chosen}" for name, chosen in tuning.chosen.items()]
            return "\n".join([f"Chosen in the comparison {tuning.taken_from}:", "", *lines])
        return self.tuner.section()

    def _left_out(self) -> list[str]:
        """Methods without a run, and why."""
        if self.plan.budget != Budget.cloud_bytes:
            return []
        reasons = {0: "the budget is too small for it", None: "its bytes are not known yet"}
        found = [(method.name, self.plan.intervals.get(method.name)) for method in self.methods]
        return [f"{name}: {reasons[number]}" for name, number in found if not number]


def _bytes_of(probe: PlannedRun) -> RoundBytes:
    """What a finished ``byte_probe`` shows."""
    totals = [ended.edge_cloud_bytes for ended in probe.cloud_rounds()]
    first, later, *pruned = (after - before for before, after in pairwise([0, *totals]))
    return RoundBytes(first, later, pruned[-1] if pruned else None)


def _completes(run: PlannedRun, runner: Runner, stop: threading.Event) -> bool:
    """Run what the budget depends on; False if ``stop`` was set before it was finished."""
    failed = runner.run([run], stop)
    if failed and not stop.is_set():
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise FedPhDError(f"cannot tell how many cloud rounds fit in the budget: {reasons}")
    return not stop.is_set()
