from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fedphd.common.config.data import DataConfig, PartitionConfig
from fedphd.common.data import labelled, sources
from fedphd.common.data.images import ImageSet, LabelledImages, to_model_range
from fedphd.common.data.labelled import LabelledData
from fedphd.common.data.partition import all_parts, partition_name
from fedphd.common.errors import ConfigError

CIFAR10 = Path(__file__).parents[5] / "shared/data/cifar10/train.parquet"


def load(config: DataConfig, *, size: int = 8, channels: int = 1, classes: int = 10) -> ImageSet:
    """All images of the configured part."""
    data = LabelledImages(config)
    data.check_classes(classes)
    return data.decode(image_size=size, channels=channels)


def part_of(config: PartitionConfig, labels: np.ndarray) -> list[list[int]]:
    """The positions of every part, in order."""
    return [part.tolist() for part in all_parts(labels, config)]


def counts_of(data: ImageSet, num_classes: int = 10) -> list[int]:
    """Images of each class."""
    return torch.bincount(data.labels, minlength=num_classes).tolist()


def grey(value: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("L", size, value)


def table(labels: list[object], images: list[Image.Image] | None = None) -> datasets.Dataset:
    """A data set with one grey image per label, brightness 10 times its position."""
    pictures = images or [grey(10 * index) for index in range(len(labels))]
    columns = datasets.Dataset.from_dict({"image": pictures, "label": labels})
    return columns.cast_column("image", datasets.Image())


def test_digits_are_scaled_from_16_levels_to_bytes() -> None:
    digits = load(DataConfig())
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    assert digits.labels.dtype == torch.int64
    # First row of the first digit: 0 0 5 13 9 1 0 0 of 16; 5 * 255 / 16 = 79.7.
    assert digits.images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert digits.images.max() == 255
    assert counts_of(digits) == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("file", ["datasets/data/digits.csv.gz", "not/there.csv.gz"])
def test_digits_are_scikit_learns(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library itself is asked where its file has moved.
    monkeypatch.setattr(sources, "_DIGITS_FILE", file)
    images, labels = sources.digit_arrays()
    digits = load_digits()
    assert np.array_equal(images, np.rint(digits.images * 255 / 16))
    assert np.array_equal(labels, digits.target)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)


def test_model_range_is_minus_one_to_one() -> None:
    values = to_model_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert torch.allclose(values, torch.tensor([-1.0, -0.6, 1.0]))


@pytest.mark.parametrize("kind", ["pathological", "dirichlet", "iid"])
def test_parts_share_out_every_image_once(kind: str) -> None:
    labels = load(DataConfig()).labels.numpy()
    config = PartitionConfig(kind=kind, num_partitions=6)
    parts = part_of(config, labels)
    assert sorted(index for part in parts for index in part) == list(range(1797))
    assert parts == part_of(config, labels)
    assert parts != part_of(config.model_copy(update={"seed": 1}), labels)


def test_pathological_parts_take_classes_in_turn() -> None:
    counts = [
        counts_of(load(DataConfig(partition=PartitionConfig(partition_id=part))))
        for part in range(6)
    ]
    held = [{label for label in range(10) if part[label]} for part in counts]
    assert held == [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {0, 1}]
    assert [part[0] for part in counts] == [89, 0, 0, 0, 0, 89]
    assert counts[1][2:4] == [177, 183]


def test_pathological_parts_refuse_to_leave_classes_out() -> None:
    labels = np.arange(100) % 10
    four = PartitionConfig(num_partitions=4, classes_per_partition=2)
    with pytest.raises(
        ConfigError,
        match=r"leaves out 2 of 10 classes; use at least 5 parts \(num_partitions\), or 3 classes",
    ):
        all_parts(labels, four)
    with pytest.raises(ConfigError, match=r"classes_per_partition = 11, .* only 10 classes"):
        all_parts(labels, PartitionConfig(classes_per_partition=11))
    with pytest.raises(ConfigError, match="fewer images than parts that take it"):
        all_parts(np.array([0, 1, 1, 1]), PartitionConfig(num_partitions=4))


def test_dirichlet_parts_that_cannot_be_drawn_name_alpha_and_minimum() -> None:
    labels = np.arange(60) % 2
    config = PartitionConfig(kind="dirichlet", num_partitions=6, alpha=0.01, min_partition_size=10)
    with pytest.raises(ConfigError, match=r"alpha = 0\.01 .* min_partition_size = 10 images"):
        all_parts(labels, config)


def test_a_split_has_a_name_that_tells_it_from_others() -> None:
    def name_of(source: str = "digits", labels: np.ndarray | None = None, **values: object) -> str:
        config = PartitionConfig.model_validate({"num_partitions": 10, **values})
        parts = all_parts(np.arange(60) % 10 if labels is None else labels, config)
        return partition_name(source, config, parts)

    plain = name_of()
    assert re.fullmatch("digits-pathological-2x10-seed0-[0-9a-f]{8}", plain)
    # Whichever part a process holds, the split is the same.
    assert name_of(partition_id=3) == plain
    assert name_of(seed=1).startswith("digits-pathological-2x10-seed1-")
    assert name_of(seed=1)[-8:] != plain[-8:]
    # Other labels give other parts under the same settings.
    assert name_of(labels=np.arange(60)[::-1] % 10)[-8:] != plain[-8:]
    assert name_of(kind="dirichlet", alpha=0.5, min_partition_size=1).startswith(
        "digits-dirichlet-0.5x10-seed0-"
    )
    assert name_of("/data/CIFAR-10/train.parquet", kind="iid").startswith("cifar-10-iid-10-seed0-")
    assert name_of("uoft-cs/cifar10", kind="iid").startswith("cifar10-iid-10-seed0-")


def test_the_hash_of_a_split_is_over_lengths_and_positions() -> None:
    parts = [np.array([0, 2]), np.array([1])]
    digest = hashlib.sha256(np.array([2, 0, 2, 1, 1], dtype="<i8").tobytes()).hexdigest()
    name = partition_name("digits", PartitionConfig(num_partitions=2), parts)
    assert name == f"digits-pathological-2x2-seed0-{digest[:8]}"


def test_opened_images_name_their_split(caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(partition=PartitionConfig(partition_id=1))
    with caplog.at_level(logging.INFO, logger="fedphd.common.data.labelled"):
        opened = LabelledImages(config)
    assert opened.part_sizes == (180, 360, 363, 360, 354, 180)
    assert caplog.messages == [f"part 1 of {opened.partition_name}: 360 images"]
    assert LabelledImages(DataConfig()).partition_name is None


def test_more_parts_than_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_partitions = 6, but .* only 4 images"):
        all_parts(np.array([0, 0, 1, 1]), PartitionConfig(kind="iid"))


def test_only_the_own_part_is_decoded(tmp_path: Path) -> None:
    data = table([0, 0, 1, 1], [grey(1), grey(2), grey(3), grey(4)])
    encoded = data.cast_column("image", datasets.Image(decode=False)).to_dict()
    for index in (2, 3):
        encoded["image"][index]["bytes"] = b"no image"
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(encoded).to_parquet(path)
    split = PartitionConfig(num_partitions=2, classes_per_partition=1)
    own = DataConfig(source=str(path), partition=split)
    assert load(own).images[:, 0, 0, 0].tolist() == [1, 2]
    with pytest.raises(ConfigError, match=r"image 2 \(from 0\) cannot be decoded"):
        load(DataConfig(source=str(path)))


def test_everybody_uses_the_same_images_of_a_bounded_number() -> None:
    bounded = LabelledImages(DataConfig(max_images=100)).decode(image_size=8, channels=1)
    parts = [
        load(DataConfig(max_images=100, partition=PartitionConfig(partition_id=i, seed=3)))
        for i in range(6)
    ]
    assert len(bounded) == sum(map(len, parts)) == 100
    together = {image.numpy().tobytes() for part in parts for image in part.images}
    assert together == {image.numpy().tobytes() for image in bounded.images}
    # Drawn from all of them: the data set is not sorted, yet its first 100 are others.
    first = load(DataConfig()).images[:100]
    assert not torch.equal(bounded.images, first)
    assert len(LabelledImages(DataConfig(max_images=9999)).labels) == 1797


def test_validation_images_are_disjoint_seeded_and_never_none_or_all() -> None:
    def split(fraction: float, seed: int = 0) -> tuple[ImageSet, ImageSet | None]:
        part = PartitionConfig(kind="iid", num_partitions=20, seed=seed)
        config = DataConfig(partition=part, validation_fraction=fraction)
        return LabelledImages(config).split(image_size=8, channels=1)

    train, validation = split(0.1)
    assert validation is not None
    assert (len(train), len(validation)) == (81, 9)
    whole, none = split(0.0)
    assert none is None
    together = torch.cat([train.images, validation.images])
    assert sorted(image.tolist() for image in together) == sorted(
        image.tolist() for image in whole.images
    )
    again = split(0.1)[1]
    assert again is not None
    assert torch.equal(again.images, validation.images)
    least = split(0.001)[1]
    assert least is not None
    assert len(least) == 1
    with pytest.raises(ConfigError, match=r"validation_fraction = 0\.999 leaves none of 90"):
        split(0.999)


def test_opened_images_say_labels_before_any_size_is_known() -> None:
    opened = LabelledImages(DataConfig(partition=PartitionConfig(), validation_fraction=0.1))
    assert np.bincount(opened.labels).tolist() == [89, 91]
    assert (len(opened.train_indices), len(opened.validation_indices)) == (162, 18)
    small = opened.decode(image_size=8, channels=1)
    assert opened.decode(image_size=8, channels=1) is small
    train, _ = opened.split(image_size=8, channels=1)
    assert torch.equal(train.labels, torch.from_numpy(opened.labels[opened.train_indices]))


@pytest.mark.parametrize("source", ["file", "folder"])
def test_parquet_is_read_from_a_file_or_a_folder(tmp_path: Path, source: str) -> None:
    path = tmp_path / "data" / "train.parquet"
    path.parent.mkdir()
    table([2, 0, 1]).to_parquet(path)
    data = load(DataConfig(source=str(path if source == "file" else path.parent)))
    assert data.images[:, 0, 3, 3].tolist() == [0, 10, 20]
    assert data.labels.tolist() == [2, 0, 1]


def test_saved_data_sets_are_read_by_split(tmp_path: Path) -> None:
    splits = datasets.DatasetDict(
        {
            "train": table([0, 1]),
            "test": datasets.concatenate_datasets([table([1, 1, 1])], split=datasets.Split.TEST),
        }
    )
    splits.save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    assert load(DataConfig(source=saved)).labels.tolist() == [0, 1]
    assert load(DataConfig(source=saved, split="test")).labels.tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"split = 'dev': .* only the splits \['test', 'train'\]"):
        load(DataConfig(source=saved, split="dev"))
    table([4, 5]).save_to_disk(tmp_path / "single")
    single = DataConfig(source=str(tmp_path / "single"))
    assert load(single).labels.tolist() == [4, 5]
    with pytest.raises(ConfigError, match=r"split = 'test': .* has only the split 'train'; leave"):
        load(single.model_copy(update={"split": "test"}))
    splits["test"].save_to_disk(tmp_path / "alone")
    alone = DataConfig(source=str(tmp_path / "alone"))
    for split in ("test", "train"):
        assert load(alone.model_copy(update={"split": split})).labels.tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"split = 'dev': .* has only the split 'test'"):
        load(alone.model_copy(update={"split": "dev"}))


