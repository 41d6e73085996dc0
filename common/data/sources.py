"""Where images come from: the embedded digits, parquet, image folder, saved data set or hub.

HF ``datasets`` is imported only for sources that need it. Its errors become ConfigError here.
Image folders are listed in ``common/data/folders.py``, pictures decoded in
``common/data/decoding.py``; labels that do not come with the images are in
``common/data/labels.py``.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedphd.common.config.data import DataConfig
from fedphd.common.data.decoding import Place, decoded
from fedphd.common.data.folders import load_folder
from fedphd.common.data.labels import LARGEST_LABEL, Indices, expanded, read_labels
from fedphd.common.errors import ConfigError

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

DIGITS = "digits"
_DIGITS_MAX = 16
_DIGITS_FILE = "datasets/data/digits.csv.gz"
_SHOWN = 3
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Pictures:
    """``num`` images that are decoded only on demand."""

    num: int
    # Decodes those at the given positions, in that order; raises ConfigError for a broken one.
    read: Callable[[Indices], Iterable[Image.Image]]
    # Their files' in order, with the folders below the source; None where they are not files.
    names: Callable[[], list[str] | None]


class Opened(NamedTuple):
    """A data set's images and labels, and the positions of each of its parts, ascending."""

    pictures: Pictures
    labels: Indices
    parts: list[Indices]


def open_source(config: DataConfig) -> tuple[Pictures, Indices]:
    """A data set's images, and the labels of all of them, (N,), int64.

    Raises:
        ConfigError: the data set is missing or unreadable, or lacks the split or a column.
    """
    if config.label_file is not None or config.attribute_file is not None:
        pictures = open_pictures(config)
        return pictures, read_labels(config, pictures.names(), pictures.num)
    if is_digits(config):
        images, labels = digit_arrays()
        return digit_pictures(images), labels
    table = _load_table(config)
    return _pictures(config, table), _labels_of(config, table)


def open_pictures(config: DataConfig) -> Pictures:
    """A data set's images, whether they have labels or not; raises as ``open_source`` does."""
    if is_digits(config):
        return digit_pictures(digit_arrays()[0])
    return _pictures(config, _load_table(config))


def is_digits(config: DataConfig) -> bool:
    """Whether ``config`` names the embedded digits."""
    return config.source == DIGITS and config.format == "auto"


def digit_arrays() -> tuple[NDArray[np.uint8], Indices]:
    """The embedded digits, (1797, 8, 8), 0 to 255, and their labels, (1797,), int64."""
    table = _digits_table()
    pixels = table[:, :-1].reshape(-1, 8, 8)
    images = np.rint(pixels * (255 / _DIGITS_MAX)).astype(np.uint8)
    return images, table[:, -1].astype(np.int64)


def _digits_table() -> NDArray[np.float64]:
    """scikit-learn's digits, (1797, 65): pixels, 0 to 16, and the label."""
    # Its file alone: the library takes more than a second to import, with scipy.
    library = importlib.util.find_spec("sklearn")
    if library is not None and library.origin is not None:
        file = Path(library.origin).parent / _DIGITS_FILE
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def digit_pictures(images: NDArray[np.uint8]) -> Pictures:
    """Grey images, (N, H, W), as pictures."""
    return Pictures(len(images), lambda i: map(Image.fromarray, images[i]), lambda: None)


