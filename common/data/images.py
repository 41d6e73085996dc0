"""The images of a data set: the embedded digits or anything that HF ``datasets`` loads.

Only the images of a client's own part are decoded (``common/data/labelled.py``), when they are
asked for.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fedphd.common.config.data import DataConfig
from fedphd.common.data.labelled import LabelledData
from fedphd.common.data.sources import Opened
from fedphd.common.errors import ConfigError
from fedphd.common.working import tracked

logger = logging.getLogger(__name__)

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


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


class LabelledImages(LabelledData):
    """A data set, or this process's part of it: the labels at once, the images on demand.

    A client must know its labels before it knows the network's image size. Takes and raises what
    ``LabelledData`` does.
    """

    def __init__(self, config: DataConfig, opened: Opened | None = None) -> None:
        super().__init__(config, opened)
        self._decoded: dict[tuple[int, int], ImageSet] = {}

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


def stack_pictures(
    pictures: Iterable[Image.Image], num: int, size: int, channels: int, source: str
) -> Tensor:
    """Pictures as one tensor, (num, channels, size, size), uint8.

    Raises:
        ConfigError: ``channels`` is impossible, or a picture cannot be decoded, as ``pictures``
            says.
    """
    mode = _MODES.get(channels)
    if mode is None:
        raise ConfigError(f"channels = {channels}: images have one of {list(_MODES)} channels")
    images = np.empty((num, channels, size, size), dtype=np.uint8)
    resized_from: tuple[int, int] | None = None
    for index, picture in enumerate(tracked(pictures, "reading images", num)):
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
