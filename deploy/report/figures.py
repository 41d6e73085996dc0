"""Figures as SVG that takes its colours and its font from the page around it.

matplotlib draws with stand-ins for colours, which become the page's CSS variables: so a figure is
right in light and dark, on paper, and in the reader's own font.
"""

import io
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stand-ins, and the variables of ``templates/style.css`` that they become.
INK: Final = "#010101"
MUTED: Final = "#020202"
LINE: Final = "#030303"
PAPER: Final = "#040404"
BAD: Final = "#050505"
_VARIABLES: Final = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper", BAD: "bad"}
NUM_SERIES: Final = 8
SERIES: Final = tuple(f"#0a0a{number:02d}" for number in range(NUM_SERIES))
_COLOURS: Final = {
    **{colour: f"var(--{name})" for colour, name in _VARIABLES.items()},
    **{colour: f"var(--s{number})" for number, colour in enumerate(SERIES)},
}
MARKERS: Final = "osD^vP*X"
DASHES: Final = ("-", "--", ":", "-.")

_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedphd",
    "font.size": 9.6,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    # Room for a word above the data.
    "axes.ymargin": 0.13,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}
# Inches at 72 points: on a page half as wide as usual its text is as large as the page's.
WIDTH: Final = 5.2
HEIGHT: Final = 3.0


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
        svg: to be put into the page.
        alt: what it shows, for those who do not see it.
        title, note: what stands above and below it.
        wide: it takes the whole width, and scrolls on a small screen.
    """

    svg: str
    alt: str
    title: str
    note: str = ""
    wide: bool = False


def style() -> AbstractContextManager[None]:
    """Within it figures are drawn in the page's style."""
    return mpl.rc_context(_STYLE)


class Canvas:
    """A figure that is being drawn; to be used within ``style``."""

    def __init__(
        self, width: float = WIDTH, height: float = HEIGHT, rows: int = 1, columns: int = 1
    ) -> None:
        self.figure = Figure(figsize=(width, height), layout="constrained")
        grid = self.figure.subplots(rows, columns, sharey=True, squeeze=False)
        self.all_axes: list[Axes] = [axes for row in grid for axes in row]

    @property
    def axes(self) -> Axes:
        """The only axes, or the first."""
        return self.all_axes[0]

    def legend(self, columns: int = 4) -> None:
        """Say above the figure what its colours are, if it has any names."""
        handles, labels = self.axes.get_legend_handles_labels()
        if labels:
            self.figure.legend(
                handles, labels, loc="outside upper left", ncols=columns, fontsize=9,
                handlelength=1.6, columnspacing=1.3, borderaxespad=0.2,
            )  # fmt: skip

    def chart(self, key: str, *, alt: str, title: str, note: str = "", wide: bool = False) -> Chart:
        """The finished figure; ``key`` is its own on the page."""
        text = io.StringIO()
        self.figure.savefig(text, format="svg", transparent=True)
        return Chart(inline_svg(text.getvalue(), key, alt), alt, title, note, wide)


def series(number: int) -> str:
    """The colour of a series, such as an edge."""
    return SERIES[number % NUM_SERIES]


def inline_svg(text: str, key: str, alt: str) -> str:
    """matplotlib's SVG for a page: no address, no name that another figure has, alternative text.

    ``key`` begins the names, ``alt`` is what a screen reader says instead.
    """
    root = ElementTree.fromstring(text)
    _drop(root, "metadata", "style")
    used = {found for element in root.iter() for found in _references(element.attrib)}
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib.clear()
        element.attrib.update({n: _adapted(n, v, key) for n, v in attributes.items()})
    # Its size is the page's; so is the font.
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": alt})
    return _coloured(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _drop(element: ElementTree.Element, *names: str) -> None:
    for child in list(element):
        if _local(child.tag) in names:
            element.remove(child)
        else:
            _drop(child, *names)


def _references(attributes: Mapping[str, str]) -> list[str]:
    found = [v[1:] for n, v in attributes.items() if _local(n) == "href" and v[:1] == "#"]
    return found + re.findall(r"url\(#([^)]+)\)", " ".join(attributes.values()))


def _adapted(name: str, value: str, key: str) -> str:
    if name == "id":
        return f"{key}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{key}-{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{key}-", value)
    # What matplotlib measured with is not the page's font.
    value = re.sub(r"font: (?:\w+ )*([\d.]+)px [^;]+", r"font-size: \1px", value)
    return re.sub(r"font-family: [^;]+;? ?", "", value)


def _coloured(svg: str) -> str:
    return re.sub("|".join(_COLOURS), lambda found: _COLOURS[found[0]], svg)
