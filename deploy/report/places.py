"""Who trained where, and which labels each edge held."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator

from fedphd.deploy.report.axes import over_intervals, shares
from fedphd.deploy.report.figures import (
    BAD,
    DASHES,
    HEIGHT,
    INK,
    LINE,
    MARKERS,
    MUTED,
    WIDTH,
    Canvas,
    Chart,
    series,
)
from fedphd.deploy.report.record import RunRecord

_MOST_PANELS = 12
# With more cells the picture is drawn in pixels, or the page would grow too large.
_MOST_CELLS = 4000
_MOST_NAMES = 45
_LEGEND = 16


def balance(record: RunRecord) -> Iterator[Chart]:
    """Which labels each edge held beside the target, and how far off it was over the run."""
    held: dict[str, list[tuple[int, list[float]]]] = defaultdict(list)
    for interval in record.intervals:
        for edge, figures in interval.edges.items():
            if figures.label_distribution and any(figures.trained):
                held[edge].append((interval.interval, figures.label_distribution))
    if not held or record.config is None:
        return
    target = np.array(record.config.target_distribution)
    edges = [edge for edge in record.edges if edge in held]
    yield _held_labels(edges, held, target)
    canvas, texts, most = Canvas(), [], 0.01
    for number, edge in enumerate(edges):
        far = [(at, _distance(one, target)) for at, one in held[edge]]
        canvas.axes.plot(
            *zip(*far, strict=True), color=series(number), marker=MARKERS[number % len(MARKERS)],
            ls=DASHES[number // len(MARKERS) % len(DASHES)], label=edge,
        )  # fmt: skip
        texts.append(f"{edge} {fmean(value for _, value in far):.0%}")
        most = max(most, *(value for _, value in far))
    canvas.axes.set_ylim(0, 1.15 * most)
    shares(canvas.axes)
    canvas.axes.set_ylabel("labels to exchange")
    if len(edges) <= _LEGEND:
        canvas.legend()
    over_intervals(canvas.axes, record)
    yield canvas.chart(
        "imbalance",
        title="How far from the target",
        alt=f"Mean share of labels that an edge would have to exchange: {', '.join(texts)}.",
        note="The share of its labels that an edge would have to exchange to hold the target "
        "exactly (total variation distance). 0% is balanced.",
    )


def _distance(shares: Sequence[float], target: np.ndarray) -> float:
    return float(np.abs(np.array(shares) - target).sum() / 2)


def _held_labels(
    edges: Sequence[str], held: dict[str, list[tuple[int, list[float]]]], target: np.ndarray
) -> Chart:
    shown = edges[:_MOST_PANELS]
    columns = min(len(shown), 2)
    rows = -(-len(shown) // columns)
    canvas = Canvas(height=max(HEIGHT, 1.6 * rows + 0.2), rows=rows, columns=columns)
    at, texts = np.arange(len(target)), []
    for number, (edge, axes) in enumerate(zip(shown, canvas.all_axes, strict=False)):
        found = np.array([one for _, one in held[edge]])
        mean = found.mean(axis=0)
        axes.bar(at, mean, color=series(number), width=0.78)
        axes.vlines(at, found.min(axis=0), found.max(axis=0), color=INK, lw=1, alpha=0.55)
        axes.step(
            [-0.5, *at + 0.5], [*target, target[-1]], where="post", color=INK, lw=1.2, ls="--"
        )
        axes.set_title(edge, fontsize=10, loc="left")
        shares(axes)
        if len(target) <= 20:
            axes.set_xticks(at[:: 1 + (len(target) > 12)])
        texts.append(f"{edge} from {mean.min():.0%} to {mean.max():.0%} per class")
    for axes in canvas.all_axes[len(shown) :]:
        axes.set_visible(False)
    for axes in canvas.all_axes[::columns]:
        axes.set_ylabel("share of labels")
    for axes in canvas.all_axes[-columns:]:
        axes.set_xlabel("class")
    left_out = (
        f" {len(edges) - len(shown)} more edges are not drawn." if edges[len(shown) :] else ""
    )
    return canvas.chart(
        "labels",
        title="Labels that each edge held",
        alt=f"Mean share of each class at each edge: {'; '.join(texts)}. Target "
        f"{target.min():.0%} to {target.max():.0%}.{left_out}",
        note="Bars: mean over intervals. Thin lines: least and most. Dashed: the target."
        + left_out,
    )


def heat_map(record: RunRecord) -> Iterator[Chart]:
    """Clients by edge rounds, coloured by the edge at which each trained; failures are marked."""
    clients, rounds = record.client_names, record.members
    if not clients or not rounds:
        return
    row_of = {name: row for row, name in enumerate(clients)}
    cells: dict[str, list[tuple[int, int]]] = {edge: [] for edge in record.edges}
    failed = set()
    for at, by_edge in rounds.items():
        for edge, members in by_edge.items():
            cells[edge] += [(at, row_of[name]) for name in members.trained]
            failed |= {(at, row_of[name]) for name in members.left_out if name in row_of}
    canvas = Canvas(2 * WIDTH, min(9.0, 0.85 + 0.2 * len(clients)))
    axes = canvas.axes
    first, last = min(rounds), max(rounds)
    axes.set(xlim=(first - 0.5, last + 0.5), ylim=(len(clients) - 0.5, -0.5))
    trained = sum(map(len, cells.values()))
    if trained <= _MOST_CELLS:
        for number, (edge, places) in enumerate(cells.items()):
            _draw_cells(axes, places, edge, number)
    else:
        _draw_pixels(axes, cells, (first, last, len(clients)))
    if failed:
        x, y = zip(*sorted(failed), strict=True)
        axes.scatter(
            x, y, marker="x", s=26, lw=1.8, color=BAD, zorder=4,
            label="left out",
        )  # fmt: skip
    _heat_axes(axes, record, clients)
    if len(cells) <= _LEGEND:
        canvas.legend(columns=8)
    counts = ", ".join(f"{len(places)} at {edge}" for edge, places in cells.items())
    yield canvas.chart(
        "heat",
        title="Every edge round",
        alt=f"Where each of {len(clients)} clients trained in edge rounds {first} to {last}: "
        f"{trained} times, {counts}; {len(failed)} times one was left out.",
        note="A column is an edge round, a row a client"
        + ("." if record.is_flat else "; the colour is the edge that it chose.")
        + " Empty: it did not train.",
        wide=True,
    )


def _draw_cells(axes: Axes, places: Sequence[tuple[int, int]], edge: str, number: int) -> None:
    """A square for each place, all of an edge in one path."""
    if not places:
        return
    corners = np.array([(-0.44, -0.4), (0.44, -0.4), (0.44, 0.4), (-0.44, 0.4), (0, 0)])
    points = (np.array(places)[:, None, :] + corners).reshape(-1, 2)
    codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY] * len(places)
    axes.add_patch(
        PathPatch(Path(points, codes), color=series(number), lw=0, alpha=_alpha(number), label=edge)
    )


def _alpha(number: int) -> float:
    """Edges beyond the number of colours are paler."""
    return (1.0, 0.6, 0.35)[number // 8 % 3]


# Of the pixels, which know no variables: as readable on white as on black.
_FIXED = ("#1f77b4", "#d9662b", "#1b9e77", "#b5579a", "#8a7a1f", "#5b6fd6", "#a33d3d", "#4c9aa8")


def _draw_pixels(
    axes: Axes, cells: dict[str, list[tuple[int, int]]], shape: tuple[int, int, int]
) -> None:
    first, last, rows = shape
    picture = np.full((rows, last - first + 1), np.nan)
    for number, places in enumerate(cells.values()):
        for at, row in places:
            picture[row, at - first] = number % len(_FIXED)
    axes.imshow(
        picture, cmap=ListedColormap(_FIXED), vmin=-0.5, vmax=len(_FIXED) - 0.5, aspect="auto",
        interpolation="none", extent=(first - 0.5, last + 0.5, rows - 0.5, -0.5),
    )  # fmt: skip
    for number, edge in enumerate(cells):
        axes.add_patch(PathPatch(Path([(0, 0)]), color=_FIXED[number % len(_FIXED)], label=edge))


def _heat_axes(axes: Axes, record: RunRecord, clients: Sequence[str]) -> None:
    """Intervals below, and their borders; clients' names beside."""
    per, rounds = record.edge_rounds, record.members
    intervals = sorted({(at - 1) // per + 1 for at in rounds})
    step = -(-len(intervals) // 30)
    shown = [interval for interval in intervals if (interval - 1) % step == 0]
    axes.xaxis.set_major_locator(FixedLocator([(i - 0.5) * per + 0.5 for i in shown]))
    axes.set_xticklabels([str(i) for i in shown])
    axes.set_xlabel(f"interval, of {per} edge round{'s' if per > 1 else ''} each")
    axes.grid(visible=False)
    for interval in intervals[1:]:
        axes.axvline((interval - 1) * per + 0.5, color=LINE, lw=0.8, zorder=0)
    if record.pruned and 0 < record.pruned.interval < intervals[-1]:
        axes.axvline(record.pruned.interval * per + 0.5, color=MUTED, lw=1.2, ls="--", zorder=3)
    if len(clients) <= _MOST_NAMES:
        axes.set_yticks(range(len(clients)), clients)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(clients)} clients")
    axes.spines["left"].set_visible(False)
