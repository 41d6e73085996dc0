"""``report.html``: a page on a run, one file that loads nothing and is readable without scripts."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from fedphd.common.files import replaced
from fedphd.deploy.launch.render import distance_name, human_bytes, human_seconds
from fedphd.deploy.report import costs, curves, figures, places, words
from fedphd.deploy.report.pictures import BUDGET_BYTES, Picture, embedded, thinned
from fedphd.deploy.report.record import RunRecord, when

logger = logging.getLogger(__name__)

REPORT: Final = "report.html"
_MOST_PROBLEMS = 50


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page from ``templates/``; a name that it asks for and ``values`` lacks is an error."""
    pages = Environment(
        loader=PackageLoader("fedphd.deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "bytes": human_bytes,
        "seconds": human_seconds,
        "at": words.at,
        "setting": _setting,
        "thousands": lambda number: f"{number:,}",
    }
    return pages.get_template(template).render({**values, "fedphd_version": version("fedphd")})


def _setting(value: object) -> str:
    """A setting's value as it is written in TOML, but for None."""
    if value is None:
        return "absent"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_setting, value))}]"
    return str(value)


def run_page(folder: Path) -> str:
    """The page on the run in ``folder``; raises ConfigError as ``RunRecord.read``."""
    record, now = RunRecord.read(folder), time.time()
    with figures.style():
        drawn = [*curves.quality(record), *curves.losses(record), *curves.told_classes(record)]
        # Two stand in a row: one that is left over has it for itself.
        drawn += curves.classes(record, wide=len(drawn) % 2 == 0)
        values = {
            "record": record,
            "title": folder.resolve().name,
            "now": now,
            "verdict": words.verdict(record, now),
            "tiles": words.tiles(record),
            "flops_convention": words.flops_convention(record),
            "frames": _frames(record),
            "curves": drawn,
            "tree": [(edge, record.rounds_at(edge).most_common()) for edge in record.edges],
            "heat_map": [*places.heat_map(record)],
            "problems": record.problems[:_MOST_PROBLEMS],
            "more_problems": len(record.problems[_MOST_PROBLEMS:]),
            "balance": [*places.balance(record)],
            "traffic": [*costs.traffic(record)],
            "interval_bytes": costs.bytes_by_interval(record),
            "times": [*costs.phases(record)],
            "layers": [*costs.layers(record)],
            "layer_rows": costs.in_order(record.pruned.layers) if record.pruned else [],
        }
    return render("run.html", values)


@dataclass(frozen=True)
class Frame:
    """Samples, when they were drawn, and how far they are from real ones, or why nobody knows."""

    when: str
    picture: Picture
    distance: str


def _frames(record: RunRecord) -> list[Frame]:
    """The grids of samples by interval, all of the same noise."""
    files = thinned([*filter(_is_grid, sorted((record.folder / "grids").glob("interval-*.png")))])
    share = BUDGET_BYTES // max(1, len(files))
    evaluated = {one.interval: one for one in record.evaluations}
    frames = []
    for file in files:
        interval = int(file.stem.partition("-")[2])
        distance = "drawn early, not measured"
        if found := evaluated.get(interval):
            distance = "no reference data, no distance"
            if found.frechet_distance is not None:
                distance = f"{distance_name(found)} {found.frechet_distance:.1f}"
        frames.append(Frame(when(interval), embedded(file, share), distance))
    return frames


def _is_grid(file: Path) -> bool:
    """Whether a file can be shown; says so if not, as of somebody's copy, or one that was cut."""
    try:
        if not file.stem.removeprefix("interval-").isdecimal():
            raise ValueError("its name has no interval's number")
        with Image.open(file) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        logger.warning("%s: is left out of the report: %s", file, error)
        return False
    return True


def write_page(path: Path, text: str) -> Path:
    """Store a page; readers see the old one or the new one."""
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page on the run in ``folder`` to ``out``, or into it; returns where.

    Raises ConfigError if there is no run, or it cannot be read; OSError if it cannot be written.
    """
    return write_page(out or folder / REPORT, run_page(folder))
