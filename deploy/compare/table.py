"""``table.md``: every finished run counts, every missing one is named."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from fedphd.deploy.compare.budget import Budget
from fedphd.deploy.compare.intervals import LEAST_SEEDS, Paired
from fedphd.deploy.compare.plan import Plan
from fedphd.deploy.compare.results import (
    CEILING,
    DISTANCE,
    RAW_DISTANCE,
    REFERENCE,
    MethodResults,
    method,
    shared_seeds,
)
from fedphd.deploy.compare.sheets import differing, metrics_of
from fedphd.deploy.launch.render import human_bytes, human_seconds

# The number that a cell begins with, such as -57 in "-57% [-60%, -52%]".
_FIRST = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Column:
    """A heading, and the cell of a method below it; ``number`` is what it is sorted by."""

    heading: str
    text: Callable[[MethodResults], str]
    number: Callable[[MethodResults], float | None] | None = None

    def value(self, results: MethodResults) -> float | None:
        """The number in a method's cell, if it has one."""
        if self.number:
            return self.number(results)
        found = _FIRST.match(self.text(results))
        return float(found[0]) if found else None


# A cost's heading, and how its mean is written.
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda v: f"{v / 1e6:.2f} M"),
    "macs": ("MACs per image", lambda v: f"{v / 1e6:.2f} M"),
    "client_edge_bytes": ("bytes client-edge", human_bytes),
    "cloud_bytes": ("bytes over cloud links", human_bytes),
    "training_flops": ("training FLOPs", lambda v: f"{v:.3g}"),
    "seconds": ("time per run", human_seconds),
}
_ANCHORS = {
    "real": "real images",
    "one_class_missing": "real images without one class",
    "half_of_the_classes": "real images of half of the classes",
}
NOTES = (
    "Mean ± sample standard deviation over seeds; a seed sets the weights, who takes part, "
    f"the choices and the split of the data. Against {REFERENCE}: means over the seeds that "
    "both methods have, and 95% intervals over these seeds, in pairs (not with fewer than "
    f"{LEAST_SEEDS}): by the bootstrap, which is too narrow with so few (five cover about 80%, "
    "three about three quarters), and after t by Student's t of the ratios' logarithms; then in "
    "how many of the seeds the method has the lower distance. Share of the gap: "
    f"({REFERENCE} - method) / ({REFERENCE} - {CEILING}). Ranks: 1 has the least "
    "distance, over the seeds that all methods have. "
    "Parameters and MACs are those of the final network."
)


