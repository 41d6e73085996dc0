"""How a data set is cut into the clients' parts, by flwr-datasets' partitioners.

flwr-datasets, with ``datasets``, takes a second to import: only where data is cut.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedphd.common.config.data import PartitionConfig
from fedphd.common.data.labels import Indices
from fedphd.common.errors import ConfigError
from fedphd.common.lean_imports import put_off_code_of

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]
    from flwr_datasets.partitioner import Partitioner  # type: ignore[import-untyped]

# In a run's folder; written by a launcher that cut the data.
PARTITION_FILE = "partition.json"
_COMMON_STEMS = ("train", "test", "data", "images")
_HASH_DIGITS = 8


def all_parts(labels: Indices, config: PartitionConfig) -> list[Indices]:
    """Which images are in each part, by a flwr-datasets partitioner.

    The order is shuffled by the seed first, so all kinds depend on the seed. Pathological parts
    take ``classes_per_partition`` classes in turn (0 and 1, 2 and 3, ...), starting again after
    the last; a class that several parts take is divided evenly.

    Returns:
        For each part its positions in ``labels``, (N,), int64: ascending, (M,), int64, M >= 1.

    Raises:
        ConfigError: the parts would lose images, be empty or be too small; names the fix.
    """
    import datasets

    table = datasets.Dataset.from_dict({"label": labels, "index": np.arange(len(labels))})
    per_part = 1
    if config.kind == "pathological":
        _check_classes_covered(labels, config)
        per_part = config.classes_per_partition
    num_pieces = config.num_partitions * per_part
    pieces = _cut(table.shuffle(seed=config.seed), num_pieces, config)
    return [
        np.sort(np.concatenate(pieces[start : start + per_part]))
        for start in range(0, num_pieces, per_part)
    ]


def _partitioner(num_pieces: int, config: PartitionConfig) -> Partitioner:
    # Its plots would bring matplotlib and seaborn, which take longer than all the rest.
    put_off_code_of("flwr_datasets.visualization")
    from flwr_datasets import partitioner  # type: ignore[import-untyped]

    common = {"num_partitions": num_pieces, "partition_by": "label", "seed": config.seed}
    if config.kind == "pathological":
        # One class per piece and several pieces per part: with several classes per piece the
        # deterministic mode shifts by one class per part and leaves the last classes out.
        return partitioner.PathologicalPartitioner(
            num_classes_per_partition=1, class_assignment_mode="deterministic", **common
        )
    if config.kind == "dirichlet":
        return partitioner.DirichletPartitioner(
            alpha=config.alpha, min_partition_size=config.min_partition_size, **common
        )
    return partitioner.IidPartitioner(num_partitions=num_pieces)


def _cut(table: datasets.Dataset, num_pieces: int, config: PartitionConfig) -> list[Indices]:
    """All pieces of ``table``; raises ConfigError where flwr-datasets gives up or drops images."""
    if config.num_partitions > len(table):
        raise ConfigError(
            f"partition.num_partitions = {config.num_partitions}, but the data set has only "
            f"{len(table)} images; use fewer parts"
        )
    try:
        # The advice for each of Dirichlet's ten tries is given once, in the error below.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            cutter = _partitioner(num_pieces, config)
            cutter.dataset = table
            pieces = [
                np.asarray(cutter.load_partition(piece)["index"][:], dtype=np.int64)
                for piece in range(num_pieces)
            ]
    except ValueError as error:
        raise ConfigError(_why_not_cut(config)) from error
    if sum(map(len, pieces)) != len(table) or not all(map(len, pieces)):
        raise ConfigError(
            f"{_described(config)} would cut {len(table)} images into parts of "
            f"{[len(piece) for piece in pieces]}; use fewer parts"
        )
    return pieces


def _described(config: PartitionConfig) -> str:
    return f"partition.kind = {config.kind!r} with num_partitions = {config.num_partitions}"


def _why_not_cut(config: PartitionConfig) -> str:
    if config.kind == "dirichlet":
        return (
            f"{_described(config)} and alpha = {config.alpha} gave no split with "
            f"min_partition_size = {config.min_partition_size} images in every part in 10 tries; "
            "raise alpha, or lower min_partition_size or num_partitions"
        )
    return (
        f"{_described(config)}: a class has fewer images than parts that take it "
        f"(classes_per_partition = {config.classes_per_partition}); use fewer parts"
    )


def _check_classes_covered(labels: Indices, config: PartitionConfig) -> None:
    num_classes, per_part = len(np.unique(labels)), config.classes_per_partition
    if per_part > num_classes:
        raise ConfigError(
            f"partition.classes_per_partition = {per_part}, but the data set has only "
            f"{num_classes} classes; use {num_classes} or less"
        )
    if config.num_partitions * per_part < num_classes:
        raise ConfigError(
            f"{_described(config)} and classes_per_partition = {per_part} leaves out "
            f"{num_classes - config.num_partitions * per_part} of {num_classes} classes; use at "
            f"least {-(-num_classes // per_part)} parts (num_partitions), or "
            f"{-(-num_classes // config.num_partitions)} classes per part (classes_per_partition)"
        )


def partition_name(source: str, config: PartitionConfig, parts: Sequence[Indices]) -> str:
    """A name by which others can cite a split and check that theirs is the same.

    It holds the data set, the kind of split, the seed, and the first digits of the SHA-256 of
    all parts' positions (each part as its length and its positions, little-endian int64), such
    as ``digits-pathological-2x20-seed0-1f0a9c3e`` for 20 clients with 2 classes each.
    """
    path = Path(source)
    named = path.parent.name if path.stem in _COMMON_STEMS and path.parent.name else path.stem
    data = re.sub("[^a-z0-9.]+", "-", named.lower()).strip("-") or "data"
    detail = {
        "pathological": f"{config.classes_per_partition}x{config.num_partitions}",
        "dirichlet": f"{config.alpha:g}x{config.num_partitions}",
        "iid": config.num_partitions,
    }[config.kind]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.concatenate([[len(part)], part]).astype("<i8").tobytes())
    return f"{data}-{config.kind}-{detail}-seed{config.seed}-{digest.hexdigest()[:_HASH_DIGITS]}"
