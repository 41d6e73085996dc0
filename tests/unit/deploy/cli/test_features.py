"""Which data ``fedphd features train`` and ``fedphd statistics`` read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedphd.common.config.data import DataConfig
from fedphd.common.errors import ConfigError
from fedphd.deploy.cli.features import _load


def test_given_data_are_read_whole_and_not_as_those_of_the_preset(tmp_path: Path) -> None:
    own = DataConfig(source="/data/own")
    # Its reference has the first 4000 images of a column that is named otherwise.
    assert _load("/data/own", None, "cifar10-16", None).evaluation.reference == own
    file = tmp_path / "cloud.toml"
    for reference in (
        'source = "/data/others"\nattribute_file = "list.txt"\nlabel_attributes = ["Male"]\n',
        "max_images = 7\n",
    ):
        file.write_text(f"[evaluation.reference]\n{reference}", encoding="utf-8")
        assert _load("/data/own", file, None, None).evaluation.reference == own
    file.write_text('[evaluation]\nreference = "none"\n', encoding="utf-8")
    assert _load("/data/own", file, None, None).evaluation.reference == own


def test_settings_say_how_given_data_are_read() -> None:
    settings = ["evaluation.reference.image_column=picture", "evaluation.reference.max_images=9"]
    found = _load("/data/own", None, "cifar10-16", settings).evaluation.reference
    assert found == DataConfig(source="/data/own", image_column="picture", max_images=9)


def test_the_data_that_the_configuration_names_are_read_as_it_says(tmp_path: Path) -> None:
    found = _load("uoft-cs/cifar10", None, "cifar10-16", None).evaluation.reference
    assert found == DataConfig(source="uoft-cs/cifar10", image_column="img", max_images=4000)
    file = tmp_path / "cloud.toml"
    file.write_text(
        'preset = "cifar10"\n[evaluation.reference]\nsource = "/data/own"\nsplit = "test"\n',
        encoding="utf-8",
    )
    found = _load("/data/own", file, None, None).evaluation.reference
    assert found == DataConfig(source="/data/own", split="test")


def test_a_wrong_name_of_data_is_said() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.reference.source = ''"):
        _load("", None, None, None)
