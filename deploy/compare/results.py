"""Results of finished runs, read from their folders."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedphd.common.config.roles import CloudConfig
from fedphd.common.config.text import flattened
from fedphd.common.history.evaluation import EvaluationRecord
from fedphd.common.history.events import IntervalEnded
from fedphd.deploy.compare.methods import Method
from fedphd.deploy.compare.plan import PlannedRun, readable
from fedphd.deploy.launch.runs import SIMULATION

DISTANCE = "frechet_distance"
# The method that the others are compared with.
REFERENCE = "fedavg"
# Parts of an evaluation that say neither how good the samples are nor how that was measured.
_ASIDE = ("interval", "seconds", "least_class", "raw.least_class")


@dataclass(frozen=True)
class CurvePoint:
    """The Frechet distance of an evaluation, and what had been spent by then.

    Bytes are those over the cloud's links, FLOPs those of all clients together. No distance
    without reference data.
    """

    cloud_rounds: int
    cloud_bytes: int
    training_flops: float
    distance: float | None


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        quality: every real number of the last evaluation, nested ones with dotted names.
        costs: parameters, MACs, bytes, FLOPs and seconds.
        protocol: how it was made: features, number of samples, steps and the like.
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
    partition: str | None


@dataclass
class MethodResults:
    """All runs of one method: the finished ones, and by seed why the others are missing.

    ``config`` is that of one of them; the others differ by their seeds only.
    """

    method: Method
    config: CloudConfig
    runs: list[RunResult] = field(default_factory=list)
    missing: dict[int, str] = field(default_factory=dict)

    def by_seed(self, name: str) -> dict[int, float]:
        """A quality or a cost by name, of every run that has it."""
        every = {run.seed: {**run.costs, **run.quality} for run in self.runs}
        return {seed: values[name] for seed, values in every.items() if name in values}

    def mean_and_spread(self, name: str) -> tuple[float | None, float | None]:
        """Of the values in ``by_seed``; None for what the runs do not have."""
        values = list(self.by_seed(name).values())
        return mean_and_spread(values) if values else (None, None)


def collect(runs: Iterable[PlannedRun], failed: Mapping[str, str]) -> list[MethodResults]:
    """The results by method, in the runs' order; ``failed`` says why runs failed, by name.

    Raises FedPhDError if a finished run's files cannot be read; names the folder.
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
    summary, rounds = run.summary(), run.cloud_rounds()
    with readable(run.folder):
        if summary.evaluation is None:
            raise ValueError("its summary has no evaluation")
        evaluation = flattened(summary.evaluation.model_dump())
        parts = {key: value for key, value in evaluation if key not in _ASIDE}
        return RunResult(
            seed=run.seed,
            folder=run.folder,
            quality={key: value for key, value in parts.items() if isinstance(value, float)},
            costs={
                "parameters": float(summary.parameters.after),
                "macs": float(summary.macs.after),
                "client_edge_bytes": float(summary.bytes.client_edge),
                "cloud_bytes": float(summary.bytes.edge_cloud),
                "training_flops": sum(ended.training_flops for ended in rounds),
                "seconds": summary.seconds["total"],
            },
            curve=[curve_point(evaluation, rounds) for evaluation in summary.evaluations],
            protocol={key: value for key, value in parts.items() if isinstance(value, int | str)},
            origin=json.loads((run.folder / SIMULATION).read_text("utf-8"))["origin"],
            partition=summary.partition["name"] if summary.partition else None,
        )


def curve_point(evaluation: EvaluationRecord, rounds: Iterable[IntervalEnded]) -> CurvePoint:
    """An evaluation and what had been spent by then; raises ValueError if it has no interval."""
    if evaluation.interval is None:
        raise ValueError("an evaluation has no interval")
    before = [ended for ended in rounds if ended.interval <= evaluation.interval]
    return CurvePoint(
        cloud_rounds=evaluation.interval,
        cloud_bytes=before[-1].edge_cloud_bytes if before else 0,
        training_flops=sum(ended.training_flops for ended in before),
        distance=evaluation.frechet_distance,
    )


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); no spread for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


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