def to_markdown(
    every: Sequence[MethodResults],
    plan: Plan,
    *,
    command: str,
    plots: Iterable[Path],
    left_out: Iterable[str],
    tuning: str = "",
) -> str:
    """The report for people: budget, tables, what is missing, protocol, settings, origin.

    Args:
        command: that wrote it.
        plots: pictures to show, beside the report.
        left_out: methods without any run, and why.
        tuning: how the methods' own settings were chosen; "" if none were.
    """
    sections = [
        "# Methods compared",
        budget(plan),
        _table(quality_columns(every), every),
        "\n".join(f"- {line}" for line in scale(every)),
        _table(others, every) if (others := other_columns(every)) else "",
        _table(cost_columns(every, plan), every),
        NOTES,
        _list("Missing runs", [*left_out, *missing(every)]) or "All planned runs are in the table.",
        failures(every),
        _list("One thing changed", changes(every)),
        tuning and f"## Tuning\n\n{tuning}",
        _list("Protocol", protocol(every)),
        *(f"![{path.stem}]({path.name})" for path in plots),
        _list("Settings in which the methods differ", own_settings(every)),
        _list("Origin", [*origins(every), f"written by `{command}`"]),
        "## Common settings",
        "\n".join(f"    {key} = {value!r}" for key, value in common_settings(every, plan)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def missing(every: Iterable[MethodResults]) -> list[str]:
    """Each run that is missing, and why."""
    return [
        f"{results.method.name} seed {seed}: {reason}"
        for results in every
        for seed, reason in results.missing.items()
    ]


def failures(every: Iterable[MethodResults]) -> str:
    """Which runs somebody failed in: what they gave is not what undisturbed ones would give."""
    runs = [run for results in every for run in results.runs]
    found = [f"{run.method} seed {run.seed} ({run.failures})" for run in runs if run.failures]
    unknown = [run for run in runs if run.failures is None]
    sentences = []
    if unknown:
        sentences.append(f"Of {len(unknown)} run(s) it is not recorded whether somebody failed.")
    if found:
        sentences.append(
            f"Disturbed: clients or edges failed, so often, in {', '.join(found)}. Move the "
            "folders of these runs away, and their rows, to run them again."
        )
    elif len(unknown) < len(runs):
        other = "other " if unknown else ""
        sentences.append(f"No client and no edge failed in any {other}run.")
    return " ".join(sentences)


def budget(plan: Plan) -> str:
    """What every method may spend."""
    if plan.budget == Budget.rounds:
        common = plan.common
        amount = common["schedule.edge_rounds"] * common["training.local_amount"]
        return (
            "Budget: equal local work and equal cloud rounds. In each of "
            f"{common['schedule.intervals']} cloud rounds a client of a flat method that takes "
            f"part trains {amount} local {common['training.local_unit']}; a hierarchical method "
            "draws clients anew for each edge round, in which they train their part of that. The "
            "sum over all clients is the same; the methods' settings are below."
        )
    known = "not known yet" if plan.cloud_bytes is None else human_bytes(plan.cloud_bytes)
    return (
        f"Budget: equal bytes over the cloud's links, {known}; each method runs as many cloud "
        "rounds as fit, so its local work differs too."
    )


def quality_columns(every: Sequence[MethodResults]) -> list[Column]:
    """How good the methods are, by the distance."""
    columns = [
        Column("n", lambda results: str(len(results.runs))),
        Column("Frechet distance", partial(_mean, DISTANCE)),
        Column(f"against {REFERENCE}", partial(_against_reference, method(every, REFERENCE))),
    ]
    if method(every, CEILING):
        columns.append(Column("share of the gap", partial(_share_of_gap, every)))
    if any(results.by_seed(RAW_DISTANCE) for results in every):
        columns += [
            Column("by raw weights", partial(_mean, RAW_DISTANCE)),
            Column("rank (raw)", partial(_ranks, every)),
        ]
    return columns


def _against_reference(reference: MethodResults | None, results: MethodResults) -> str:
    if reference is None or results is reference:
        return ""
    pair = Paired.of(results.by_seed(), reference.by_seed())
    return pair.text if pair else ""


def _share_of_gap(every: Sequence[MethodResults], results: MethodResults) -> str:
    found = [method(every, REFERENCE), results, method(every, CEILING)]
    by_seed = [one.by_seed() for one in found if one]
    seeds = set.intersection(*map(set, by_seed))
    if len(by_seed) < len(found) or not seeds:
        return ""
    reference, ours, ceiling = (fmean(values[seed] for seed in seeds) for values in by_seed)
    return "" if reference == ceiling else f"{(reference - ours) / (reference - ceiling):.0%}"


def _ranks(every: Sequence[MethodResults], results: MethodResults) -> str:
    """Such as ``1 (4)``: the rank by averaged weights, and the one by raw weights."""
    texts = []
    for name in (DISTANCE, RAW_DISTANCE):
        seeds = shared_seeds(every, name)
        having = [values for one in every if (values := one.by_seed(name))]
        sums = [sum(values[seed] for seed in seeds) for values in having]
        own = results.by_seed(name)
        if not seeds or not own:
            texts.append("-")
            continue
        ours = sum(own[seed] for seed in seeds)
        texts.append(str(1 + len([other for other in sums if other < ours])))
    return "{} ({})".format(*texts)


def scale(every: Sequence[MethodResults]) -> Iterator[str]:
    """What gives the distances a scale: those of real images, and whether training has ended."""
    runs = [run for results in every for run in results.runs]
    for name, title in _ANCHORS.items():
        if found := [run.anchors[name] for run in runs if name in run.anchors]:
            yield f"{title} have a Frechet distance of {fmean(found):.1f}"
    reference = method(every, REFERENCE)
    if reference is None or (fall := _last_quarter(reference)) is None:
        return
    yield f"{reference.method.title}'s distance changed by {fall:+.1%} over the last quarter"


def _last_quarter(results: MethodResults) -> float | None:
    """The mean distance's relative change since three quarters of the cloud rounds."""
    rounds = results.config.schedule.intervals
    points = [
        {point.cloud_rounds: point.distance for point in run.curve if point.distance is not None}
        for run in results.runs
    ]
    if rounds % 4 or not points or not all({rounds, 3 * rounds // 4} <= p.keys() for p in points):
        return None
    before, end = (fmean(p[at] for p in points) for at in (3 * rounds // 4, rounds))
    return end / before - 1


def other_columns(every: Sequence[MethodResults]) -> list[Column]:
    """All further qualities; how far a kernel distance's own subsets spread is in the CSV."""
    shown = (DISTANCE, RAW_DISTANCE)
    names = [n for n in metrics_of(every) if n not in shown and not n.endswith("_std")]
    return [
        Column(name.replace("_", " ").replace(".", " ").capitalize(), partial(_mean, name))
        for name in names
    ]


def cost_columns(every: Sequence[MethodResults], plan: Plan) -> list[Column]:
    """What the methods cost."""
    columns = [
        Column(head, partial(_mean, name), partial(_mean_number, name))
        for name, (head, _) in _COSTS.items()
    ]
    reference = method(every, REFERENCE)
    if reference is not None:
        at = list(_COSTS).index("cloud_bytes") + 1
        columns[at:at] = [
            Column(heading, partial(_bytes_against, reference, times))
            for heading, times in (
                (f"against {REFERENCE} at equal cloud rounds", 1),
                (
                    f"against {REFERENCE} at the cloud in every edge round",
                    plan.common["schedule.edge_rounds"],
                ),
            )
        ]
    rounds = Column("cloud rounds", lambda results: str(results.config.schedule.intervals))
    return [rounds, *columns]


def _bytes_against(reference: MethodResults, times: int, results: MethodResults) -> str:
    """Of ``times`` the bytes of the reference's run with the same seeds, per cloud round.

    Totals would say the same where all have the same number of cloud rounds, but on a budget of
    bytes they are about equal.
    """
    if results is reference and times == 1:
        return ""
    theirs = {seed: times * value for seed, value in _bytes_per_round(reference).items()}
    pair = Paired.of(_bytes_per_round(results), theirs)
    return f"{pair.relative:+.1%}" if pair else ""


def _bytes_per_round(results: MethodResults) -> dict[int, float]:
    """Mean bytes of a cloud round over the cloud's links, by seed."""
    rounds = results.config.schedule.intervals
    return {seed: total / rounds for seed, total in results.by_seed("cloud_bytes").items()}


def _table(columns: Sequence[Column], every: Sequence[MethodResults]) -> str:
    columns = [Column("method", lambda results: results.method.title), *columns]
    rows = [[column.heading for column in columns]]
    rows += [[column.text(results) for column in columns] for results in every]
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    head, *lines = (f"| {' | '.join(row)} |" for row in escaped)
    return "\n".join([head, "|---" * len(columns) + "|", *lines])


def _mean_number(name: str, results: MethodResults) -> float | None:
    return results.mean_and_spread(name)[0]


def _mean(name: str, results: MethodResults) -> str:
    mean, spread = results.mean_and_spread(name)
    if mean is None:
        return "-"
    if name in _COSTS:
        return _COSTS[name][1](mean)
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"


def changes(every: Sequence[MethodResults]) -> Iterator[str]:
    """Pairs of methods that differ in what gives the second its name, all else being equal."""
    for results in every:
        own = results.method
        # One that builds on a variant of the tuned method differs from that in its own entry only.
        like = method(every, (own.base or own.tuned_like or "") if own.tuned_like else "")
        pair = Paired.of(like.by_seed(), results.by_seed()) if like else None
        if like and pair:
            yield f"{like.method.title} against {results.method.title}: {pair.text}"


def protocol(every: Sequence[MethodResults]) -> list[str]:
    """How the runs were evaluated; says so where that was not alike."""
    lines = ["sampler DDIM, eta 0, the same noise for all; EMA weights unless the column says raw"]
    found = defaultdict(list)
    for results in every:
        for run in results.runs:
            found[_joined(run.protocol)].append(f"{results.method.name} seed {run.seed}")
    if len(found) == 1:
        return [*lines, *found]
    if found:
        lines.append("**the runs were NOT all evaluated alike; do not compare their distances:**")
    return lines + [f"{text}: {', '.join(runs)}" for text, runs in found.items()]


def own_settings(every: Sequence[MethodResults]) -> Iterator[str]:
    """What each method sets that another one sets otherwise."""
    keys = differing(every)
    for results in every:
        own = ", ".join(f"{key} = {results.settings.get(key)!r}" for key in keys)
        title = f"{results.method.title} ({results.method.reference})"
        yield f"{title}: {own or 'nothing of its own'}"


def common_settings(every: Sequence[MethodResults], plan: Plan) -> list[tuple[str, Any]]:
    """What all methods have alike; what is left to the preset ("") stands in no list."""
    differ = set(differing(every))
    return [
        (key, value)
        for key, value in sorted(plan.common.items())
        if key not in differ and value != ""
    ]


def origins(every: Sequence[MethodResults]) -> list[str]:
    """Versions, commits and machines of the runs, and their splits of the data."""
    runs = [run for results in every for run in results.runs]
    origins = Counter(_joined(run.origin) for run in runs)
    splits = {run.seed: run.partition for run in runs if run.partition}
    lines = [f"{count} run(s): {text}" for text, count in origins.items()]
    return lines + [f"split of seed {seed}: {name}" for seed, name in sorted(splits.items())]


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _list(title: str, lines: Iterable[str]) -> str:
    found = [f"- {line}" for line in lines]
    return "\n".join([f"## {title}", "", *found]) if found else ""
