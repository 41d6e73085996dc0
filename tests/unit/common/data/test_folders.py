"""Every image of a folder is found, in its split and class, whatever names its files have."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fedphd.common.config.data import DataConfig
from fedphd.common.data.folders import load_folder, split_folders
from fedphd.common.data.images import LabelledImages
from fedphd.common.data.sources import open_pictures
from fedphd.common.errors import ConfigError


def make(root: Path, *names: str) -> str:
    """8x8 grey images below ``root``; the first has brightness 1, the next 2, and so on."""
    for brightness, name in enumerate(names, start=1):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), brightness).save(path)
    return str(root)


def found(source: str, split: str = "train") -> dict[int, int]:
    """The label of every image, by the image's brightness."""
    data = LabelledImages(DataConfig(source=source, split=split))
    images = data.decode(image_size=8, channels=1).images
    brightness = images[:, 0, 0, 0].tolist()
    assert len(set(brightness)) == len(brightness)
    return dict(zip(brightness, data.labels.tolist(), strict=True))


def files_of(source: str, split: str = "train") -> list[str] | None:
    """The files of the images that are read, without asking for labels."""
    return open_pictures(DataConfig(source=source, split=split)).names()


def test_images_named_like_a_split_are_not_lost(tmp_path: Path) -> None:
    names = ["cats/test_01.png", "cats/2.png", "cats/my val-3.PNG", "dogs/train.png", "dogs/5.png",
             "dogs/dev 6.png"]  # fmt: skip
    source = make(tmp_path / "images", *names)
    assert found(source) == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1}
    assert files_of(source) == sorted(names)


def test_a_class_may_be_named_like_a_split(tmp_path: Path) -> None:
    source = make(tmp_path / "beside others", "cat/1.png", "dev/2.png", "test/3.png")
    assert found(source) == {1: 0, 2: 1, 3: 2}
    source = make(tmp_path / "alone", "dev/1.png", "test/2.png")
    assert found(source) == {1: 0, 2: 1}
    source = make(tmp_path / "in train data", "x/dev/1.png", "y/test/2.png")
    assert found(source) == {1: 0, 2: 1}
    source = make(tmp_path / "engines", "electric-train/1.png", "steam-train/2.png")
    assert found(source) == {1: 0, 2: 1}


@pytest.mark.parametrize("inside", ["", "birds/"])
def test_split_folders_are_splits(
    tmp_path: Path, inside: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["train/tit/1.png", "train/wren/2.png", "val/wren/3.png", "test/wren/4.png"]
    source = make(tmp_path / "images", *[inside + name for name in names])
    with caplog.at_level(logging.INFO, logger="fedphd.common.data.folders"):
        assert found(source) == {1: 0, 2: 1}
    assert "the splits test (1 images), train (2 images), validation (1 images)" in caplog.text
    # A class has the same number in every split, though a tit is not in all.
    assert found(source, "validation") == {3: 1}
    assert found(source, "test") == {4: 1}
    only = re.escape("has only the splits ['test', 'train', 'validation']")
    with pytest.raises(ConfigError, match=f"split = 'dev': .* {only}"):
        found(source, "dev")


def test_a_folder_without_splits_has_no_other_than_train(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "cat/1.png", "dog/2.png")
    with pytest.raises(ConfigError, match=r"split = 'test': .* only the splits \['train'\]"):
        found(source, "test")


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (["train/1.png", "test/2.png"], {"train", "test"}),
        (["Training/a/1.png", "Testing/a/2.png"], {"train", "test"}),
        (["train_images/a/1.png", "images-test/a/2.png"], {"train", "test"}),
        (["test/a/1.png"], {"test"}),
        (["train/1.png"], {"train"}),
        (["trains/a/1.png", "latest/a/2.png"], {"train"}),
        (["train/a/1.png", "test/a/2.png", "3.png"], {"train"}),
        (["a/train/1.png", "b/test/2.png"], {"train"}),
        (["dev/1.png", "test/2.png"], {"train"}),
        (["train/1.png", "Training/2.png"], {"train"}),
        (["train-1/1.png", "train-2/2.png", "test/3.png"], {"train", "test"}),
    ],
)
def test_what_is_a_split(paths: list[str], splits: set[str]) -> None:
    made = split_folders(paths)
    assert set(made) == splits
    assert sorted(path for of_split in made.values() for path in of_split) == sorted(paths)


def test_test_images_without_classes_do_not_become_a_class(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "train/1.png", "test/2.png")
    assert files_of(source) == ["train/1.png"]
    with pytest.raises(ConfigError, match=r"label_column = 'label': .* one sub-folder per class"):
        found(source)


def test_a_single_class_is_enough(tmp_path: Path) -> None:
    assert found(make(tmp_path / "named", "cat/1.png", "cat/2.png")) == {1: 0, 2: 0}
    assert found(make(tmp_path / "numbered", "7/1.png", "7/2.png")) == {1: 7, 2: 7}


def test_folders_at_unlike_depths_are_no_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make(tmp_path / "images", "cat/1.png", "dog/small/2.png")
    with pytest.raises(ConfigError, match="label_column = 'label'"):
        found(source)
    assert "such as cat/1.png and dog/small/2.png: their folders are not" in caplog.text


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "dog/1.png", "fox/2.png", "cat/3.png", "4.png")
    source = make(tmp_path / "images", "dog/1.png", "fox/2.png")
    (tmp_path / "images/cat").symlink_to(tmp_path / "elsewhere/cat")
    (tmp_path / "images/dog/more.png").symlink_to(tmp_path / "elsewhere/4.png")
    assert found(source) == {1: 1, 2: 2, 3: 0, 4: 1}
    assert files_of(source) == ["cat/3.png", "dog/1.png", "dog/more.png", "fox/2.png"]


