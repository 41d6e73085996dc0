"""Plots of quality against what it cost, and all methods' samples in one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fedphd.deploy.compare.results import Outcome, Point, mean_and_spread

SAMPLES = "samples.png"
_AXES: dict[str, tuple[str, Callable[[Point], float]]] = {
    "rounds": ("cloud rounds", lambda point: float(point.cloud_rounds)),
    "cloud-bytes": ("bytes over the cloud's links", lambda point: float(point.cloud_bytes)),
    "compute": ("training FLOPs of all clients", lambda point: point.training_flops),
}
_MARKERS = "osD^vP*X<>"
_INCHES = (7.0, 4.5)
_DPI = 120


def draw_all(outcomes: Sequence[Outcome], out: Path) -> list[Path]:
    """Draw what the results allow into ``out``; returns the files.

    Without distances there are no curves, without finished runs no samples.
    """
    curves = [out / f"quality-{kind}.png" for kind in _AXES]
    drawn = [path for path, kind in zip(curves, _AXES, strict=True) if _curve(outcomes, kind, path)]
    grids = out / "sample-grids.png"
    return [*drawn, *([grids] if _grids(outcomes, grids) else [])]


def mean_curve(
    outcome: Outcome, horizontal: Callable[[Point], float]
) -> list[tuple[float, float, float]]:
    """(mean x, mean distance, its spread or 0) per evaluation that all runs of a method have."""
    by_round: dict[int, list[Point]] = {}
    for result in outcome.results:
        for point in result.curve:
            if point.distance is not None:
                by_round.setdefault(point.cloud_rounds, []).append(point)
    curve = []
    for _, points in sorted(by_round.items()):
        if len(points) == len(outcome.results):
            mean, spread = mean_and_spread([float(p.distance or 0.0) for p in points])
            x, _ = mean_and_spread([horizontal(point) for point in points])
            curve.append((x, mean, spread or 0.0))
    return curve


def _curve(outcomes: Sequence[Outcome], kind: str, path: Path) -> bool:
    label, horizontal = _AXES[kind]
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    drawn = False
    for number, outcome in enumerate(outcomes):
        curve = mean_curve(outcome, horizontal)
        if not curve:
            continue
        drawn = True
        x, mean, spread = (np.array(column) for column in zip(*curve, strict=True))
        seeds = len(outcome.results)
        (line,) = axes.plot(
            x, mean, marker=_MARKERS[number % len(_MARKERS)],
            label=f"{outcome.title} ({seeds} seed{'s' if seeds > 1 else ''})",
        )  # fmt: skip
        axes.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
    if not drawn:
        return False
    axes.set_xlabel(label)
    axes.set_ylabel("Frechet distance (EMA), log scale")
    axes.set_yscale("log")
    if kind == "rounds":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    _save(figure, path)
    return True


def _grids(outcomes: Sequence[Outcome], path: Path) -> bool:
    """The final samples: a row per method, a column per seed."""
    seeds = sorted({result.seed for outcome in outcomes for result in outcome.results})
    rows = [outcome for outcome in outcomes if outcome.results]
    if not rows:
        return False
    figure = Figure(
        figsize=(3.0 * len(seeds) + 0.5, 3.2 * len(rows)), dpi=_DPI, layout="constrained"
    )
    places = figure.subplots(len(rows), len(seeds), squeeze=False)
    for outcome, row in zip(rows, places, strict=True):
        by_seed = {result.seed: result for result in outcome.results}
        for seed, axes in zip(seeds, row, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{outcome.title}, seed {seed}", fontsize="small")
            result = by_seed.get(seed)
            file = result.folder / SAMPLES if result else None
            if file is None or not file.exists():
                axes.text(0.5, 0.5, "missing", ha="center", va="center")
                continue
            with Image.open(file) as picture:
                axes.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
    _save(figure, path)
    return True


def _save(figure: Figure, path: Path) -> None:
    # Agg draws without a display.
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
