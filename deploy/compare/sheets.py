"""``table.csv``, a line per run, and ``pairs.csv``, a line per two methods: plain numbers."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any

from fedphd.deploy.compare.intervals import Paired
from fedphd.deploy.compare.results import DISTANCE, MethodResults

# What a run has besides its settings, qualities and costs.
_SEED, _ROUNDS, _COMMIT, _FAILURES = "seed", "schedule.intervals", "commit", "failures"


def metrics_of(every: Iterable[MethodResults]) -> list[str]:
    """Names of all qualities that some run has, the Frechet distance first."""
    found = {name for results in every for run in results.runs for name in run.quality}
    return sorted(found, key=lambda name: (name != DISTANCE, name))


def differing(every: Sequence[MethodResults]) -> list[str]:
    """Dotted settings in which the methods differ, without the seed."""
    keys = sorted({key for results in every for key in results.settings} - {_SEED})
    return [key for key in keys if len({repr(results.settings.get(key)) for results in every}) > 1]


def to_csv(every: Sequence[MethodResults]) -> str:
    """A line per finished run: what it set, every quality and cost, the commit that made it."""
    runs = [run for results in every for run in results.runs]
    settings = [key for key in differing(every) if key != _ROUNDS]
    costs = list(dict.fromkeys(name for run in runs for name in run.costs))
    metrics = metrics_of(every)
    lines = [["method", _SEED, "cloud_rounds", *settings, *metrics, *costs, _FAILURES, _COMMIT]]
    for results in every:
        for run in results.runs:
            # What follows from a seed's split of the data is the run's own.
            known = {**results.settings, **run.settings}
            own = [_cell(known.get(key)) for key in settings]
            numbers = [run.quality.get(name) for name in metrics]
            numbers += [run.costs.get(name) for name in costs]
            lines.append(
                [
                    run.method,
                    str(run.seed),
                    _cell(known.get(_ROUNDS)),
                    *own,
                    *map(_cell, numbers),
                    _cell(run.failures),
                    run.origin.get(_COMMIT, ""),
                ]
            )
    return _written(lines)


def pairs_to_csv(every: Sequence[MethodResults]) -> str:
    """A line per ordered pair of methods with common seeds: how the first's distance differs."""
    lines = [
        ["method", "against", "n", "relative", "low", "high", "low_t", "high_t", "seeds_better"]
    ]
    for ours, theirs in permutations(every, 2):
        pair = Paired.of(ours.by_seed(), theirs.by_seed())
        if pair is None:
            continue
        nothing = (None, None)
        numbers = [pair.relative, *(pair.interval or nothing), *(pair.student or nothing)]
        ends = [ours.method.name, theirs.method.name, str(pair.num_seeds)]
        lines.append([*ends, *map(_cell, numbers), str(pair.wins)])
    return _written(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(value, Mapping | list):
        return repr(value)
    return "" if value is None else str(value)


def _written(lines: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
