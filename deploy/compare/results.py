"""Results by method, from rows or from the folders of finished runs."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedphd.common.config.roles import CloudConfig
from fedphd.common.config.text import flattened
from fedphd.common.history.evaluation import EvaluationRecord, Protocol
from fedphd.common.history.events import IntervalEnded
from fedphd.deploy.compare.methods import Method
from fedphd.deploy.compare.plan import PlannedRun, readable
from fedphd.deploy.compare.rows import CurvePoint, Row
from fedphd.deploy.launch.runs import SIMULATION

DISTANCE = "frechet_distance"
RAW_DISTANCE = f"raw.{DISTANCE}"
# The method that the others are compared with, and the one that has all images in one place.
REFERENCE = "fedavg"
CEILING = "centralised"
# Parts of an evaluation that say neither how good the samples are nor how that was measured.
_ASIDE = ("interval", "seconds", "least_class", "raw.least_class")


@dataclass
class MethodResults:
    """All runs of one method: the finished ones, and by seed why the others are missing.

    ``config`` and ``settings``, those that decide the numbers, are one run's; the others differ by
    their seeds, and by what follows from them.
    """

    method: Method
    config: CloudConfig
    settings: Mapping[str, Any]
    runs: list[Row] = field(default_factory=list)
    missing: dict[int, str] = field(default_factory=dict)

    def by_seed(self, name: str = DISTANCE) -> dict[int, float]:
        """A quality or a cost by name, of every run that has it."""
        every = {run.seed: {**run.costs, **run.quality} for run in self.runs}
        return {seed: values[name] for seed, values in every.items() if name in values}

    def mean_and_spread(self, name: str) -> tuple[float | None, float | None]:
        """Of the values in ``by_seed``; None for what the runs do not have."""
        values = list(self.by_seed(name).values())
        return mean_and_spread(values) if values else (None, None)


def shared_seeds(every: Iterable[MethodResults], name: str = DISTANCE) -> list[int]:
    """The seeds of which all methods that have the value ``name`` at all have it, ascending."""
    having = [set(values) for one in every if (values := one.by_seed(name))]
    return sorted(set.intersection(*having)) if having else []


def collect(runs: Iterable[PlannedRun], failed: Mapping[str, str]) -> list[MethodResults]:
    """The results by method, in the runs' order; ``failed`` says why runs failed, by name.

    Raises FedPhDError if a finished run's files cannot be read; names the folder.
    """
    found: dict[str, MethodResults] = {}
    for run in runs:
        name = run.method.name
        results = found.setdefault(name, MethodResults(run.method, run.config, run.decisive))
        if run.finished:
            results.runs.append(result_of(run))
        else:
            results.missing[run.seed] = failed.get(run.name, "not run yet")
    return list(found.values())


def method(every: Iterable[MethodResults], name: str) -> MethodResults | None:
    """The results of a method by name, if it is there."""
    return next((results for results in every if results.method.name == name), None)


def result_of(run: PlannedRun) -> Row:
    """What is known of a finished run; raises FedPhDError if its files are incomplete."""
    return run.row or read_result(run)


def read_result(run: PlannedRun) -> Row:
    """A finished run from its folder; raises FedPhDError if its files are damaged."""
    summary, rounds = run.summary(), run.cloud_rounds()
    with readable(run.folder):
        if summary.evaluation is None:
            raise ValueError("its summary has no evaluation")
        if not rounds:
            raise ValueError("its log has no interval")
        anchors = summary.evaluation.anchors
        evaluation = flattened(summary.evaluation.model_dump(exclude={"anchors"}))
        parts = {key: value for key, value in evaluation if key not in _ASIDE}
        return Row(
            name=run.name,
            method=run.method.name,
            seed=run.seed,
            tuning=run.tuning,
            quality={
                key: value
                for key, value in parts.items()
                if isinstance(value, float) and key not in Protocol.model_fields
            },
            costs={
                "parameters": float(summary.parameters.after),
                "macs": float(summary.macs.after),
                "client_edge_bytes": float(summary.bytes.client_edge),
                "cloud_bytes": float(summary.bytes.edge_cloud),
                "training_flops": sum(ended.training_flops for ended in rounds),
                "seconds": summary.seconds["total"],
            },
            anchors=anchors.model_dump(exclude_none=True) if anchors else {},
            curve=[curve_point(evaluation, rounds) for evaluation in summary.evaluations],
            protocol={
                key: value
                for key, value in parts.items()
                if isinstance(value, int | str) or (value and key in Protocol.model_fields)
            },
            origin=json.loads((run.folder / SIMULATION).read_text("utf-8"))["origin"],
            partition=summary.partition["name"] if summary.partition else None,
            failures=sum(len(ended.failures) for ended in rounds),
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
        raw=evaluation.raw.frechet_distance if evaluation.raw else None,
    )


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); no spread for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
