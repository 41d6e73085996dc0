"""What is no image of 8 bits per channel is refused by its name, before a run needs it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedphd.common.config.data import DataConfig, PartitionConfig
from fedphd.common.data.images import LabelledImages
from fedphd.common.data.labelled import MOST_CHECKED, LabelledData
from fedphd.common.errors import ConfigError


def png(values: list[int], *, colour: int, bits: int) -> bytes:
    """A PNG of 1 pixel, which Pillow cannot write with 16 bits of colour.

    ``colour`` is PNG's code: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 1, 1, bits, colour, 0, 0, 0)
    row = b"\0" + np.array(values, dtype=">u2" if bits == 16 else "u1").tobytes()
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(bits: int) -> bytes:
    """An uncompressed RGB TIFF of 1 pixel."""
    size = bits // 8
    # Width, height, bits (at 150), no compression, RGB, pixel (at 156), 3 samples, rows, bytes.
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 150), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, 156), (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 3 * size)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4
    return head.ljust(150, b"\0") + struct.pack("<HHH", *(bits,) * 3) + b"\x9c" * 3 * size


def folder_of(tmp_path: Path, name: str, content: bytes) -> str:
    path = tmp_path / "images" / "cats" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(tmp_path / "images")


DEEP = {
    "grey.png": png([40000], colour=0, bits=16),
    "rgb.png": png([40000] * 3, colour=2, bits=16),
    "grey-alpha.png": png([40000] * 2, colour=4, bits=16),
    "rgba.png": png([40000] * 4, colour=6, bits=16),
    "rgb.tiff": tiff(16),
    "rgb.ppm": b"P6 1 1 65535\n" + b"\x9c\x40" * 3,
    "text.ppm": b"P3 1 1 1023\n1 2 3\n",
    "grey.pgm": b"P5 1 1 65535\n\x9c\x40",
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_per_channel_are_refused_by_name(tmp_path: Path, name: str) -> None:
    source = folder_of(tmp_path, name, DEEP[name])
    file = rf"image 0 \(from 0\), '{source}/cats/{name}',"
    with pytest.raises(ConfigError, match=f"{file} has more than 8 bits per channel .*; convert"):
        LabelledImages(DataConfig(source=source)).check_images()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rgb.png", png([156, 1, 2], colour=2, bits=8)),
        ("rgb.tiff", tiff(8)),
        ("rgb.ppm", b"P6 1 1 255\n\x9c\x9c\x9c"),
        ("few.ppm", b"P3 1 1 5\n3 3 3\n"),
        ("text.pbm", b"P1 1 1\n0\n"),
    ],
    ids=["png", "tiff", "ppm", "ppm of few values", "pbm in text"],
)
def test_8_bits_per_channel_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    data = LabelledImages(DataConfig(source=folder_of(tmp_path, name, content)))
    red = int(data.decode(image_size=1, channels=3).images[0, 0, 0, 0])
    assert red == {"few.ppm": 153, "text.pbm": 255}.get(name, 156)


@pytest.mark.parametrize("mode", ["LAB", "CMYK", "YCbCr"])
def test_colours_in_other_spaces_become_grey(tmp_path: Path, mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, "TIFF")
    data = LabelledImages(DataConfig(source=folder_of(tmp_path, "a.tif", file.getvalue())))
    assert data.decode(image_size=8, channels=1).images.float().std() == 0


def test_images_are_turned_as_the_camera_was_held(tmp_path: Path) -> None:
    upright = Image.new("L", (8, 8), 200)
    upright.paste(0, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    file = io.BytesIO()
    upright.save(file, "PNG", exif=exif)
    data = LabelledImages(DataConfig(source=folder_of(tmp_path, "a.png", file.getvalue())))
    assert data.decode(image_size=8, channels=1).images[0, 0, :, 0].tolist() == [200] * 4 + [0] * 4


def broken(source: Path, number: int) -> Path:
    """The image of that number, without its end."""
    path = source / "0" / f"{number:03}.png"
    path.write_bytes(path.read_bytes()[:45])
    return path


def images(tmp_path: Path, num: int) -> Path:
    source = tmp_path / "images"
    for number in range(num):
        (source / "0").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(source / "0" / f"{number:03}.png")
    return source


@pytest.mark.parametrize("number", [0, 7, 9])
def test_a_broken_image_is_found_by_a_look_at_some(tmp_path: Path, number: int) -> None:
    source = images(tmp_path, 10)
    path = broken(source, number)
    with pytest.raises(
        ConfigError, match=rf"image {number} \(from 0\), '{path}', cannot be decoded"
    ):
        LabelledImages(DataConfig(source=str(source))).check_images()
    # Its labels can be known.
    assert len(LabelledData(DataConfig(source=str(source))).labels) == 10


def test_a_few_images_are_looked_at_from_all_over_the_part(tmp_path: Path) -> None:
    source = images(tmp_path, 2 * MOST_CHECKED)
    assert LabelledData(DataConfig(source=str(source))).check_images() == MOST_CHECKED
    assert LabelledData(DataConfig(source=str(source))).check_images(3) == 3
    broken(source, MOST_CHECKED + 1)
    LabelledImages(DataConfig(source=str(source))).check_images()
    path = broken(source, MOST_CHECKED)
    with pytest.raises(ConfigError, match=path.name):
        LabelledImages(DataConfig(source=str(source))).check_images()


def test_only_images_of_the_own_part_are_looked_at(tmp_path: Path) -> None:
    source = images(tmp_path, 20)
    parts = [PartitionConfig(kind="iid", num_partitions=2, partition_id=n) for n in range(2)]
    configs = [DataConfig(source=str(source), partition=part) for part in parts]
    brightness = LabelledImages(configs[0]).decode(image_size=8, channels=1).images[:, 0, 0, 0]
    broken(source, int(brightness[0]))
    LabelledImages(configs[1]).check_images()
    with pytest.raises(ConfigError, match="cannot be decoded"):
        LabelledImages(configs[0]).check_images()


def test_the_digits_have_no_other_split() -> None:
    with pytest.raises(ValueError, match=r"split = 'test': the embedded digits have only the spl"):
        DataConfig(split="test")
    assert DataConfig(source="./digits", split="test").split == "test"
    assert DataConfig(format="hub", split="test").split == "test"
