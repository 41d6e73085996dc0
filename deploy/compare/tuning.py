"""Settings that every method chooses for itself, by the same rule, before the results are made."""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fedphd.common.config.text import parse_settings, setting_keys
from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.deploy.compare.methods import Method, tuned_keys
from fedphd.deploy.compare.plan import CommonSettings, Plan, PlannedRun, Tuning, plan_run
from fedphd.deploy.compare.results import DISTANCE, result_of
from fedphd.deploy.compare.rows import Rows
from fedphd.deploy.compare.runner import Runner
from fedphd.deploy.launch.runs import Say

TUNE = "--tune"
# Of a tuning run in which clients or edges failed.
MARK = "!"
EXAMPLE = "training.learning_rate=0.002,0.001"
# All methods do the same work, and tuning runs are evaluated at their end.
_SAME_FOR_ALL = (
    "schedule.intervals",
    "schedule.edge_rounds",
    "training.local_amount",
    "training.local_unit",
    "evaluation.every_intervals",
    "evaluation.raw_too",
)
# What every error of a training that diverged names.
DIVERGED = "training.learning_rate"


def read_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``["KEY=V1,V2"]`` as values by key; raises ConfigError that names what is wrong."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not equals or not values.strip():
            raise ConfigError(f"{TUNE} {text}: write KEY=V1,V2, such as {EXAMPLE}")
        if key not in setting_keys() or key in grid:
            why = "is given twice" if key in grid else "is not a setting of a run"
            raise ConfigError(f"{TUNE} {text}: {key} {why}; `fedphd config cloud` lists them")
        if key in _SAME_FOR_ALL:
            raise ConfigError(
                f"{TUNE} {text}: {key} is the same for all methods, so that they do equal work; "
                f"set it by --set {key}=VALUE"
            )
        parsed = [
            parse_settings([f"{key}={value}"], source=TUNE)[key] for value in values.split(",")
        ]
        if len({repr(value) for value in parsed}) < len(parsed):
            raise ConfigError(f"{TUNE} {text}: has a value twice")
        grid[key] = parsed
    return grid


def take_over(folder: Path, methods: Iterable[Method], table: Mapping[str, Method]) -> Tuning:
    """What the comparison in ``folder`` has chosen, to hold for ``methods`` of another.

    Raises ConfigError if there is none, or one of ``methods`` would go untuned beside tuned ones.
    """
    earlier = Plan.read(folder)
    if earlier is None or earlier.tuning is None or not earlier.tuning.chosen:
        raise ConfigError(f"--tuning-from {folder}: no comparison that has tuned anything")
    tuning = earlier.tuning.model_copy(update={"taken_from": folder.name})
    missing = []
    for method in methods:
        followed = table[method.tuned_like or method.name]
        keys = set(tuned_keys(followed, table, tuning.grid)) - method.settings.keys()
        if keys - tuning.of(method).keys():
            missing.append(followed.name)
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        raise ConfigError(
            f"--tuning-from {folder}: nothing is chosen there yet for {names}; tune them there "
            f"first (--out {folder} --methods {names.replace(' ', '')} {TUNE} ...), or leave them "
            "out of --methods"
        )
    return tuning


