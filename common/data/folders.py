"""Image folders: which of their files are images, of which split, and of which class.

``datasets`` would guess splits from the words train, test, dev and the like in any name, and so
lose ``cats/test_01.png``; it skips linked folders and takes ``[`` for a pattern. So the files are
listed here, and it gets the list.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from PIL import Image

from fedphd.common.errors import ConfigError

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

# What datasets calls the columns of an image folder.
IMAGE, LABEL = "image", "label"
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Pillow opens them, but they are films or hold any number of arrays.
_NOT_IMAGES = frozenset({".h5", ".hdf", ".mpg", ".mpeg"})
_SPLIT_WORDS: Final[Mapping[str, Sequence[str]]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WHOLE_NAMES = frozenset(word for words in _SPLIT_WORDS.values() for word in words)
_SPLIT_NAMES = {
    split: re.compile(rf"(.*[-._ 0-9])?({'|'.join(words)})([-._ 0-9].*)?", re.IGNORECASE)
    for split, words in _SPLIT_WORDS.items()
}


def load_folder(source: str) -> dict[str, datasets.Dataset]:
    """The images of every split of a folder; all are ``train`` where it has no split folders.

    Each is a table of ``image`` (the files' absolute paths) and, where all of its images lie in
    class folders of one depth, ``label`` (whole numbers, the names' positions in order, with the
    names of all splits). A split with ``metadata.csv`` or ``.jsonl`` has its columns instead.

    Raises:
        ConfigError: no image is there, a folder or link cannot be followed, a name is not UTF-8, or
            metadata leave out images or belong to no split.
    """
    root = os.path.abspath(source)
    if not os.path.isdir(root):
        raise ConfigError(
            f"source = {source!r} is a file, not an image folder; name the folder, or set format "
            "to what the file is"
        )
    files = sorted(_files(root, "", ()))
    _check_names(root, files)
    described = [file for file in files if os.path.basename(file) in _METADATA]
    images = [file for file in files if is_image(file)]
    _tell_others(source, sorted(set(files).difference(described)), len(images))
    splits = split_folders(images)
    if list(splits) != ["train"]:
        found = ", ".join(f"{split} ({len(paths)} images)" for split, paths in splits.items())
        logger.info("source = %r: its folders are the splits %s", source, found)
    metadata = _metadata_of_splits(splits, described)
    bare = {split: paths for split, paths in splits.items() if split not in metadata}
    return _tables(root, bare) | _by_metadata(root, metadata, splits)


def is_image(name: str) -> bool:
    """Whether a file's name ends as those of images do that can be read, in either case."""
    return os.path.splitext(name)[1].lower() in _image_endings()


@lru_cache(maxsize=1)
def _image_endings() -> frozenset[str]:
    formats = Image.registered_extensions()
    return frozenset(end for end, kind in formats.items() if kind in Image.OPEN) - _NOT_IMAGES


def split_folders(images: Sequence[str]) -> dict[str, dict[str, str]]:
    """The splits of a folder: per image its path, and its path within the split's folder.

    Where folders lie side by side and all are named for a split, ``train/`` and ``test/``, they
    are the splits. So that classes called ``dev`` and ``test`` are no splits, they must either
    hold folders themselves, or one must be the training images: those are never meant to be a
    class beside test images. Several that have one split's name only as a word are no splits.
    A single folder around them is passed through.

    Args:
        images: paths below the folder, with ``/``.
    """
    inner = list(images)
    while tops := _top_folders(inner):
        splits = {top: _split_of(top) for top in tops}
        if all(splits.values()):
            hold_folders = all(path.count("/") >= 2 for path in inner)
            if not hold_folders and "train" not in splits.values():
                break
            # A steam-train and an electric-train are classes.
            if len(tops) > len(set(splits.values())) == 1 and not _WHOLE_NAMES.issuperset(
                top.lower() for top in tops
            ):
                break
            found: dict[str, dict[str, str]] = {}
            for path, within in zip(images, inner, strict=True):
                top, _, rest = within.partition("/")
                found.setdefault(splits[top], {})[path] = rest
            return found
        if len(tops) > 1:
            break
        inner = [path.partition("/")[2] for path in inner]
    return {"train": {path: path for path in images}}


def _top_folders(paths: Sequence[str]) -> set[str]:
    """The folders that all of ``paths`` begin with; none where one is a file beside them."""
    return set() if any("/" not in path for path in paths) else {p.split("/", 1)[0] for p in paths}


def _split_of(folder: str) -> str:
    """The split that a folder's name has as a word, such as train in ``images-train``; or ""."""
    return next((split for split, name in _SPLIT_NAMES.items() if name.fullmatch(folder)), "")


def _files(folder: str, inside: str, above: tuple[str, ...]) -> Iterator[str]:
    """Paths below ``folder``, with ``/``; hidden ones, and folders such as __MACOSX, are not."""
    real = os.path.realpath(folder)
    if real in above:
        raise ConfigError(
            f"source: {folder!r} links to a folder that it lies in; remove the link, since its "
            "images would be read without end"
        )
    try:
        with os.scandir(folder) as found:
            entries = list(found)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if not entry.name.startswith("__"):
                    yield from _files(entry.path, f"{inside}{entry.name}/", (*above, real))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise ConfigError(
                    f"source: {entry.path!r} links to {os.readlink(entry.path)!r}, which is not "
                    "there; correct or remove the link"
                )
            else:
                yield inside + entry.name
    except OSError as error:
        raise ConfigError(
            f"source: {folder!r} cannot be listed: {error.strerror}; give this user the right to "
            "read it"
        ) from error


def _check_names(root: str, files: Sequence[str]) -> None:
    for file in files:
        path = os.path.join(root, file)
        try:
            path.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"source: the name of {os.fsencode(path)!r} is not UTF-8; rename it"
            ) from error


