"""What is kept of finished runs: a line of ``rows.jsonl`` and a picture each.

A run's folder is large and stays where it was made. Its row is small enough to be committed, and
all that the tables and pictures need; a run that has one is not run again.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError

from fedphd.common.config.roles import explain
from fedphd.common.errors import ConfigError
from fedphd.common.files import replaced

ROWS = "rows.jsonl"
PICTURES = "samples"


class CurvePoint(BaseModel, extra="forbid"):
    """The Frechet distance of an evaluation, and what had been spent by then.

    Bytes are those over the cloud's links, FLOPs those of all clients together. No distance
    without reference data; ``raw`` is that of the raw weights, where they were measured.
    """

    cloud_rounds: int
    cloud_bytes: int
    training_flops: float
    distance: float | None
    raw: float | None = None


class Row(BaseModel, extra="forbid"):
    """One finished run.

    Attributes:
        tuning: whether it only served to choose settings, so that no table of methods has it.
        settings: those that decide its numbers and differ from the comparison's common ones.
        quality: every real number of the last evaluation, nested ones with dotted names.
        costs: parameters, MACs, bytes, FLOPs and seconds.
        anchors: Frechet distances of real images, by what they are.
        protocol: how it was made: features, number of samples, steps and the like.
        origin: version, commit and machine that the run recorded.
        partition: name of the clients' split of the data, if the run recorded it.
        failures: how often a client, or an edge, was left out of what it should have taken part
            in; None in rows of before this was counted.
    """

    name: str
    method: str
    seed: int
    tuning: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)
    quality: dict[str, float]
    costs: dict[str, float]
    anchors: dict[str, float] = Field(default_factory=dict)
    curve: list[CurvePoint]
    protocol: dict[str, Any]
    origin: dict[str, str]
    partition: str | None
    failures: int | None = None


class Rows:
    """The rows in a comparison's folder, by the names of their runs."""

    def __init__(self, out: Path, rows: Iterable[Row] = ()) -> None:
        self.out = out
        self._rows = {row.name: row for row in rows}

    @classmethod
    def read(cls, out: Path) -> Self:
        """What ``out`` has, perhaps nothing; raises ConfigError that names a damaged line."""
        path, rows = out / ROWS, []
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(Row.model_validate_json(line))
            except ValidationError as error:
                raise ConfigError(explain(Row, error, f"{path}, line {number}")) from error
        return cls(out, rows)

    def find(self, name: str) -> Row | None:
        """The row of a run, if there is one."""
        return self._rows.get(name)

    @property
    def all(self) -> Mapping[str, Row]:
        """Every row by its run's name."""
        return self._rows

    def keep(self, rows: Iterable[tuple[Row, Path | None]]) -> None:
        """Add rows, each with its picture of samples if it has one, and store them all."""
        for row, picture in rows:
            self._rows[row.name] = row
            if picture is not None and picture.exists():
                place = self.picture(row)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, place)
        self.out.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{self._rows[name].model_dump_json()}\n" for name in sorted(self._rows))
        with replaced(self.out / ROWS) as beside:
            beside.write_text(text, encoding="utf-8")

    def picture(self, row: Row) -> Path:
        """Where the samples of a run are kept."""
        return self.out / PICTURES / f"{row.name}.png"
