"""A data set's labels and its parts: what can be known of it before an image is decoded.

Every participant cuts the data set in its own process, so the split (``common/data/partition.py``)
is made on the labels alone. A process that simulates many clients opens the data set and cuts it
once, and does not see later changes to its files. Nothing here needs torch, which takes longer to
import than the digits to open, unless images are chosen at random.
"""

import logging
from functools import lru_cache

import numpy as np

from fedphd.common.config.data import DataConfig
from fedphd.common.data.labels import Indices
from fedphd.common.data.partition import all_parts, partition_name
from fedphd.common.data.sources import Opened, open_source
from fedphd.common.errors import ConfigError
from fedphd.common.rng import permutation

logger = logging.getLogger(__name__)

# Images that are decoded to see whether they can be: a second or two even of large photographs.
MOST_CHECKED = 64


class LabelledData:
    """A data set, or this process's part of it, without its images.

    The sub-folders of an image folder are its classes; names that are all whole numbers are the
    labels themselves, so clients whose folders hold different classes number them alike. Others
    are numbered in the order of their names.

    Args:
        opened: what ``config`` names, where it has been opened already (``common/data/apart.py``).

    Attributes:
        labels: of the part, in the data set's order, (N,), int64.
        partition_name: of the split, for others to cite; None without one.
        part_sizes: images of every part.
        train_indices: positions of the training images in ``labels``, ascending, int64.
        validation_indices: the other positions; empty where ``validation_fraction`` is 0.

    Raises:
        ConfigError: the data is missing or unreadable, lacks the column or split, cannot be cut
            into the wanted parts, or no image is left to train on.
    """

    def __init__(self, config: DataConfig, opened: Opened | None = None) -> None:
        self._config = config
        part = config.partition
        opened = opened or _opened_and_cut(_of_all_parts(config))
        self._pictures, self._all_labels, parts = opened
        self._positions = parts[part.partition_id if part else 0]
        self.labels = self._all_labels[self._positions]
        self.part_sizes = tuple(len(positions) for positions in parts)
        self.partition_name = partition_name(config.source, part, parts) if part else None
        if part:
            name, num = self.partition_name, len(self.labels)
            logger.info("part %d of %s: %d images", part.partition_id, name, num)
        self.train_indices, self.validation_indices = _held_out(len(self.labels), config)

    def check_classes(self, num_classes: int) -> None:
        """Raise ConfigError if the data set, this part or another, has a higher label."""
        labels = self._all_labels
        if int(labels.max()) >= num_classes:
            raise ConfigError(
                f"num_classes = {num_classes}, but source = {self._config.source!r} has "
                f"{len(np.unique(labels))} classes with labels up to {labels.max()}; set "
                f"num_classes to at least {labels.max() + 1}, or name data that has no others"
            )

    def check_images(self, most: int = MOST_CHECKED) -> int:
        """Decode up to ``most`` images of the part, spread evenly over it; return how many.

        Raises ConfigError, which names the image and its file, if one cannot be used.
        """
        num = len(self._positions)
        checked = min(most, num)
        for _ in self._pictures.read(self._positions[np.arange(checked) * num // checked]):
            pass
        return checked

    def check_covers(self, num_classes: int) -> None:
        """Raise ConfigError unless the images used have all of ``num_classes`` classes, and the
        data set no more."""
        self.check_classes(num_classes)
        found = len(np.unique(self.labels))
        if found < num_classes:
            bounded = len(np.unique(self._all_labels)) > found
            of = f"the {len(self.labels)} images used of " if bounded else ""
            advice = "use more of its images" if bounded else f"set num_classes to {found}"
            raise ConfigError(
                f"num_classes = {num_classes}, but {of}source = {self._config.source!r} has only "
                f"{found} classes; {advice}, or name data that has them all"
            )


def _of_all_parts(config: DataConfig) -> DataConfig:
    """What the configurations of all parts have in common, so that they share one cache entry."""
    part = config.partition
    first = part.model_copy(update={"partition_id": 0}) if part else None
    return config.model_copy(update={"partition": first, "validation_fraction": 0.0})


# Two: the training data and the reference.
@lru_cache(maxsize=2)
def _opened_and_cut(config: DataConfig) -> Opened:
    pictures, labels = open_source(config)
    if len(labels) == 0 or labels.min() < 0:
        raise ConfigError(
            f"source = {config.source!r} has {len(labels)} images, labels from "
            f"{labels.min(initial=0)}; labels must be 0 to num_classes - 1. Choose a labelled "
            "split or another label_column"
        )
    used = _used(len(labels), config)
    if config.partition is None:
        return Opened(pictures, labels, [used])
    parts = [used[part] for part in all_parts(labels[used], config.partition)]
    return Opened(pictures, labels, parts)


def _used(num: int, config: DataConfig) -> Indices:
    """Positions of the images that are used at all, ascending.

    No run's seed has a say: reference and all participants must mean the same images.
    """
    if config.max_images is None or config.max_images >= num:
        return np.arange(num)
    order = permutation(num, "used-images")
    return np.sort(order[: config.max_images])


def num_held_out(num: int, validation_fraction: float) -> int:
    """Of so many images of a client, those that are held out for validation."""
    return max(1, round(validation_fraction * num)) if validation_fraction else 0


def _held_out(num: int, config: DataConfig) -> tuple[Indices, Indices]:
    """Positions of the training and of the validation images, each ascending.

    The cut is drawn from the partition's seed and id (0 and 0 without a partition).
    """
    num_validation = num_held_out(num, config.validation_fraction)
    if num_validation == 0:
        return np.arange(num), np.arange(0)
    if num_validation >= num:
        raise ConfigError(
            f"validation_fraction = {config.validation_fraction} leaves none of {num} "
            "images to train on; use a smaller fraction or more images"
        )
    part = config.partition
    seed, part_id = (part.seed, part.partition_id) if part else (0, 0)
    order = permutation(num, "validation", seed, part_id)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])
