"""Pictures that fit into the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from fedphd.deploy.report.pictures import embedded, thinned


def noise(path: Path, side: int, channels: int = 3) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (side, side, channels), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def opened(address: str) -> Image.Image:
    kind, _, text = address.partition(";base64,")
    assert kind in ("data:image/png", "data:image/webp")
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_small_picture_keeps_its_pixels(tmp_path: Path) -> None:
    path = noise(tmp_path / "a.png", 20)
    picture = embedded(path, 10_000)
    assert (picture.width, picture.height) == (20, 20)
    with Image.open(path) as file:
        assert np.array_equal(np.asarray(opened(picture.address)), np.asarray(file))


def test_a_large_picture_is_made_to_fit(tmp_path: Path) -> None:
    path = noise(tmp_path / "a.png", 400)
    assert path.stat().st_size > 400_000
    picture = embedded(path, 40_000)
    assert len(picture.address) <= 40_100
    # It takes as much room on the page as before.
    assert (picture.width, picture.height) == (400, 400)
    assert opened(picture.address).format == "WEBP"


def test_first_and_last_stay_when_there_are_too_many() -> None:
    files = [Path(str(number)) for number in range(100)]
    kept = thinned(files, 4)
    assert [int(path.name) for path in kept] == [0, 33, 66, 99]
    assert thinned(files[:3], 4) == files[:3]