@pytest.mark.parametrize(
    ("folders", "labels"),
    [(("cat", "dog"), [0, 1]), (("3", "10"), [3, 10])],
    ids=["names in order", "numbers as they are"],
)
def test_sub_folders_of_an_image_folder_are_classes(
    tmp_path: Path, folders: tuple[str, ...], labels: list[int]
) -> None:
    for index, name in enumerate(folders):
        (tmp_path / "images" / name).mkdir(parents=True)
        grey(index + 1).save(tmp_path / "images" / name / "a.png")
    data = load(DataConfig(source=str(tmp_path / "images")), classes=11)
    found = dict(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True))
    assert found == {1: labels[0], 2: labels[1]}


def test_an_image_folder_without_classes_says_how_to_make_them(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    grey(1).save(tmp_path / "images" / "a.png")
    grey(2).save(tmp_path / "images" / "b.png")
    with pytest.raises(ConfigError, match=r"label_column = 'label'.*one sub-folder per class"):
        load(DataConfig(source=str(tmp_path / "images")))


def test_images_become_the_wanted_mode_and_size_and_the_log_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    red = Image.new("RGB", (16, 32), (200, 0, 0))
    red.paste((0, 0, 255), (0, 0, 16, 4))  # outside the central square
    table([0, 1], [red, red.copy()]).save_to_disk(tmp_path / "saved")
    config = DataConfig(source=str(tmp_path / "saved"))
    with caplog.at_level(logging.INFO, logger="fedphd.common.data.images"):
        colour = load(config, channels=3)
    assert colour.images.shape == (2, 3, 8, 8)
    assert colour.images[0, :, 4, 4].tolist() == [200, 0, 0]
    assert colour.images[0, 2].max() <= 1
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "images such as 16 x 32 pixels are cut to squares and resized to 8 x 8"
    ]
    assert load(config).images[0, 0, 4, 4] == 60  # 0.299 * 200