def _load_table(config: DataConfig) -> datasets.Dataset:
    """The wanted split as HF ``datasets`` reads it; its errors become ConfigError here."""
    import datasets

    kind, source = _kind_and_place(config)
    try:
        if kind == "saved":
            loaded = datasets.load_from_disk(source)
        elif kind == "hub":
            loaded = _from_hub(source, config.split)
        elif kind == "imagefolder":
            loaded = load_folder(source)
        elif os.path.isfile(source):
            # A path is a pattern to it, in which [ begins a set of characters.
            data_files = {config.split: [glob.escape(source)]}
            loaded = datasets.load_dataset("parquet", data_files=data_files)
        else:
            loaded = datasets.load_dataset("parquet", data_dir=glob.escape(source))
    except ConfigError:
        raise
    except Exception as error:  # The hub, files and formats each raise errors of their own.
        raise ConfigError(_why_not_loaded(kind, config, error)) from error
    if not isinstance(loaded, dict):
        only = "train" if loaded.split is None else str(loaded.split)
        # By default a saved split is read, whichever it is.
        if kind == "saved" and config.split not in ("train", only):
            raise ConfigError(
                f"split = {config.split!r}: source = {config.source!r} has only the split "
                f"{only!r}; leave split out"
            )
        return loaded
    if config.split not in loaded:
        raise ConfigError(
            f"split = {config.split!r}: source = {config.source!r} has only the splits "
            f"{sorted(loaded)}; set split to one of them"
        )
    return loaded[config.split]


def _from_hub(name: str, split: str) -> datasets.Dataset:
    import datasets

    logger.info("source = %r: asks the Hugging Face hub", name)
    # It tells of each of its tries; why the last one failed is in the error.
    library = logging.getLogger("huggingface_hub")
    before = library.level
    library.setLevel(logging.ERROR)
    try:
        return datasets.load_dataset(name, split=split)
    finally:
        library.setLevel(before)


def _why_not_loaded(kind: str, config: DataConfig, error: Exception) -> str:
    if kind == "hub":
        return (
            f"source = {config.source!r} is not a file or folder here, and reading split "
            f"{config.split!r} from the Hugging Face hub failed ({type(error).__name__}: "
            f"{error}); check the name and the network, or set source to a local path "
            "(parquet file, image folder or saved data set)"
        )
    return (
        f"source = {config.source!r} cannot be read as {kind} ({type(error).__name__}: {error}); "
        "check the files, or set format to what they are (parquet, imagefolder or saved)"
    )


def _kind_and_place(config: DataConfig) -> tuple[str, str]:
    """How to read the source, and its path or hub name; raises ConfigError for a missing path."""
    path = expanded(config.source)
    like_hub = _HUB_NAME.fullmatch(config.source) and not config.source.endswith(".parquet")
    # images/nope is a slip of the pen where there is a folder images.
    begins_here = len(path.parts) > 1 and Path(path.parts[0]).exists()
    exists = os.path.exists(path)
    is_hub = config.format == "auto" and like_hub and not exists and not begins_here
    if config.format == "hub" or is_hub:
        return "hub", config.source
    if not exists:
        or_hub = "set format to 'hub' for that name on the hub" if like_hub else "to a hub name"
        raise ConfigError(
            f"source = {config.source!r}: no such file or folder; set it to an existing parquet "
            f"file, image folder or saved data set, {or_hub}, or to 'digits'"
        )
    return _kind_of(path) if config.format == "auto" else config.format, str(path)


def _kind_of(path: Path) -> str:
    if path.is_file():
        if path.suffix == ".parquet":
            return "parquet"
        raise ConfigError(
            f"source = {str(path)!r} is a file but not .parquet; use a parquet file, an image "
            "folder or a saved data set, or set format"
        )
    if any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
        return "saved"
    return "parquet" if next(path.rglob("*.parquet"), None) else "imagefolder"


def _pictures(config: DataConfig, table: datasets.Dataset) -> Pictures:
    _check_column(config, table, "image_column")
    images = _as_pictures(config, table)
    return Pictures(len(images), partial(_decode, config, images), partial(_names, config, images))


def _check_column(config: DataConfig, table: datasets.Dataset, field: str) -> None:
    column = getattr(config, field)
    if column not in table.column_names:
        advice = (
            "; an image folder gets its labels from one sub-folder per class, and images without "
            "labels get them from attribute_file or `fedphd pseudo-labels`"
        )
        raise ConfigError(
            f"{field} = {column!r}: source = {config.source!r} lacks that column; its columns "
            f"are {table.column_names}. Set {field} to one of them"
            f"{advice if field == 'label_column' else ''}"
        )


