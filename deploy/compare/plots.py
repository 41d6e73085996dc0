"""Plots of quality against what it cost, and all methods' samples in one picture."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fedphd.deploy.compare.results import MethodResults, mean_and_spread
from fedphd.deploy.compare.rows import CurvePoint, Rows

AXES: dict[str, tuple[str, Callable[[CurvePoint], float]]] = {
    "rounds": ("cloud rounds", lambda point: float(point.cloud_rounds)),
    "cloud-bytes": ("bytes over the cloud's links", lambda point: float(point.cloud_bytes)),
    "compute": ("training FLOPs of all clients", lambda point: point.training_flops),
}
_MARKERS = "osD^vP*X<>hd"
# The ten colours of matplotlib come again with other lines.
_STYLES = [style for style in ("-", "--", ":", "-.") for _ in range(10)]
_DPI = 120


def draw_all(every: Sequence[MethodResults], rows: Rows) -> list[Path]:
    """Draw beside ``rows``; returns the files.

    There are no curves without distances, and no grids without runs.
    """
    out = rows.out
    curves = [path for kind in AXES if _curves(every, kind, path := out / f"quality-{kind}.png")]
    grids = out / "sample-grids.png"
    return [*curves, *([grids] if _grids(every, rows, grids) else [])]


def plain(title: str) -> str:
    """A title that matplotlib shows as it is: no formulas between dollars."""
    return title.replace("$", r"\$")


def mean_curve(
    results: MethodResults, horizontal: Callable[[CurvePoint], float]
) -> list[tuple[float, float, float]]:
    """(mean x, mean distance, its spread or 0) per evaluation that all runs of a method have."""
    by_round: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for point in (point for run in results.runs for point in run.curve):
        if point.distance is not None:
            by_round[point.cloud_rounds].append((horizontal(point), point.distance))
    curve = []
    for _, pairs in sorted(by_round.items()):
        if len(pairs) == len(results.runs):
            x, distances = zip(*pairs, strict=True)
            mean, spread = mean_and_spread(distances)
            curve.append((mean_and_spread(x)[0], mean, spread or 0.0))
    return curve


def _curves(every: Sequence[MethodResults], kind: str, path: Path) -> bool:
    """A line per method in a file; False if none has a distance."""
    figure = Figure(figsize=(9.0, 4.5), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    colours = [f"C{number}" for number in range(10)]
    if not draw_curves(axes, every, kind, zip(cycle(colours), _STYLES, strict=False)):
        return False
    axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path)
    return True


def draw_curves(
    axes: Axes, every: Sequence[MethodResults], kind: str, looks: Iterable[tuple[str, str]]
) -> bool:
    """A line per method, of the colours and line styles in ``looks``; False without a distance."""
    label, horizontal = AXES[kind]
    for results, marker, (colour, style) in zip(every, cycle(_MARKERS), looks, strict=False):
        if curve := mean_curve(results, horizontal):
            x, mean, spread = np.array(curve).T
            seeds = len(results.runs)
            name = f"{plain(results.method.title)} ({seeds} seed{'s' if seeds > 1 else ''})"
            axes.plot(x, mean, marker=marker, linestyle=style, color=colour, label=name)
            axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
    if not axes.lines:
        return False
    axes.set(xlabel=label, ylabel="Frechet distance (EMA), log scale", yscale="log")
    if kind == "rounds":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return True


def _grids(every: Sequence[MethodResults], rows: Rows, path: Path) -> bool:
    """The final samples: a row per method, a column per seed; False without a finished run."""
    shown = [results for results in every if results.runs]
    if not shown:
        return False
    seeds = sorted({run.seed for results in shown for run in results.runs})
    size = (2.0 * len(seeds) + 0.5, 2.2 * len(shown))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    places = figure.subplots(len(shown), len(seeds), squeeze=False)
    for results, row in zip(shown, places, strict=True):
        files = {run.seed: rows.picture(run) for run in results.runs}
        for seed, axes in zip(seeds, row, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{plain(results.method.title)}, {seed}", fontsize="xx-small")
            if seed in files and files[seed].exists():
                with Image.open(files[seed]) as picture:
                    axes.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
            else:
                axes.text(0.5, 0.5, "missing", ha="center", va="center")
    figure.savefig(path)
    return True