def test_images_with_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16))
    table([0], [deep]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"image 0 .* has more than 8 bits .* \(mode I;16\)"):
        load(DataConfig(source=str(tmp_path / "saved")))


def test_labels_must_fit_num_classes() -> None:
    with pytest.raises(ConfigError, match=r"num_classes = 9, .* 10 classes .* at least 10"):
        load(DataConfig(), classes=9)


def test_a_reference_needs_all_classes_among_the_images_used() -> None:
    LabelledData(DataConfig()).check_covers(10)
    few = LabelledData(DataConfig(max_images=5))
    with pytest.raises(
        ConfigError, match=r"but the 5 images used of .* has only . classes; use mo"
    ):
        few.check_covers(10)
    with pytest.raises(ConfigError, match="but source = 'digits' has only 10 classes; set num_cl"):
        LabelledData(DataConfig()).check_covers(11)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], "labels must be whole numbers"),
        ([0.5, 1.0], "labels must be whole numbers"),
        ([0, None, 1, None], r"2 of 4 images of source = .* have no label \(rows 1, 3, from 0\)"),
        ([0] + 4 * [None], r"have no label \(rows 1, 2, 3, \.\.\., from 0\)"),
        ([-1, 0], "labels from -1; labels must be 0 to"),
    ],
)
def test_labels_that_are_not_classes_are_refused(
    tmp_path: Path, labels: list[object], message: str
) -> None:
    table(labels).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=message):
        load(DataConfig(source=str(tmp_path / "saved")))


