"""Settings of the clients' data on their way to simulated and to local clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny import write_toml

from fedphd.common.config.data import DataConfig
from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.errors import ConfigError
from fedphd.deploy.launch.client_data import data_of, part_of_data, take_data, with_reference
from fedphd.deploy.simulation.run_config import (
    NAMED,
    SimulatedClients,
    client_config,
    default_run_config,
)

CELEBA = {
    "data.source": "faces",
    "data.partition.classes_per_partition": 1,
    "data.attribute_file": "list.txt",
    "data.label_attributes": ["Male", "Young"],
    # As `--set data.label_file=null` gives it: the default.
    "data.label_file": None,
}


def test_settings_of_the_data_are_parted_from_the_clouds() -> None:
    cloud, data = take_data({"seed": 3, "data.split": "test", "data.partition.alpha": 0.1})
    assert cloud == {"seed": 3}
    assert data == {"data.split": "test", "data.partition.alpha": 0.1}


@pytest.mark.parametrize(
    "key", ["data.colour", "data.partition.seed", "data.partition.partition_id"]
)
def test_what_is_no_setting_of_all_clients_data_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is not a setting of the clients' data; known: d"):
        take_data({key: 1})


def test_simulated_and_local_clients_get_the_same_data() -> None:
    cloud = load_config(CloudConfig, None, {"schedule.min_clients": 4, "seed": 5})
    run_config = {**default_run_config(), **SimulatedClients(CELEBA).run_config(cloud)}
    assert all(isinstance(value, str | int | float) for value in run_config.values())
    local = part_of_data(cloud, 2, CELEBA)
    assert client_config(run_config, 2, 4).data == local
    assert local.label_attributes == ("Male", "Young")
    assert local.partition is not None
    assert (local.partition.partition_id, local.partition.num_partitions) == (2, 4)
    assert (local.partition.seed, local.partition.classes_per_partition) == (5, 1)


def reference(
    values: dict[str, Any], data: dict[str, Any], path: Path | None = None
) -> DataConfig | None:
    """What samples are compared with, by a run of these settings."""
    found = with_reference(values, data, path)
    return load_config(CloudConfig, path, found).evaluation.reference


def test_samples_are_compared_with_the_clients_own_images() -> None:
    own = {"data.source": "x", "data.label_file": "l.csv", "data.partition.alpha": 0.1}
    assert reference({}, own) == DataConfig(source="x", label_file="l.csv")
    # Of the preset's only how many there are.
    small = reference({"preset": "cifar10-16"}, {"data.source": "x"})
    assert small == DataConfig(source="x", max_images=4000)
    fewer = {"data.source": "x", "data.max_images": 300, "data.image_column": "pixels"}
    assert reference({"preset": "cifar10-16"}, fewer) == DataConfig(
        source="x", max_images=300, image_column="pixels"
    )


def test_what_is_said_of_the_reference_stays(tmp_path: Path) -> None:
    own = {"data.source": "x"}
    assert reference({"evaluation.reference.source": "y"}, own) == DataConfig(source="y")
    assert reference({"evaluation.reference": None}, own) is None
    path = write_toml(tmp_path / "c.toml", {"evaluation.reference.source": "z"})
    assert reference({}, own, path) == DataConfig(source="z")
    # Nor is there one where the preset has none, or the images are the preset's.
    assert reference({"preset": "cifar10"}, own) is None
    assert with_reference({"seed": 3}, {"data.source": "digits"}) == {"seed": 3}
    assert with_reference({"seed": 3}, {}) == {"seed": 3}
    own |= {"data.max_images": 300}
    file = {"evaluation.reference_file": "s", "evaluation.features_file": "f"}
    assert with_reference(file, own) == file
    assert "evaluation.reference.source" in with_reference({"evaluation.reference_file": None}, own)


def test_a_detail_of_the_reference_leaves_it_the_clients_images(tmp_path: Path) -> None:
    own = {"data.source": "x", "data.image_column": "pixels"}
    few = {"evaluation.reference.max_images": 300}
    found = DataConfig(source="x", max_images=300, image_column="pixels")
    assert reference(few, own) == found
    assert reference(few, own | {"data.max_images": 500}) == found
    path = write_toml(tmp_path / "c.toml", few | {"evaluation.reference.image_column": "picture"})
    assert reference({}, own, path) == found.model_copy(update={"image_column": "picture"})


def test_labels_of_their_own_are_the_references_too() -> None:
    own = {"data.source": "digits", "data.label_file": "l.csv"}
    assert reference({}, own) == DataConfig(label_file="l.csv")
    assert reference({}, {"data.label_file": "l.csv"}) == DataConfig(label_file="l.csv")
    photographs = reference({"preset": "cifar10-16"}, {"data.label_file": "l.csv"})
    assert photographs == DataConfig(
        source="uoft-cs/cifar10", image_column="img", label_file="l.csv", max_images=4000
    )


def test_defaults_are_the_presets_images_two_classes_each() -> None:
    data = data_of({}, 0, 6, seed=0, preset="digits")
    assert data == client_config(default_run_config(), 0, 6).data
    assert data.partition is not None
    assert (data.source, data.partition.kind) == ("digits", "pathological")
    assert (data.partition.classes_per_partition, data.partition.alpha) == (2, 0.5)


def test_a_wrong_value_names_its_setting() -> None:
    with pytest.raises(ConfigError, match=r"data.partition.alpha = -1"):
        data_of({"data.partition.alpha": -1}, 0, 6, seed=0, preset="digits")
    with pytest.raises(ConfigError, match="label_attributes needs attribute_file"):
        data_of({"data.label_attributes": ["Male"]}, 0, 6, seed=0, preset="digits")


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        ("digits", {}, ("digits", "image")),
        ("cifar10", {}, ("uoft-cs/cifar10", "img")),
        ("cifar10", {"data.image_column": "picture"}, ("uoft-cs/cifar10", "picture")),
        # Another copy of the data set may name its columns otherwise.
        ("cifar10", {"data.source": "mine.parquet"}, ("mine.parquet", "image")),
        ("celeba", {"data.source": "faces"}, ("faces", "image")),
    ],
)
def test_data_follow_the_preset_unless_they_are_named(
    preset: str, given: dict[str, str], expected: tuple[str, str]
) -> None:
    cloud = load_config(CloudConfig, None, {"preset": preset})
    local = part_of_data(cloud, 0, given)
    assert (local.source, local.image_column) == expected
    named = {key: value for key, value in given.items() if key in NAMED}
    text = " ".join(f"{key}={value}" for key, value in given.items() if key not in NAMED)
    by_flwr_run = {**default_run_config(), **named, "preset": preset, "settings": text}
    submitted = {**default_run_config(), **SimulatedClients(given).run_config(cloud)}
    for run_config in (by_flwr_run, submitted):
        assert client_config(run_config, 0, cloud.schedule.min_clients).data == local


def test_a_preset_without_images_of_its_own_asks_for_them() -> None:
    with pytest.raises(ConfigError, match=r"--run-config: data.source is missing.*'celeba'"):
        client_config({**default_run_config(), "preset": "celeba"}, 0, 4)
