"""Labels that do not come with the images: from attributes, or from a file of labels.

CelebA gives each image 40 attributes and no class. ``data.label_attributes`` makes a class of
some of them: each is one binary digit, the first the most significant, so ``["Male", "Young"]``
gives 2 * Male + Young: 0 old women, 1 young women, 2 old men, 3 young men.
"""

import csv
import io
import logging
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedphd.common.config.data import DataConfig
from fedphd.common.errors import ConfigError
from fedphd.common.files import replaced

logger = logging.getLogger(__name__)

Indices = NDArray[np.int64]
COLUMNS = ("position", "file", "label")
# Far more than any run has; what is larger is a slip, and soon too large for an int64.
LARGEST_LABEL = 2**31 - 1
_SHOWN = 3
_BITS = {"1": 1, "-1": 0, "0": 0}


def read_labels(config: DataConfig, names: Sequence[str] | None, num_images: int) -> Indices:
    """Labels of all images, (num_images,), int64, from the label or attribute file of ``config``.

    ``names`` are the images' files in order, by their paths below the source; None where the
    source has none.

    Raises:
        ConfigError: the file is missing, malformed, or lacks an attribute or an image, or a row
            and an image cannot be told to belong together.
    """
    if config.label_file is not None:
        return _from_label_file(expanded(config.label_file), names, num_images)
    if names is None:
        raise ConfigError(
            f"attribute_file = {config.attribute_file!r} finds images by their file names, but "
            f"source = {config.source!r} has none; use a folder of image files"
        )
    path = expanded(str(config.attribute_file))
    classes = read_attributes(path, config.label_attributes or ())
    rows = _rows_of(names, list(classes), f"attribute_file = {str(path)!r}")
    if unused := len(classes) - len(rows):
        logger.warning("attribute_file = %r: %d rows have no image here", str(path), unused)
    return np.array([classes[row] for row in rows], dtype=np.int64)


def expanded(path: str) -> Path:
    """The path of data, whose ~ is a home folder; that of somebody unknown stays, to be missed."""
    return Path(os.path.expanduser(path))


def _rows_of(names: Sequence[str], rows: Sequence[str], where: str) -> list[str]:
    """The row of each of ``names``: that of its path, or the only one that may mean it.

    ``1.png`` may mean ``cats/1.png``, and ``faces/1.png`` the ``1.png`` of a source ``faces``;
    ``dogs/1.png`` is never ``cats/1.png``.

    Raises:
        ConfigError: an image has no row or several, or a row has several images; names them.
    """
    advice = "name files by their paths below the source"
    known, of_base = set(rows), defaultdict(list)
    for row in rows:
        of_base[posixpath.basename(row)].append(row)
    image_of: dict[str, str] = {}
    without: list[str] = []
    for name in names:
        alike = of_base[posixpath.basename(name)]
        fitting = [name] if name in known else [row for row in alike if _ends_alike(row, name)]
        if len(fitting) > 1:
            raise ConfigError(f"{where}: {_some(fitting)} may all mean {name!r}; {advice}")
        if not fitting:
            without.append(name)
        elif other := image_of.get(fitting[0]):
            raise ConfigError(f"{where}: {fitting[0]!r} may mean {other!r} or {name!r}; {advice}")
        else:
            image_of[fitting[0]] = name
    if without:
        raise ConfigError(
            f"{where} has no row for {len(without)} of {len(names)} images: "
            f"{_some(without)}; add their rows, or remove the images"
        )
    return list(image_of)


def _ends_alike(first: str, second: str) -> bool:
    """Whether one path is the end of the other."""
    short, long = sorted((first, second), key=len)
    return f"/{long}".endswith(f"/{short}")