def test_wrong_columns_are_named_with_those_there(tmp_path: Path) -> None:
    table([0, 1]).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    columns = r"columns are \['image', 'label'\]"
    with pytest.raises(ConfigError, match=f"image_column = 'img'.*{columns}"):
        load(DataConfig(source=saved, image_column="img"))
    with pytest.raises(ConfigError, match=f"label_column = 'fine'.*{columns}"):
        load(DataConfig(source=saved, label_column="fine"))
    with pytest.raises(ConfigError, match=r"image_column = 'label' .* not images"):
        load(DataConfig(source=saved, image_column="label"))


@pytest.mark.parametrize("source", ["/no/such/data", "./no_such_folder", "no_such.parquet"])
def test_paths_that_are_not_there_are_named(source: str) -> None:
    with pytest.raises(ConfigError, match=f"source = '{source}': no such file or folder; set it"):
        load(DataConfig(source=source))


def test_a_path_that_begins_in_a_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"source = 'images/nope': no such file .* format to 'hub'"
    ):
        load(DataConfig(source="images/nope"))


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    broken, text = tmp_path / "broken.parquet", tmp_path / "data.csv"
    broken.write_bytes(b"PAR1 no parquet")
    text.write_text("image,label")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        load(DataConfig(source=str(broken)))
    with pytest.raises(ConfigError, match=r"is a file but not \.parquet"):
        load(DataConfig(source=str(text)))


def test_a_hub_name_that_cannot_be_reached_suggests_a_local_path(tmp_path: Path) -> None:
    program = (
        "from fedphd.common.data.images import LabelledImages\n"
        "from fedphd.common.config.data import DataConfig\n"
        "LabelledImages(DataConfig(source='nobody/nothing'))\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=False
    )
    last = result.stderr.strip().splitlines()[-1]
    assert "ConfigError: source = 'nobody/nothing' is not a file or folder here" in last
    assert "set source to a local path" in last


@pytest.mark.skipif(not CIFAR10.exists(), reason=f"{CIFAR10} is not on this machine")
def test_one_part_of_cifar10_loads_from_parquet() -> None:
    part = PartitionConfig(num_partitions=200, partition_id=7)
    data = load(DataConfig(source=str(CIFAR10), partition=part), size=32, channels=3)
    assert data.images.shape == (250, 3, 32, 32)
    assert counts_of(data) == [0, 0, 0, 0, 125, 125, 0, 0, 0, 0]
    assert 90 < data.images.float().mean() < 150


def test_a_process_with_many_parts_cuts_the_data_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[int] = []

    def counted(labels: np.ndarray, config: PartitionConfig) -> list[np.ndarray]:
        cuts.append(config.num_partitions)
        return all_parts(labels, config)

    monkeypatch.setattr(labelled, "all_parts", counted)
    path = tmp_path / "some.parquet"
    table([n % 5 for n in range(25)]).to_parquet(str(path))
    found = []
    for part in range(5):
        partition = PartitionConfig(num_partitions=5, partition_id=part)
        fraction = 0.25 if part % 2 else 0.0
        config = DataConfig(source=str(path), partition=partition, validation_fraction=fraction)
        images = LabelledImages(config).decode(image_size=8, channels=1).images
        # Brightness is 10 times the position.
        found += images[:, 0, 0, 0].tolist()
    assert cuts == [5]
    assert sorted(found) == [10 * n for n in range(25)]