def _tell_others(source: str, files: Sequence[str], num_images: int) -> None:
    """Log what is not read; raise ConfigError if nothing is."""
    endings = Counter(os.path.splitext(f)[1].lower() or f for f in files if not is_image(f))
    shown = ", ".join(f"{num} {ending}" for ending, num in endings.most_common(5))
    if num_images == 0:
        advice = "unpack the archive" if ".zip" in endings else "name the folder of the images"
        raise ConfigError(
            f"source = {source!r} has no image files (it has {shown or 'nothing'}); {advice}, or "
            "set format to what the files are"
        )
    if shown:
        logger.warning("source = %r: files that are not read as images: %s", source, shown)


def _metadata_of_splits(
    splits: Mapping[str, Mapping[str, str]], described: Sequence[str]
) -> dict[str, list[str]]:
    """The files of metadata of every split that has any: those above its images."""
    found: dict[str, list[str]] = {}
    for file in described:
        folder = file.removesuffix(os.path.basename(file))
        below = [name for name, paths in splits.items() if any(p.startswith(folder) for p in paths)]
        if len(below) != 1:
            raise ConfigError(
                f"source: {file!r} lies above the images of {len(below)} splits "
                f"({', '.join(below) or 'none'}); move it into the folder of the one it describes"
            )
        found.setdefault(below[0], []).append(file)
    return found


def _by_metadata(
    root: str, metadata: Mapping[str, Sequence[str]], splits: Mapping[str, Mapping[str, str]]
) -> dict[str, datasets.Dataset]:
    """What ``metadata.csv`` and the like say of the images beside them."""
    import datasets

    if not metadata:
        return {}
    data_files = {
        split: [glob.escape(os.path.join(root, path)) for path in paths]
        for split, paths in metadata.items()
    }
    loaded: dict[str, datasets.Dataset] = datasets.load_dataset(
        "imagefolder", data_files=data_files
    )
    for split, table in loaded.items():
        # datasets would leave out the others, and say nothing.
        rows = {os.path.relpath(path, root) for path in _files_of(table)}
        if without := [path for path in splits[split] if path not in rows]:
            raise ConfigError(
                f"source: {', '.join(metadata[split])} has no row for {len(without)} of "
                f"{len(splits[split])} images, such as {without[0]!r}; add their rows, or remove "
                "the images"
            )
    return loaded


def _files_of(table: datasets.Dataset) -> Iterator[str]:
    """The files in a table's columns of images."""
    import datasets

    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            bare = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            yield from (value["path"] for value in bare[column] if value)


def _tables(root: str, splits: Mapping[str, Mapping[str, str]]) -> dict[str, datasets.Dataset]:
    import datasets

    classes = {split: _classes(list(paths.values())) for split, paths in splits.items()}
    # Of all splits, so that a class has one number in each of them.
    names = sorted({name for found in classes.values() for name in found})
    number = {name: position for position, name in enumerate(names)}
    tables = {}
    for split, paths in splits.items():
        columns: dict[str, list[object]] = {IMAGE: [os.path.join(root, path) for path in paths]}
        features = datasets.Features({IMAGE: datasets.Image()})
        if classes[split]:
            columns[LABEL] = [number[name] for name in classes[split]]
            features[LABEL] = datasets.ClassLabel(names=names)
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    return tables


def _classes(paths: Sequence[str]) -> list[str]:
    """The folder of every image; none where images lie outside of folders or at unlike depths."""
    depths = {path.count("/"): path for path in paths}
    if len(depths) > 1:
        logger.warning(
            "images lie at unlike depths, such as %s: their folders are not taken for classes",
            " and ".join(sorted(depths.values())),
        )
    return [] if len(depths) > 1 or 0 in depths else [path.split("/")[-2] for path in paths]
