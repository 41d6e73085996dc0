"""Labels by clustering."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.command import fedphd

from fedphd.common.config.data import DataConfig, PartitionConfig
from fedphd.common.data.images import LabelledImages
from fedphd.common.errors import ConfigError
from fedphd.deploy.cli.pseudo_labels import cluster


def test_clusters_are_numbered_by_size_and_repeat() -> None:
    # 5 dark, 9 bright and 2 half-bright images, each with a little noise.
    levels = np.array([30] * 5 + [220] * 9 + [120] * 2)
    noise = np.random.default_rng(0).integers(-5, 6, (16, 1, 4, 4))
    images = torch.from_numpy((levels[:, None, None, None] + noise).astype(np.uint8))
    found = cluster(images, num_classes=3, num_components=4, seed=0)
    assert found.tolist() == [1] * 5 + [0] * 9 + [2] * 2
    assert found.tolist() == cluster(images, num_classes=3, num_components=4, seed=0).tolist()


def test_more_classes_than_different_images_are_refused() -> None:
    same = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="--classes = 2, but there are only 1 different images"):
        cluster(same, num_classes=2, num_components=4, seed=0)


def test_the_command_writes_labels_that_cut_the_data(tmp_path: Path) -> None:
    flags = ["--data", "digits", "--classes", "4", "--image-size", "8", "--channels", "1"]
    done = fedphd("pseudo-labels", *flags, "--out", "labels.csv", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    split = PartitionConfig(num_partitions=4, classes_per_partition=1, partition_id=2)
    config = DataConfig(label_file=str(tmp_path / "labels.csv"), partition=split)
    opened = LabelledImages(config)
    assert set(opened.labels.tolist()) == {2}
    sizes = ", ".join(map(str, opened.part_sizes))
    assert done.stdout == f"wrote     labels.csv: 1797 labels; images per class {sizes}\n"
    assert sum(opened.part_sizes) == 1797


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    flags = ["--data", "no data", "--classes", "2", "--image-size", "8", "--channels", "1"]
    done = fedphd("pseudo-labels", *flags, "--out", "no/labels.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "--out = no/labels.csv: is a folder, or its folder does not exist" in done.stderr
