"""Labels that do not come with the images: from attributes, or from a file of labels.

CelebA gives each image 40 attributes and no class. ``data.label_attributes`` makes a class of
some of them: each is one binary digit, the first the most significant, so ``["Male", "Young"]``
gives 2 * Male + Young: 0 old women, 1 young women, 2 old men, 3 young men.
"""

import csv
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedphd.common.config.data import DataConfig
from fedphd.common.errors import ConfigError

logger = logging.getLogger(__name__)

Indices = NDArray[np.int64]
COLUMNS = ("position", "file", "label")
_SHOWN = 3
_BITS = {"1": 1, "-1": 0, "0": 0}


def read_labels(config: DataConfig, names: Sequence[str] | None, num_images: int) -> Indices:
    """Labels of all images, (num_images,), int64, from the label or attribute file of ``config``.

    ``names`` are the images' file names in order; None where the source has none.

    Raises:
        ConfigError: the file is missing, malformed, or lacks an attribute or an image.
    """
    if config.label_file is not None:
        return _from_label_file(Path(config.label_file).expanduser(), names, num_images)
    if names is None:
        raise ConfigError(
            f"attribute_file = {config.attribute_file!r} finds images by their file names, but "
            f"source = {config.source!r} has none; use a folder of image files"
        )
    path = Path(str(config.attribute_file)).expanduser()
    classes = read_attributes(path, config.label_attributes or ())
    if without := [name for name in names if name not in classes]:
        raise ConfigError(
            f"attribute_file = {str(path)!r} has no row for {len(without)} of {len(names)} images: "
            f"{_some(without)}; add their rows, or remove the images"
        )
    if unused := len(classes) - len(set(names)):
        logger.warning("attribute_file = %r: %d rows have no image here", str(path), unused)
    return np.array([classes[name] for name in names], dtype=np.int64)


def read_attributes(path: Path, wanted: Sequence[str]) -> dict[str, int]:
    """The class of every file that an attribute list names.

    Args:
        path: CelebA's own ``list_attr_celeba.txt`` (number of rows, names of the attributes,
            then ``FILE 1 -1 ...``), or a CSV file with a header whose first column is the file.
        wanted: attributes, each a binary digit of the class, the most significant first.

    Raises:
        ConfigError: the file is unreadable or malformed, or lacks an attribute.
    """
    rows = _rows(path)
    first = next(rows, (0, []))[1]
    announced = int(first[0]) if len(first) == 1 and first[0].isdecimal() else None
    header = next(rows, (0, []))[1] if announced is not None else first[1:]
    if unknown := [name for name in wanted if name not in header]:
        raise ConfigError(
            f"label_attributes: attribute_file = {str(path)!r} lacks {', '.join(unknown)}; it has "
            f"{', '.join(header) or 'no attribute'}"
        )
    columns = [1 + header.index(name) for name in wanted]
    classes: dict[str, int] = {}
    for number, row in rows:
        values = [row[column] for column in columns] if len(row) == 1 + len(header) else []
        if not values or any(value not in _BITS for value in values):
            raise ConfigError(
                f"attribute_file = {str(path)!r}, line {number}: must be a file name and "
                f"{len(header)} values of 1 or -1"
            )
        classes[row[0]] = sum(_BITS[v] << i for i, v in enumerate(reversed(values)))
    if announced is not None and announced != len(classes):
        raise ConfigError(
            f"attribute_file = {str(path)!r} announces {announced} rows but has {len(classes)}; "
            "it is incomplete"
        )
    return classes


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields of an attribute list, separated by commas or white space."""
    lines = _lines(path, "attribute_file")
    separator = "," if lines and "," in lines[0] else None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, [field.strip() for field in line.split(separator)]


def _from_label_file(path: Path, names: Sequence[str] | None, num_images: int) -> Indices:
    rows = list(csv.DictReader(_lines(path, "label_file")))
    where = f"label_file = {str(path)!r}"
    if rows and set(COLUMNS) - rows[0].keys():
        raise ConfigError(f"{where}: its first line must be {','.join(COLUMNS)}")
    if len(rows) != num_images:
        raise ConfigError(
            f"{where} has {len(rows)} labels, but the data set has {num_images} images; make it "
            "again from this data (fedphd pseudo-labels)"
        )
    labels = np.empty(num_images, dtype=np.int64)
    for position, row in enumerate(rows):
        if row["position"] != str(position) or not (row["label"] or "").isdecimal():
            raise ConfigError(
                f"{where}, line {position + 2}: must be {position},FILE,LABEL with a label of 0 "
                "or more"
            )
        if names is not None and row["file"] != names[position]:
            raise ConfigError(
                f"{where}, line {position + 2}: names {row['file']!r}, but image {position} is "
                f"{names[position]!r}; make it again from this data (fedphd pseudo-labels)"
            )
        labels[position] = int(row["label"])
    return labels


def write_labels(path: Path, labels: Sequence[int], names: Sequence[str] | None) -> None:
    """Write a file that ``data.label_file`` reads; raises ConfigError if that is impossible."""
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for position, label in enumerate(labels):
                writer.writerow([position, names[position] if names else "", int(label)])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def _lines(path: Path, setting: str) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{setting} = {str(path)!r}: cannot be read: {reason}") from error


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
