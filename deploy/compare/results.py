"""Results of finished runs, read from their folders."""

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
from fedphd.deploy.compare.methods import Method
from fedphd.deploy.compare.plan import PlannedRun
from fedphd.deploy.launch.runs import EVENTS, SIMULATION

DISTANCE = "frechet_distance"
# The method that the others are compared with.
REFERENCE = "fedavg"
# Parts of an evaluation that say neither how good the samples are nor how that was measured.
_ASIDE = ("interval", "seconds", "least_class", "raw.least_class")


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation during a run, and what had been spent by then.

    Attributes:
        cloud_rounds: finished cloud rounds.
        cloud_bytes: bytes moved over the cloud's links.
        training_flops: of all clients together, see ``spent_flops``.
        distance: Frechet distance; None without reference data.
    """

    cloud_rounds: int
    cloud_bytes: int
    training_flops: float
    distance: float | None


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        seed: of the run.
        folder: of the run.
        quality: every real number of the last evaluation, nested ones with dotted names.
        costs: parameters, MACs, bytes, FLOPs and seconds.
        curve: all evaluations.
        protocol: how the last one was made: features, number of samples, steps and the like.
        origin: version, commit and machine that the run recorded.
        partition: name of the clients' split of the data, if the run recorded it.
    """

    seed: int
    folder: Path
    quality: dict[str, float]
    costs: dict[str, float]
    curve: list[CurvePoint]
    protocol: dict[str, Any]
    origin: dict[str, str]
    partition: str | None = None


@dataclass
class MethodResults:
    """All runs of one method.

    Attributes:
        method: the method.
        config: of one of its runs; the others differ by their seeds only.
        runs: the finished ones.
        missing: why the others are missing, by seed.
    """

    method: Method
    config: CloudConfig
    runs: list[RunResult] = field(default_factory=list)
    missing: dict[int, str] = field(default_factory=dict)

    def by_seed(self, name: str) -> dict[int, float]:
        """A quality or a cost by name, of every run that has it."""
        every = {r.seed: {**r.costs, **r.quality}.get(name) for r in self.runs}
        return {seed: float(value) for seed, value in every.items() if value is not None}

    def mean_and_spread(self, name: str) -> tuple[float | None, float | None]:
        """Of the values in ``by_seed``; None for what the runs do not have."""
        values = list(self.by_seed(name).values())
        return mean_and_spread(values) if values else (None, None)


def collect(runs: Iterable[PlannedRun], failed: Mapping[str, str]) -> list[MethodResults]:
    """The results by method, in the runs' order.

    Args:
        runs: all that are planned.
        failed: why runs failed, by name.

    Raises:
        FedPhDError: a finished run's files cannot be read; names the folder.
    """
    found: dict[str, MethodResults] = {}
    for run in runs:
        results = found.setdefault(run.method.name, MethodResults(run.method, run.config))
        if run.finished:
            results.runs.append(read_result(run))
        else:
            results.missing[run.seed] = failed.get(run.name, "not run yet")
    return list(found.values())


def read_result(run: PlannedRun) -> RunResult:
    """A finished run; raises FedPhDError if its files are incomplete or damaged."""
    try:
        summary = json.loads((run.folder / SUMMARY).read_text("utf-8"))
        simulation = json.loads((run.folder / SIMULATION).read_text("utf-8"))
        events = list(Tail(run.folder / EVENTS).new_lines())
        curve = read_curve(events, summary["evaluations"])
        evaluation = dict(flattened(summary["evaluation"]))
        parts = {key: value for key, value in evaluation.items() if key not in _ASIDE}
        quality = {key: value for key, value in parts.items() if isinstance(value, float)}
        protocol = {key: value for key, value in parts.items() if isinstance(value, int | str)}
        costs = {
            "parameters": float(summary["parameters"]["after"]),
            "macs": float(summary["macs"]["after"]),
            "client_edge_bytes": float(summary["bytes"]["client_edge"]),
            "cloud_bytes": float(summary["bytes"]["edge_cloud"]),
            "training_flops": spent_flops(events),
            "seconds": float(summary["seconds"]["total"]),
        }
        partition = summary.get("partition")
        return RunResult(
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
            f"{run.folder}: not a complete finished run ({type(error).__name__}: {error}); "
            "move the folder away to run it again"
        ) from error


def spent_flops(events: Iterable[Mapping[str, Any]]) -> float:
    """Training FLOPs of all clients in a run's intervals."""
    return float(sum(e["training_flops"] for e in events if e["event"] == "interval"))


def read_curve(
    events: Sequence[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]
) -> list[CurvePoint]:
    """The evaluations of a run, with what had been spent by each."""
    intervals = [event for event in events if event["event"] == "interval"]
    points = []
    for evaluation in evaluations:
        before = [event for event in intervals if event["interval"] <= evaluation["interval"]]
        points.append(
            CurvePoint(
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


def relative(
    results: MethodResults, every: Iterable[MethodResults], name: str = DISTANCE
) -> float | None:
    """How far a method's mean lies from that of ``REFERENCE``, as a share of it.

    Over the seeds that both have. None for the reference itself, without it or a seed in common,
    or if its mean is 0.
    """
    reference = next((other for other in every if other.method.name == REFERENCE), None)
    if reference is None or results is reference:
        return None
    ours, theirs = results.by_seed(name), reference.by_seed(name)
    seeds = sorted(ours.keys() & theirs.keys())
    base = math.fsum(theirs[seed] for seed in seeds)
    return math.fsum(ours[seed] for seed in seeds) / base - 1 if base else None