def read_attributes(path: Path, wanted: Sequence[str]) -> dict[str, int]:
    """The class of every file that an attribute list names.

    Args:
        path: CelebA's own ``list_attr_celeba.txt`` (number of rows, names of the attributes,
            then ``FILE 1 -1 ...``), or a CSV file with a header whose first column is the file:
            its path below the source, or its name alone where that is enough.
        wanted: attributes, each a binary digit of the class, the most significant first.

    Raises:
        ConfigError: the file is unreadable or malformed, lacks an attribute, or names a file twice.
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
    line_of: dict[str, int] = {}
    for number, row in rows:
        values = [row[column] for column in columns] if len(row) == 1 + len(header) else []
        if not values or any(value not in _BITS for value in values):
            raise ConfigError(
                f"attribute_file = {str(path)!r}, line {number}: must be a file name and "
                f"{len(header)} values of 1 or -1"
            )
        file = posixpath.normpath(row[0])
        if file in line_of:
            raise ConfigError(
                f"attribute_file = {str(path)!r}, line {number}: names {file!r} again, after line "
                f"{line_of[file]}; keep one of them"
            )
        line_of[file] = number
        classes[file] = sum(_BITS[v] << i for i, v in enumerate(reversed(values)))
    if announced is not None and announced != len(classes):
        raise ConfigError(
            f"attribute_file = {str(path)!r} announces {announced} rows but has {len(classes)}; "
            "it is incomplete"
        )
    return classes


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields of an attribute list, separated by commas or white space."""
    text = _text(path, "attribute_file")
    if "," in text.partition("\n")[0]:
        yield from _csv_rows(text, f"attribute_file = {str(path)!r}")
        return
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            yield number, line.split()


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Last line numbers and fields of the rows of a CSV file that are not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        for row in reader:
            if any(field.strip() for field in row):
                yield reader.line_num, [field.strip() for field in row]
    except csv.Error as error:
        raise ConfigError(
            f"{where}, line {reader.line_num}: not CSV ({error}); quote fields with a comma or a "
            'quote in them, and double the quotes: "a ""b"", c"'
        ) from error


def _from_label_file(path: Path, names: Sequence[str] | None, num_images: int) -> Indices:
    where = f"label_file = {str(path)!r}"
    rows = list(_csv_rows(_text(path, "label_file"), where))
    header = rows.pop(0)[1] if rows else list(COLUMNS)
    if set(COLUMNS) - set(header):
        raise ConfigError(f"{where}: its first line must be {','.join(COLUMNS)}")
    if len(rows) != num_images:
        raise ConfigError(
            f"{where} has {len(rows)} labels, but the data set has {num_images} images; make it "
            "again from this data (fedphd pseudo-labels)"
        )
    labels = np.empty(num_images, dtype=np.int64)
    for position, (number, fields) in enumerate(rows):
        row = dict(zip(header, fields, strict=False))
        label = _label(row.get("label", ""))
        if row.get("position") != str(position) or label is None:
            raise ConfigError(
                f"{where}, line {number}: must be {position},FILE,LABEL with a label of 0 to "
                f"{LARGEST_LABEL}"
            )
        if names is not None and not _means(row.get("file", ""), names[position]):
            raise ConfigError(
                f"{where}, line {number}: names {row.get('file', '')!r}, but image {position} is "
                f"{names[position]!r}; make it again from this data (fedphd pseudo-labels)"
            )
        labels[position] = label
    return labels


def _means(written: str, name: str) -> bool:
    # Before it was the path, the file's name alone was written. Fields have lost their outer space.
    return written in (name.strip(), posixpath.basename(name).strip())


def _label(text: str) -> int | None:
    """A class number, 0 to ``LARGEST_LABEL``; None if ``text`` is none."""
    # The length first: int() refuses thousands of digits with an error of its own.
    short = text.isdecimal() and len(text.lstrip("0")) <= len(str(LARGEST_LABEL))
    return int(text) if short and int(text) <= LARGEST_LABEL else None


def write_labels(path: Path, labels: Sequence[int], names: Sequence[str] | None) -> None:
    """Write a file that ``data.label_file`` reads; raises ConfigError if that is impossible."""
    try:
        with replaced(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for position, label in enumerate(labels):
                writer.writerow([position, names[position] if names else "", int(label)])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def _text(path: Path, setting: str) -> str:
    try:
        # With a byte order mark or without; what Excel writes has one.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{setting} = {str(path)!r}: cannot be read: {reason}") from error


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
