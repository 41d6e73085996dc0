"""One image of a data set, decoded; what cannot be read is refused by its number and file.

Of colours with more than 8 bits per channel Pillow keeps the upper 8 and says nothing, so they are
looked for in the file's header. Of JPEG 2000 and AVIF in colour it does not tell how deep they are.
"""

from __future__ import annotations

import io
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import ExifTags, Image, ImageOps

from fedphd.common.errors import ConfigError

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

_DEEP_MODES = ("I", "F")
# How Pillow names 16 bits of a channel in its raw modes: RGB;16B, LA;16B, RGB;16N.
_DEEP_ENDINGS = (";16", ";16B", ";16L", ";16N")
# 5 or 6 bits per channel.
_SHALLOW = ("BGR;16",)
_BITS_PER_SAMPLE = 258  # the tag of TIFF
_BYTE = 255
# The others go by way of RGB: Pillow knows none from LAB to grey.
_USUAL_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"})


class Place(NamedTuple):
    """Which image: of what source, and its position there, from 0."""

    source: str
    position: int

    def of(self, path: str | None) -> str:
        """The image in an error's words; ``path`` is its file, if it is one."""
        file = f", {path!r}," if path else ""
        return f"source = {self.source!r}: image {self.position} (from 0){file}"


def decoded(value: dict[str, Any] | None, feature: datasets.Image, place: Place) -> Image.Image:
    """The image of ``value``, ``{"bytes": ..., "path": ...}``, turned as its camera was held.

    Raises:
        ConfigError: it is missing or broken, or has more than 8 bits per channel; names its place
            and file.
    """
    path = value["path"] if value else None
    try:
        picture = _picture(value, feature, place)
        return picture if picture.mode in _USUAL_MODES else picture.convert("RGB")
    except ConfigError:
        raise
    except Exception as error:  # Pillow's formats each raise errors of their own.
        raise ConfigError(
            f"{place.of(path)} cannot be decoded ({error}); replace or remove it"
        ) from error


def _picture(value: dict[str, Any] | None, feature: datasets.Image, place: Place) -> Image.Image:
    if value is None or (value["bytes"] is None and not value["path"]):
        raise ValueError("the place is empty")
    data, path = value["bytes"], value["path"]
    if data is None and "://" in path:
        # Only datasets can fetch it.
        fetched: Image.Image = feature.decode_example(value)
        return fetched
    with closing(open(path, "rb") if data is None else io.BytesIO(data)) as file:
        picture: Image.Image = Image.open(file)
        # After loading, what the file has is forgotten.
        if deep := _depth(picture):
            raise ConfigError(
                f"{place.of(path)} has more than 8 bits per channel ({deep}); convert it to 8 bits"
            )
        picture.load()
        if picture.getexif().get(ExifTags.Base.Orientation) is not None:
            picture = ImageOps.exif_transpose(picture)
        wanted = feature.mode
        return picture.convert(wanted) if wanted and wanted != picture.mode else picture


def _depth(picture: Image.Image) -> str:
    """What tells that an opened picture has more than 8 bits per channel; "" if nothing does."""
    if picture.mode.startswith(_DEEP_MODES):
        return f"mode {picture.mode}"
    bits = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())
    if max(bits, default=0) > 8:
        return f"{max(bits)} bits"
    for tile in getattr(picture, "tile", ()):
        args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        raw_mode = str(args[0])
        if tile.codec_name == "SGI16" or (
            raw_mode.endswith(_DEEP_ENDINGS) and raw_mode not in _SHALLOW
        ):
            return "16 bits"
        # The second argument of PNM files is the value of white; those of bits have none.
        white = args[-1] if tile.codec_name.startswith("ppm") else 0
        if isinstance(white, int) and white > _BYTE:
            return f"values up to {white}"
    return ""
