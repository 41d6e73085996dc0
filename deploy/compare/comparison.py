"""A whole comparison: plan it, run what is missing, write the report."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.history.events import Tail
from fedphd.deploy.compare.budget import RoundBytes, method_settings
from fedphd.deploy.compare.methods import Method, choose_methods
from fedphd.deploy.compare.plan import Common, Plan, PlannedRun, plan_runs
from fedphd.deploy.compare.results import collect
from fedphd.deploy.compare.runner import Runner
from fedphd.deploy.compare.table import to_csv, to_markdown
from fedphd.deploy.launch.client_data import CLIENT_DEFAULTS
from fedphd.deploy.launch.render import human_bytes
from fedphd.deploy.launch.runs import EVENTS, Say
from fedphd.deploy.simulation.run_config import SimulatedClients

ROUNDS, CLOUD_BYTES = "rounds", "cloud-bytes"
PROBE_ROUNDS = 2
LOGS = "logs"
PROBES = "probes"


@dataclass
class Comparison:
    """Methods x seeds on one budget, in one folder.

    Args:
        common: what all runs share.
        table: every known method.
        methods: to compare.
        seeds: one run of each method for each.
        budget: "rounds" or "cloud-bytes".
        cloud_bytes: the number of bytes for "cloud-bytes"; None: what ``byte_reference`` moved.
        byte_reference: the method whose run with the first seed sets the number of bytes.
    """

    common: Common
    table: Mapping[str, Method]
    methods: Sequence[Method]
    seeds: Sequence[int]
    budget: str = ROUNDS
    cloud_bytes: int | None = None
    byte_reference: str = "fedphd"

    def __post_init__(self) -> None:
        wanted = Plan(
            budget=self.budget,
            cloud_bytes=self.cloud_bytes,
            methods=[method.name for method in self.methods],
            seeds=list(self.seeds),
            intervals={},
            common=self.common.identity(),
        )
        self.plan = wanted.extended(Plan.read(self.common.out), self.common.out)

    @classmethod
    def stored(cls, out: Path, table: Mapping[str, Method]) -> Comparison:
        """The comparison that ``out`` holds, to report on it.

        Raises:
            ConfigError: there is none, or its methods are not in ``table``.
        """
        plan = Plan.read(out)
        if plan is None:
            raise ConfigError(f"--out {out}: holds no comparison; run it without --report-only")
        data = {key: value for key, value in plan.common.items() if key in CLIENT_DEFAULTS}
        values = {key: value for key, value in plan.common.items() if key not in data}
        return cls(
            Common(None, values, SimulatedClients(data), out),
            table,
            choose_methods(table, plan.methods),
            plan.seeds,
            budget=plan.budget,
            cloud_bytes=plan.cloud_bytes,
        )

    @property
    def all_methods(self) -> list[Method]:
        """All that the folder was ever asked for, in the table's order."""
        return choose_methods(self.table, self.plan.methods)

    def runs(self) -> list[PlannedRun]:
        """All runs that the folder was ever asked for, as far as their cloud rounds are known.

        Raises:
            ConfigError: a method's settings are impossible, or a finished run had others.
        """
        methods = self.all_methods
        if self.budget == CLOUD_BYTES:
            methods = [method for method in methods if method.name in self.plan.intervals]
        methods = [m for m in methods if self.plan.intervals.get(m.name, 1) > 0]
        runs = plan_runs(self.common, methods, self.plan.seeds, intervals=self.plan.intervals)
        for run in runs:
            run.check(self.common.clients)
        return runs

    def execute(self, *, jobs: int, stop: threading.Event, say: Say) -> dict[str, str]:
        """Run all that is missing; returns why runs failed, by name.

        Raises:
            FedPhDError: the number of bytes, or what a cloud round moves, could not be measured.
        """
        # Settings that cannot work are refused before anything starts.
        plan_runs(self.common, self.all_methods, self.plan.seeds)
        self.runs()
        self.plan.write(self.common.out)
        runner = Runner(self.common.clients, self.common.out / LOGS, jobs=jobs, say=say)
        if self.budget == CLOUD_BYTES:
            self.fit_rounds(runner, stop, say)
            if stop.is_set():
                return {}
        return runner.run(self.runs(), stop)

    def fit_rounds(self, runner: Runner, stop: threading.Event, say: Say) -> None:
        """Find the number of bytes, and each method's cloud rounds, and store both."""
        if self.plan.cloud_bytes is None:
            (reference,) = choose_methods(self.table, [self.byte_reference])
            (run,) = plan_runs(self.common, [reference], self.plan.seeds[:1])
            self._must(runner.run([run], stop), stop)
            if stop.is_set():
                return
            (outcome,) = collect([run], {})
            self.plan.cloud_bytes = int(outcome.results[0].costs["cloud_bytes"])
            self.plan.intervals[reference.name] = run.config.schedule.intervals
            self.plan.write(self.common.out)
        for method in self.all_methods:
            if method.name in self.plan.intervals or stop.is_set():
                continue
            moved = self.measure(method, runner, stop)
            if moved is not None:
                rounds = moved.rounds_within(self.plan.cloud_bytes)
                self.plan.intervals[method.name] = _least(method, rounds)
                self.plan.write(self.common.out)
                say(
                    f"budget    {method.name}: {self.plan.intervals[method.name]} cloud rounds fit "
                    f"in {human_bytes(self.plan.cloud_bytes)} "
                    f"({human_bytes(moved.first)} in the first, {human_bytes(moved.later)} later)"
                )

    def measure(self, method: Method, runner: Runner, stop: threading.Event) -> RoundBytes | None:
        """Bytes of a method's cloud rounds, from a run of two with one step each.

        None if ``stop`` was set meanwhile.
        """
        run = self.probe(method)
        self._must(runner.run([run], stop), stop)
        if stop.is_set():
            return None
        events = [e for e in Tail(run.folder / EVENTS).new_lines() if e["event"] == "interval"]
        first, both = (int(event["edge_cloud_bytes"]) for event in events)
        scheduled = run.config.pruning.mode == "scheduled"
        return RoundBytes(first=first, later=both - first, scheduled=scheduled)

    def probe(self, method: Method) -> PlannedRun:
        """The run that measures a method's bytes: as little training and sampling as there is."""
        base, seed = self.common.base(), self.plan.seeds[0]
        settings = {
            **method_settings(method, base, intervals=PROBE_ROUNDS),
            "seed": seed,
            "training.local_unit": "steps",
            "training.local_amount": 1,
            "evaluation.reference": None,
            "evaluation.every_intervals": PROBE_ROUNDS,
            "evaluation.num_samples": 2,
            "evaluation.sampling_steps": 1,
            "evaluation.grid_rows": 1,
        }
        config = self.common.load(settings)
        run = PlannedRun(method, seed, config, self.common.out / PROBES / method.name, "probe-")
        run.check(self.common.clients)
        return run

    @staticmethod
    def _must(failed: Mapping[str, str], stop: threading.Event) -> None:
        if failed and not stop.is_set():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise FedPhDError(f"the budget cannot be measured: {reasons}")

    def report(self, failed: Mapping[str, str], *, command: str) -> list[Path]:
        """Write tables and plots of all finished runs; returns the files."""
        # Half a second to import, and only needed here.
        from fedphd.deploy.compare.plots import draw_all

        out = self.common.out
        out.mkdir(parents=True, exist_ok=True)
        outcomes = collect(self.runs(), failed)
        plots = draw_all(outcomes, out)
        texts = {
            out / "table.csv": to_csv(outcomes),
            out / "table.md": to_markdown(
                outcomes, self.plan, command=command, plots=plots, left_out=self._left_out()
            ),
        }
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        return [*texts, *plots]

    def _left_out(self) -> list[str]:
        """Methods without a run, and why."""
        if self.budget != CLOUD_BYTES:
            return []
        reasons = {0: "the budget is too small for it", None: "its bytes are not measured yet"}
        rounds = {method.name: self.plan.intervals.get(method.name) for method in self.all_methods}
        return [f"{name}: {reasons[known]}" for name, known in rounds.items() if not known]


def _least(method: Method, rounds: int) -> int:
    """A method that prunes half way needs two cloud rounds to run at all."""
    return 0 if method.settings.get("pruning.mode") == "scheduled" and rounds < 2 else rounds