def test_links_that_lead_nowhere_or_back_are_named(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "cat/1.png", "dog/2.png")
    link = tmp_path / "images/dog/gone.png"
    link.symlink_to(tmp_path / "nothing.png")
    with pytest.raises(ConfigError, match=r"gone\.png' links to '.*nothing\.png', which is not"):
        found(source)
    link.unlink()
    (tmp_path / "images/dog/again").symlink_to(tmp_path / "images")
    with pytest.raises(ConfigError, match="again' links to a folder that it lies in"):
        found(source)


@pytest.mark.parametrize("name", ["a[b]", "[!x]*?", "\N{GRINNING FACE}", "a b", "é"])
def test_any_name_of_a_place_will_do(tmp_path: Path, name: str) -> None:
    source = make(tmp_path / name / "images", f"{name}/1.png", f"{name} 2/{name}.png")
    assert found(source) == {1: 0, 2: 1}
    table = datasets.Dataset.from_dict(
        {"image": [Image.new("L", (8, 8), 5)], "label": [1]},
        features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64")),
    )
    (tmp_path / name / "parquet").mkdir()
    table.to_parquet(tmp_path / name / "parquet" / f"{name}.parquet")
    table.save_to_disk(tmp_path / name / "saved")
    for place in ("parquet", f"parquet/{name}.parquet", "saved"):
        assert found(str(tmp_path / name / place)) == {5: 1}


def test_a_name_that_is_not_text_is_named(tmp_path: Path) -> None:
    make(tmp_path / "images", "cat/1.png")
    os.rename(tmp_path / "images/cat/1.png", os.fsencode(tmp_path / "images/cat") + b"/\xff.png")
    with pytest.raises(ConfigError, match=r"cat/\\xff\.png' is not UTF-8; rename it"):
        found(str(tmp_path / "images"))


def test_hidden_files_are_left_out_and_others_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make(tmp_path / "images", "cat/1.png", "dog/2.png", "dog/._2.png", "__MACOSX/3.png")
    (tmp_path / "images/dog/4.HEIC").write_bytes(b"")
    assert files_of(source) == ["cat/1.png", "dog/2.png"]
    assert caplog.messages == [f"source = {source!r}: files that are not read as images: 1 .heic"]


def test_a_place_without_images_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no image files \(it has nothing\); name the"):
        load_folder(str(tmp_path))
    (tmp_path / "all.zip").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"it has 1 \.zip\); unpack the archive"):
        load_folder(str(tmp_path))
    with pytest.raises(ConfigError, match="is a file, not an image folder"):
        load_folder(str(tmp_path / "all.zip"))


# datasets leaves them open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_metadata_describe_the_images_beside_them(tmp_path: Path) -> None:
    source = make(tmp_path / "some [images]", "train/test 1.png", "train/2.png", "test/3.png")
    rows = {"train": "test 1.png,3\n2.png,4\n", "test": "3.png,5\n"}
    for split, text in rows.items():
        (tmp_path / "some [images]" / split / "metadata.csv").write_text(f"file_name,label\n{text}")
    assert found(source) == {1: 3, 2: 4}
    assert found(source, "test") == {3: 5}


def described(folder: Path, *rows: str) -> None:
    """Metadata beside the images in ``folder``, which give each of ``rows`` label 7."""
    lines = ["file_name,label", *(f"{row},7" for row in rows)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_metadata_of_one_split_leave_the_others_alone(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "train/cat/1.png", "train/dog/2.png", "test/3.png")
    described(tmp_path / "images/test", "./3.png")
    assert found(source) == {1: 0, 2: 1}
    assert found(source, "test") == {3: 7}
    described(tmp_path / "images", "train/cat/1.png", "train/dog/2.png", "test/3.png")
    with pytest.raises(ConfigError, match=r"'metadata.csv' lies above the images of 2 splits \(te"):
        files_of(source)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_images_that_metadata_leave_out_are_named(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "cats/1.png", "cats/2.png", "dogs/3.png")
    described(tmp_path / "images/dogs", "3.png")
    with pytest.raises(ConfigError, match=r"dogs/metadata.csv has no row for 2 of 3 images, such"):
        found(source)
    described(tmp_path / "images/cats", "1.png", "2.png")
    assert found(source) == {1: 7, 2: 7, 3: 7}


def test_a_class_folder_with_a_number_too_large_is_named(tmp_path: Path) -> None:
    source = make(tmp_path / "images", f"{10**25}/1.png", "1/2.png")
    with pytest.raises(ConfigError, match=f"class folder {10**25} is a label above 2147483647"):
        found(source)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "images", "cat/1.png", "dog/2.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/images") == {1: 0, 2: 1}
    assert files_of("~/images") == ["cat/1.png", "dog/2.png"]
    with pytest.raises(ConfigError, match="source = '~nobody-at-all/images': no such file"):
        found("~nobody-at-all/images")


def test_images_are_in_the_order_of_datasets(tmp_path: Path) -> None:
    """Which images a client's part holds, and so its name, goes by their order."""
    draw = np.random.default_rng(0)
    names = [
        f"{folder}/{'xXé- _('[draw.integers(7)]}{draw.integers(99)}.{ending}"
        for folder in ("a", "a-b", "a b", "A", "10", "9", "é")
        for ending in ("png", "JPG", "jpeg")
    ]
    source = make(tmp_path / "images", *names)
    theirs = datasets.load_dataset("imagefolder", data_dir=source)["train"]
    ours = load_folder(source)["train"]
    bare = datasets.Image(decode=False)
    assert ours.cast_column("image", bare)[:] == theirs.cast_column("image", bare)[:]
    assert ours.features == theirs.features
