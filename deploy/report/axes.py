"""Axes of intervals, shares, seconds and bytes: one unit on each, and no tick that was rounded."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedphd.deploy.report.figures import MUTED
from fedphd.deploy.report.record import RunRecord

# A step of 2.5 would be written as 2 or 3.
_STEPS = (1, 2, 5, 10)
_TIMES = ((7200.0, 3600.0, "hours"), (120.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
# Of a line of small words, as a share of the height of the axes.
_LINE = 0.075
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def over_intervals(axes: Axes, record: RunRecord, *, bars: bool = False) -> None:
    """An axis of intervals, with the pruning on it: after an interval's value, or its bar."""
    axes.set_xlabel("interval (cloud round)")
    if not bars:
        left, right = axes.get_xlim()
        axes.set_xlim(min(0, left), max(right, len(record.intervals), 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if record.pruned and record.pruned.interval:
        at = record.pruned.interval + 0.5 * bars
        axes.axvline(at, color=MUTED, lw=1, ls="--", zorder=1)
        axes.annotate(
            "pruned", (at, 1.0), (3, -3), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", fontsize=8.4, color=MUTED,
        )  # fmt: skip


def shares(axes: Axes) -> None:
    """Percent beside the axes."""
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}%"))


def seconds(axes: Axes, most: float) -> float:
    """The unit of an axis of times up to ``most`` seconds, which it is named for; in seconds."""
    unit, name = next((unit, name) for least, unit, name in _TIMES if most >= least)
    return _unit(axes, unit, name)


def sizes(axes: Axes, most: float) -> float:
    """The unit of an axis of up to ``most`` bytes, which it is named for; in bytes."""
    unit, name = next((pair for pair in _SIZES if most >= pair[0]), _SIZES[-1])
    return _unit(axes, unit, name)


def _unit(axes: Axes, unit: float, name: str) -> float:
    axes.set_ylabel(name)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    return unit


def labels_beside(axes: Axes, texts: Sequence[tuple[float, str]]) -> None:
    """Words right of the axes at heights of its data, apart from one another.

    To be called when the limits of the axes are final.
    """
    scale, (bottom, top) = axes.transScale, axes.get_ylim()
    low, high = (float(scale.transform((0, value))[1]) for value in (bottom, top))
    least = 0.0
    for value, text in sorted(texts):
        at = (float(scale.transform((0, value))[1]) - low) / (high - low)
        least = max(at, least)
        axes.annotate(
            text, (1.0, least), (4, 0), xycoords="axes fraction", textcoords="offset points",
            va="center", fontsize=8.4, color=MUTED, annotation_clip=False,
        )  # fmt: skip
        least += _LINE
