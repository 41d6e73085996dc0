"""``report.html`` of a comparison: the tables, curves and samples of all methods in one file."""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from statistics import fmean

from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedphd.deploy.compare import table
from fedphd.deploy.compare.plan import Plan
from fedphd.deploy.compare.plots import AXES, draw_curves
from fedphd.deploy.compare.results import (
    DISTANCE,
    REFERENCE,
    MethodResults,
    mean_and_spread,
    shared_seeds,
)
from fedphd.deploy.compare.rows import Rows
from fedphd.deploy.launch.render import human_bytes
from fedphd.deploy.report.figures import DASHES, MUTED, NUM_SERIES, Canvas, Chart, series, style
from fedphd.deploy.report.page import render
from fedphd.deploy.report.pictures import BUDGET_BYTES, Picture, embedded

# Samples of so many seeds stand side by side.
_MOST_SEEDS = 5


def comparison_page(
    every: Sequence[MethodResults],
    plan: Plan,
    rows: Rows,
    *,
    command: str,
    left_out: Iterable[str],
    tuning: str,
) -> str:
    """The page; the arguments are as in ``deploy/compare/table.py: to_markdown``."""
    tables = (
        ("Quality", table.quality_columns(every)),
        ("Other measures", table.other_columns(every)),
        ("Costs", table.cost_columns(every, plan)),
    )
    with style():
        curves = [*_curves(every)]
    values = {
        "title": "Methods compared",
        "now": time.time(),
        "place": rows.out.resolve().name,
        "every": every,
        "lead": _lead(every),
        "budget": table.budget(plan),
        "tables": [(title, columns) for title, columns in tables if columns],
        "scale": [*table.scale(every)],
        "notes": table.NOTES,
        "missing": [*left_out, *table.missing(every)],
        "failures": table.failures(every),
        "changes": [*table.changes(every)],
        "tuning": tuning,
        "protocol": table.protocol(every),
        "own": [*table.own_settings(every)],
        "origins": [*table.origins(every), f"written by {command}"],
        "common": table.common_settings(every, plan),
        "curves": curves,
        "samples": _samples(every, rows),
    }
    return render("compare.html", values)


def _lead(every: Sequence[MethodResults]) -> str:
    """Which method has the least distance over the seeds that all have, in a sentence, or ""."""
    seeds = shared_seeds(every)
    # By name: two methods of somebody's own may have the same title.
    of_seeds = {one.method.name: one.by_seed() for one in every if one.by_seed()}
    if not seeds:
        return ""
    found = {
        name: mean_and_spread([values[seed] for seed in seeds]) for name, values in of_seeds.items()
    }
    titles = {one.method.name: one.method.title for one in every}
    best = min(found, key=lambda name: found[name][0])
    mean, spread = found[best]
    text = f"{titles[best]} has the least Frechet distance, {mean:.1f}"
    if spread is not None:
        text += f" \u00b1 {spread:.1f}"
    if REFERENCE in found and best != REFERENCE:
        text += f"; {titles[REFERENCE]} has {found[REFERENCE][0]:.1f}"
    if any(len(values) > len(seeds) for values in of_seeds.values()):
        named = ", ".join(map(str, seeds))
        text += f", over the seeds that all methods have ({named})"
    return f"{text}."


def _curves(every: Sequence[MethodResults]) -> Iterator[Chart]:
    anchors = [run.anchors["real"] for one in every for run in one.runs if "real" in run.anchors]
    looks = [(series(n), dash) for dash in DASHES for n in range(NUM_SERIES)]
    for kind in AXES:
        canvas = Canvas(height=3.6)
        if not draw_curves(canvas.axes, every, kind, cycle(looks)):
            return
        if anchors:
            canvas.axes.axhline(fmean(anchors), color=MUTED, lw=1, ls=":", label="real images")
        canvas.legend(columns=2)
        canvas.axes.set_ylabel("")
        canvas.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if kind == "cloud-bytes":
            canvas.axes.xaxis.set_major_locator(MaxNLocator(5))
            canvas.axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: human_bytes(n)))
        ends = [
            f"{one.method.title} {mean:.1f}"
            for one in every
            if (mean := one.mean_and_spread(DISTANCE)[0]) is not None
        ]
        yield canvas.chart(
            f"curves-{kind}",
            title=f"Frechet distance by {AXES[kind][0]}",
            alt=f"Frechet distance by {AXES[kind][0]}, a line per method, mean over seeds. In the "
            f"end: {', '.join(ends)}.",
            note="Mean over seeds, and one standard deviation. Less is better; the scale is one of "
            "powers.",
        )


def _samples(
    every: Sequence[MethodResults], rows: Rows
) -> list[tuple[str, list[tuple[int, Picture]]]]:
    """The last samples of each method's first seeds."""
    files = [
        (
            one.method.title,
            [(run.seed, rows.picture(run)) for run in one.runs if rows.picture(run).exists()],
        )
        for one in every
    ]
    shown = [(title, found[:_MOST_SEEDS]) for title, found in files if found]
    share = BUDGET_BYTES // max(1, sum(len(found) for _, found in shown))
    return [
        (title, [(seed, embedded(file, share)) for seed, file in found]) for title, found in shown
    ]