def _names(config: DataConfig, pictures: datasets.Dataset) -> list[str] | None:
    """The images' files, by their paths below the source; None where one has none."""
    import datasets
    from pyarrow import compute  # type: ignore[import-untyped]

    column = config.image_column
    encoded = pictures.cast_column(column, datasets.Image(decode=False))
    # Chunk by chunk: one array has no room for more than 2 GiB of images.
    paths = compute.struct_field(encoded.with_format("arrow")[:][column], "path").to_pylist()
    root = os.path.join(os.path.abspath(expanded(config.source)), "")
    return None if None in paths else [_below(root, path) for path in paths]


def _below(root: str, path: str) -> str:
    if os.path.isabs(path) and not path.startswith(root):
        # In a cache, whose folders say nothing.
        return os.path.basename(path)
    return path.removeprefix(root)


def _labels_of(config: DataConfig, table: datasets.Dataset) -> Indices:
    _check_column(config, table, "label_column")
    alone = table.select_columns([config.label_column])
    missing = np.flatnonzero(alone.with_format("arrow")[:][config.label_column].is_null())
    if len(missing):
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        raise ConfigError(
            f"label_column = {config.label_column!r}: {len(missing)} of {len(table)} images of "
            f"source = {config.source!r} have no label (rows {shown}, from 0); label them or "
            "leave them out"
        )
    column = np.asarray(table.with_format("numpy")[config.label_column][:])
    if column.ndim != 1 or column.dtype.kind not in "iu":
        raise ConfigError(
            f"label_column = {config.label_column!r}: labels must be whole numbers 0, 1, ..., but "
            f"source = {config.source!r} has {table.features[config.label_column]} there; convert "
            "them (datasets: class_encode_column) or name another column"
        )
    labels: Indices = column.astype(np.int64)
    names: list[str] = getattr(table.features[config.label_column], "names", [])
    # datasets numbers folders by their names in order; several clients' folders with some of the
    # classes each would number the same class differently.
    from_folder = _kind_and_place(config)[0] == "imagefolder"
    if from_folder and names and all(re.fullmatch("[0-9]+", name) for name in names):
        if too_large := [name for name in names if int(name) > LARGEST_LABEL]:
            raise ConfigError(
                f"source = {config.source!r}: the class folder {too_large[0]} is a label above "
                f"{LARGEST_LABEL}; number the classes from 0"
            )
        return np.array([int(name) for name in names], dtype=np.int64)[labels]
    if from_folder and names:
        numbered = ", ".join(f"{number} = {name}" for number, name in enumerate(names))
        logger.info("source = %r: classes %s", config.source, numbered)
    return labels


def _as_pictures(config: DataConfig, table: datasets.Dataset) -> datasets.Dataset:
    """The image column alone, so that nothing else is read with it."""
    import datasets

    pictures = table.select_columns([config.image_column])
    feature = pictures.features[config.image_column]
    if isinstance(feature, datasets.Image) and feature.decode:
        return pictures
    try:
        return pictures.cast_column(config.image_column, datasets.Image())
    except Exception as error:  # Arrow and datasets each raise errors of their own.
        raise ConfigError(
            f"image_column = {config.image_column!r} of source = {config.source!r} holds "
            f"{feature}, not images; name the column with encoded images (PNG, JPEG, ...)"
        ) from error


def _decode(
    config: DataConfig, pictures: datasets.Dataset, indices: Indices
) -> Iterator[Image.Image]:
    import datasets

    column = config.image_column
    feature = pictures.features[column]
    encoded = pictures.cast_column(column, datasets.Image(decode=False))
    # In memory: on disk every selection would leave a file in the user's cache folder.
    selected = encoded.select(indices, keep_in_memory=True)
    for position, index in enumerate(indices):
        yield decoded(selected[position][column], feature, Place(config.source, int(index)))
