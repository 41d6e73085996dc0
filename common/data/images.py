"""Labelled images: the embedded digits or anything that HF ``datasets`` loads.

Every client does this in its own process, so the split (``common/data/partition.py``) is made on
the labels alone and only the images of the client's own part are decoded. A process that simulates
many clients opens the data set and cuts it once, and does not see later changes to its files.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fedphd.common.config.data import DataConfig
from fedphd.common.data.labels import Indices
from fedphd.common.data.partition import all_parts, partition_name
from fedphd.common.data.sources import Opened, open_source
from fedphd.common.errors import ConfigError
from fedphd.common.rng import generator
from fedphd.common.working import tracked

logger = logging.getLogger(__name__)

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class ImageSet:
    """Images, (N, C, H, W), uint8, 0 to 255, and their labels, (N,), int64, from 0."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "ImageSet":
        """The images and labels at ``indices``, shape (M,), int64."""
        return ImageSet(self.images[indices], self.labels[indices])


def to_model_range(images: Tensor) -> Tensor:
    """Map uint8 images (0 to 255, any shape) to float32 in [-1, 1], as the U-Net sees them."""
    return images.to(torch.float32) / 127.5 - 1


class LabelledImages:
    """A data set, or this process's part of it: the labels at once, the images on demand.

    A client must know its labels before it knows the network's image size. The sub-folders of an
    image folder are its classes; names that are all whole numbers are the labels themselves, so
    clients whose folders hold different classes number them alike.

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
        self._decoded: dict[tuple[int, int], ImageSet] = {}

    def check_classes(self, num_classes: int) -> None:
        """Raise ConfigError if the data set, this part or another, has a higher label."""
        labels = self._all_labels
        if int(labels.max()) >= num_classes:
            raise ConfigError(
                f"num_classes = {num_classes}, but source = {self._config.source!r} has "
                f"{len(np.unique(labels))} classes with labels up to {labels.max()}; set "
                f"num_classes to at least {labels.max() + 1}"
            )

    def check_covers(self, num_classes: int) -> None:
        """Raise ConfigError unless the data set has all of ``num_classes`` classes, and no more."""
        self.check_classes(num_classes)
        found = len(np.unique(self._all_labels))
        if found < num_classes:
            raise ConfigError(
                f"num_classes = {num_classes}, but source = {self._config.source!r} has only "
                f"{found} classes; set num_classes to {found}, or name data that has them all"
            )

    def decode(self, *, image_size: int, channels: int) -> ImageSet:
        """All images of the part, decoded once and kept; raises as ``stack_pictures`` does.

        Images of another size are cut to a square around their centre and resized to
        ``image_size`` pixels. ``channels`` are 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA).
        """
        shape = image_size, channels
        if shape not in self._decoded:
            read, num = self._pictures.read(self._positions), len(self.labels)
            images = stack_pictures(read, num, image_size, channels, self._config.source)
            # Only the last size, since all images in two sizes may not fit into memory.
            self._decoded = {shape: ImageSet(images, torch.from_numpy(self.labels))}
        return self._decoded[shape]

    def split(self, *, image_size: int, channels: int) -> tuple[ImageSet, ImageSet | None]:
        """``decode``, cut into training and validation images (None if there are none)."""
        data = self.decode(image_size=image_size, channels=channels)
        if len(self.validation_indices) == 0:
            return data, None
        train, validation = map(torch.from_numpy, (self.train_indices, self.validation_indices))
        return data.subset(train), data.subset(validation)


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
    order = torch.randperm(num, generator=generator("used-images")).numpy()
    return np.sort(order[: config.max_images])


def _held_out(num: int, config: DataConfig) -> tuple[Indices, Indices]:
    """Positions of the training and of the validation images, each ascending.

    The cut is drawn from the partition's seed and id (0 and 0 without a partition).
    """
    if config.validation_fraction == 0:
        return np.arange(num), np.arange(0)
    num_validation = max(1, round(config.validation_fraction * num))
    if num_validation >= num:
        raise ConfigError(
            f"validation_fraction = {config.validation_fraction} leaves none of {num} "
            "images to train on; use a smaller fraction or more images"
        )
    part = config.partition
    seed, part_id = (part.seed, part.partition_id) if part else (0, 0)
    order = torch.randperm(num, generator=generator("validation", seed, part_id)).numpy()
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def stack_pictures(
    pictures: Iterable[Image.Image], num: int, size: int, channels: int, source: str
) -> Tensor:
    """Pictures as one tensor, (num, channels, size, size), uint8.

    Raises:
        ConfigError: a picture has more than 8 bits per channel, or cannot be decoded.
    """
    mode = _MODES.get(channels)
    if mode is None:
        raise ConfigError(f"channels = {channels}: images have one of {list(_MODES)} channels")
    images = np.empty((num, channels, size, size), dtype=np.uint8)
    resized_from: tuple[int, int] | None = None
    for index, picture in enumerate(tracked(pictures, "reading images", num)):
        if picture.mode.startswith(_DEEP_MODES):
            raise ConfigError(
                f"source = {source!r} has images of mode {picture.mode}, which have more than 8 "
                "bits per channel; convert them to 8 bits"
            )
        if picture.size != (size, size):
            resized_from = resized_from or picture.size
            picture = ImageOps.fit(picture.convert(mode), (size, size), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture.convert(mode))
        images[index] = pixels.reshape(size, size, channels).transpose(2, 0, 1)
    if resized_from is not None:
        logger.info(
            "source = %r: images such as %d x %d pixels are cut to squares and resized to %d x %d",
            *(source, *resized_from, size, size),
        )
    return torch.from_numpy(images)
