"""What finished runs came to, read from their folders."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedphd.common.config.roles import CloudConfig
from fedphd.common.config.text import flattened
from fedphd.common.errors import FedPhDError
from fedphd.common.history.events import Tail
from fedphd.common.history.summary import SUMMARY
from fedphd.deploy.compare.plan import PlannedRun
from fedphd.deploy.launch.runs import EVENTS, SIMULATION

DISTANCE = "frechet_distance"
# Of an evaluation neither what it found nor how it was done.
_ASIDE = ("interval", "seconds", "least_class", "raw.least_class")


@dataclass(frozen=True)
class Point:
    """An evaluation on the way, and what had been spent by then.

    Attributes:
        cloud_rounds: finished cloud rounds.
        cloud_bytes: moved over the cloud's links.
        training_flops: of all clients together, see ``training_flops``.
        distance: Frechet distance; None without reference data.
    """

    cloud_rounds: int
    cloud_bytes: int
    training_flops: float
    distance: float | None


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        seed: of the run.
        folder: where it lies.
        quality: every real number of the last evaluation, nested ones with dotted names.
        costs: parameters, MACs, bytes, FLOPs and seconds.
        curve: the evaluations.
        protocol: its texts and whole numbers: features, samples, steps and the like.
        origin: version, commit and machine that the run recorded.
        partition: name of the clients' split of the data, if the run recorded it.
    """

    seed: int
    folder: Path
    quality: dict[str, float]
    costs: dict[str, float]
    curve: list[Point]
    protocol: dict[str, Any]
    origin: dict[str, str]
    partition: str | None = None


@dataclass
class Outcome:
    """All runs of one method."""

    name: str
    title: str
    reference: str
    config: CloudConfig
    results: list[Result] = field(default_factory=list)
    missing: dict[int, str] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        """A measured quantity, or a cost, of every run that has it, by seed."""
        return list(self.by_seed(name).values())

    def by_seed(self, name: str) -> dict[int, float]:
        """The same, by seed."""
        every = {r.seed: {**r.costs, **r.quality}.get(name) for r in self.results}
        return {seed: float(value) for seed, value in every.items() if value is not None}


def collect(runs: Iterable[PlannedRun], failed: Mapping[str, str]) -> list[Outcome]:
    """The results per method, in the runs' order.

    Args:
        runs: all that are planned.
        failed: why runs are missing, by name.

    Raises:
        FedPhDError: a finished run's files cannot be read; names the folder.
    """
    outcomes: dict[str, Outcome] = {}
    for run in runs:
        method = run.method
        outcome = outcomes.setdefault(
            method.name, Outcome(method.name, method.title, method.reference, run.config)
        )
        if run.finished:
            outcome.results.append(read_result(run))
        else:
            outcome.missing[run.seed] = failed.get(run.name, "not run yet")
    return list(outcomes.values())


def read_result(run: PlannedRun) -> Result:
    """A finished run; raises FedPhDError if its files are not what a run leaves."""
    try:
        summary = json.loads((run.folder / SUMMARY).read_text("utf-8"))
        simulation = json.loads((run.folder / SIMULATION).read_text("utf-8"))
        events = list(Tail(run.folder / EVENTS).new_lines())
        curve = read_curve(events, summary["evaluations"])
        evaluation = dict(flattened(summary["evaluation"]))
        said = {key: value for key, value in evaluation.items() if key not in _ASIDE}
        quality = {key: value for key, value in said.items() if isinstance(value, float)}
        protocol = {key: value for key, value in said.items() if isinstance(value, int | str)}
        costs = {
            "parameters": float(summary["parameters"]["after"]),
            "macs": float(summary["macs"]["after"]),
            "client_edge_bytes": float(summary["bytes"]["client_edge"]),
            "cloud_bytes": float(summary["bytes"]["edge_cloud"]),
            "training_flops": spent_flops(events),
            "seconds": float(summary["seconds"]["total"]),
        }
        partition = summary.get("partition")
        return Result(
            seed=run.seed,
            folder=run.folder,
            quality=quality,
            costs=costs,
            curve=curve,
            protocol=protocol,
            origin=simulation["origin"],
            partition=partition["name"] if partition else None,
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FedPhDError(
            f"{run.folder} is not what a finished run leaves ({type(error).__name__}: {error}); "
            "move the folder away to run it again"
        ) from error


def spent_flops(events: Iterable[Mapping[str, Any]]) -> float:
    """Training FLOPs of all clients in a run's intervals."""
    return float(sum(e["training_flops"] for e in events if e["event"] == "interval"))


def read_curve(
    events: Sequence[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]
) -> list[Point]:
    """The evaluations of a run with what was spent before each."""
    intervals = [event for event in events if event["event"] == "interval"]
    points = []
    for evaluation in evaluations:
        before = [event for event in intervals if event["interval"] <= evaluation["interval"]]
        points.append(
            Point(
                cloud_rounds=evaluation["interval"],
                cloud_bytes=before[-1]["edge_cloud_bytes"] if before else 0,
                training_flops=spent_flops(before),
                distance=evaluation[DISTANCE],
            )
        )
    return points


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); no spread for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), spread


def relative_to(outcome: Outcome, reference: Outcome, name: str) -> float | None:
    """How far a mean lies from the reference's, over the seeds that both have, as a share.

    None if no seed has both, or the reference's mean is 0.
    """
    ours, theirs = outcome.by_seed(name), reference.by_seed(name)
    seeds = sorted(set(ours) & set(theirs))
    base = math.fsum(theirs[seed] for seed in seeds)
    return math.fsum(ours[seed] for seed in seeds) / base - 1 if base else None