class Tuner:
    """Tunes one key after the other, for all methods at the same time.

    The values of a key are tried with the keys before it at their chosen values, those after it at
    the first value of their grids. The least mean of the seeds' Frechet distances wins, at
    equality the value that stands first; a value with a failed run loses against any other.
    """

    def __init__(
        self, common: CommonSettings, table: Mapping[str, Method], plan: Plan, rows: Rows
    ) -> None:
        assert plan.tuning is not None
        self._common, self._table, self._plan, self._rows = common, table, plan, rows
        self._tuning: Tuning = plan.tuning
        # Several methods may follow one that is not compared itself.
        names = {table[name].tuned_like or name for name in plan.methods}
        self._keys = {
            name: tuned_keys(table[name], table, self._tuning.grid)
            for name in table
            if name in names
        }

    def candidates(self, name: str, depth: int) -> list[tuple[Any, list[PlannedRun]]]:
        """Each value of a method's key number ``depth``, and its runs; what is chosen is known."""
        keys, grid = self._keys[name], self._tuning.grid
        chosen = self._tuning.chosen.get(name, {})
        values = {key: chosen[key] if at < depth else grid[key][0] for at, key in enumerate(keys)}
        tried = [{**values, keys[depth]: value} for value in grid[keys[depth]]]
        return [
            (one[keys[depth]], [self._run(name, one, seed) for seed in self._tuning.seeds])
            for one in tried
        ]

    def _run(self, name: str, values: Mapping[str, Any], seed: int) -> PlannedRun:
        intervals = self._tuning.intervals
        # Evaluated as seldom as possible: only the end counts.
        settings = {"evaluation.every_intervals": intervals, "evaluation.raw_too": False}
        run = plan_run(
            self._common, self._table[name], seed,
            intervals=intervals, tuned=values, settings=settings,
        )  # fmt: skip
        label = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())
        folder = self._common.out / "tuning" / name / label / f"seed-{seed}"
        run = replace(run, folder=folder, purpose=f"tuning-{label}-", tuning=True)
        return replace(run, row=self._rows.find(run.name))

    @property
    def most_runs(self) -> int:
        """Runs that the whole tuning needs at most."""
        grid = self._tuning.grid
        # A key's first values have been run when the key before it was tuned.
        values = (
            sum(len(grid[key]) - (depth > 0) for depth, key in enumerate(keys))
            for keys in self._keys.values()
        )
        return len(self._tuning.seeds) * sum(values)

    def check(self) -> None:
        """Raise ConfigError that names the value with which a run of some method is impossible.

        A method that follows another one gets its values too. Each value is tried with what is
        chosen for the other keys, or with the first values of their grids.
        """
        for name in self._plan.methods:
            followed = self._table[name].tuned_like or name
            keys, chosen = self._keys[followed], self._tuning.chosen.get(followed, {})
            usual = {key: chosen.get(key, self._tuning.grid[key][0]) for key in keys}
            for key in keys:
                for value in self._tuning.grid[key]:
                    self._check_values(name, {**usual, key: value})

    def _check_values(self, name: str, values: Mapping[str, Any]) -> None:
        try:
            self._plan_both(name, values)
        except ConfigError as error:
            # What is impossible without any value is no value's fault.
            self._plan_both(name, {})
            given = self._wrong(name, values) or values
            flags = " ".join(f"{TUNE} {key}={value}" for key, value in given.items())
            raise ConfigError(f"{flags}: {error}") from error

    def _wrong(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Which of ``values`` is impossible by itself; empty if only several together are."""
        for key, value in values.items():
            try:
                self._plan_both(name, {key: value})
            except ConfigError:
                return {key: value}
        return {}

    def _plan_both(self, name: str, values: Mapping[str, Any]) -> None:
        """Plan a tuning run and a result with ``values``; raises ConfigError."""
        method = self._table[name]
        self._run(method.tuned_like or name, values, self._tuning.seeds[0])
        plan_run(self._common, method, self._plan.seeds[0], tuned=values)

    def untuned(self, runs: Iterable[PlannedRun]) -> list[PlannedRun]:
        """Those of ``runs`` whose method has settings that are not chosen yet."""
        return [run for run in runs if self._open(run.method.tuned_like or run.method.name)]

    def _open(self, name: str) -> list[str]:
        """Keys of a method that nothing is chosen for yet."""
        chosen = self._tuning.chosen.get(name, {})
        return [key for key in self._keys[name] if key not in chosen]

    def choose(self, runner: Runner, stop: threading.Event, say: Say) -> None:
        """Run what is missing and store what is chosen in the plan.

        What is chosen already stays. Returns early once ``stop`` is set. Raises FedPhDError if all
        values of a key failed, or one for another reason than that its training diverged: then
        nothing is chosen, since a full disk or a busy machine says nothing about a value.
        """
        for depth in range(max(map(len, self._keys.values()), default=0)):
            asked = {
                name: self.candidates(name, depth)
                for name, keys in self._keys.items()
                if depth < len(keys) and keys[depth] in self._open(name)
            }
            runs = by_seed([run for pairs in asked.values() for _, found in pairs for run in found])
            for run in runs:
                run.check(self._plan.common)
            failed = runner.run(runs, stop)
            if stop.is_set():
                break
            if outside := {name: why for name, why in failed.items() if DIVERGED not in why}:
                name, why = next(iter(outside.items()))
                raise FedPhDError(
                    f"{len(outside)} tuning run(s) failed for another reason than their values, so "
                    f"nothing is chosen; the same command tries them again. {name}: {why}"
                )
            for name, pairs in asked.items():
                key = self._keys[name][depth]
                chosen = self._best(name, key, pairs, failed)
                self._tuning.chosen.setdefault(name, {})[key] = chosen
                say(f"tuned     {name}: {key} = {chosen}")
            self._plan.write(self._common.out)

    def _best(
        self,
        name: str,
        key: str,
        pairs: Sequence[tuple[Any, list[PlannedRun]]],
        failed: Mapping[str, str],
    ) -> Any:
        scores = [mean_distance(runs) for _, runs in pairs]
        if min(scores) == math.inf:
            reasons = [failed.get(run.name, "no distance") for _, runs in pairs for run in runs]
            raise FedPhDError(f"no value of {key} works for {name}: {reasons[0]}")
        return pairs[scores.index(min(scores))][0]

    def section(self) -> str:
        """The report's table: every value's distances, which was chosen, and disturbed runs."""
        seeds = self._tuning.seeds
        lines = [
            "| method | setting | value | " + " | ".join(f"seed {s}" for s in seeds) + " | mean |",
            "|---" * (4 + len(seeds)) + "|",
        ]
        for name, keys in self._keys.items():
            chosen = self._tuning.chosen.get(name, {})
            # What comes after a key that is not chosen yet cannot be known.
            known = [key for depth, key in enumerate(keys) if set(keys[:depth]) <= chosen.keys()]
            for depth, key in enumerate(known):
                for value, runs in self.candidates(name, depth):
                    won = chosen.get(key) == value
                    cells = [_distance(run) for run in runs]
                    row = [self._table[name].title, key, _bold(str(value), won), *cells]
                    mean = _bold(_number(mean_distance(runs)), won)
                    lines.append(f"| {' | '.join([*row, mean])} |")
        if any(MARK in line for line in lines):
            lines += ["", f"({MARK}) disturbed: clients or edges failed in this run."]
        return "\n".join(lines)


def mean_distance(runs: Sequence[PlannedRun]) -> float:
    """Mean Frechet distance of finished runs; infinite if one has none."""
    found = [result_of(run).quality.get(DISTANCE) for run in runs if run.finished]
    if len(found) < len(runs) or None in found:
        return math.inf
    return fmean(distance for distance in found if distance is not None)


def by_seed(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Every run once, all of a seed before the next seed."""
    return sorted({run.name: run for run in runs}.values(), key=lambda run: run.seed)


def _distance(run: PlannedRun) -> str:
    """A run's distance, with a mark where clients failed in it."""
    text = _number(mean_distance([run]))
    return f"{text} ({MARK})" if run.finished and result_of(run).failures else text


def _number(distance: float) -> str:
    return "-" if distance == math.inf else f"{distance:.1f}"


def _bold(text: str, on: bool) -> str:
    return f"**{text}**" if on else text
