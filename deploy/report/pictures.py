"""Pictures inside the page: small enough that the whole page stays below its limit."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

# The whole page has 2 MB; figures and tables need the rest.
BUDGET_BYTES: Final = 1_000_000
MOST_FRAMES: Final = 24
# Sides in pixels and quality of WebP, tried in turn until a picture is small enough.
_TRIES: Final = ((800, 90), (640, 80), (480, 75), (320, 70), (240, 50), (160, 40))


@dataclass(frozen=True)
class Picture:
    """A picture in the page: ``address`` holds its bytes."""

    address: str
    width: int
    height: int


def thinned(items: Sequence[Path], most: int = MOST_FRAMES) -> list[Path]:
    """At most so many of them, evenly, with the first and the last."""
    if len(items) <= most:
        return [*items]
    last = len(items) - 1
    return [items[round(number * last / (most - 1))] for number in range(most)]


def embedded(path: Path, most_bytes: int) -> Picture:
    """The picture in a file as a part of the page, without loss where that fits.

    Base64 included it has at most ``most_bytes``, or else the least of what was tried. Raises
    OSError if it cannot be read.
    """
    with Image.open(path) as file:
        picture = file.convert("L" if file.mode in ("1", "L") else "RGB")
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    kind = "png"
    for side, quality in _TRIES:
        if _encoded_size(data) <= most_bytes:
            break
        kind, data = "webp", io.BytesIO()
        smaller = picture.copy()
        smaller.thumbnail((side, side))
        smaller.save(data, "WEBP", quality=quality)
    text = base64.b64encode(data.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{text}", *picture.size)


def _encoded_size(data: io.BytesIO) -> int:
    return len(data.getvalue()) * 4 // 3
