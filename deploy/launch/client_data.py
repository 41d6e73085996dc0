"""The clients' data where one command starts all of them: one data set, cut into their parts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedphd.common.config.data import DataConfig
from fedphd.common.config.roles import (
    ClientConfig,
    CloudConfig,
    load_config,
    read_preset,
    read_toml,
)
from fedphd.common.config.text import flattened, setting_keys, with_overrides
from fedphd.common.errors import ConfigError

UNSET = ""
PRESET = "preset"
SOURCE = "data.source"
KIND = "data.partition.kind"
CLASSES = "data.partition.classes_per_partition"
ALPHA = "data.partition.alpha"
_REFERENCE = "evaluation.reference"
# What says which images they are, and of which class.
_OF_REFERENCE = (
    "source",
    "format",
    "split",
    "image_column",
    "label_column",
    "attribute_file",
    "label_attributes",
    "label_file",
)
# Which part is whose, and of how many, follows from the number of clients; the seed is the run's.
_OWN = ("num_partitions", "partition_id", "seed")
# Settings of the data that all clients share, at their defaults.
CLIENT_DEFAULTS: dict[str, Any] = {
    **{k: UNSET for k in setting_keys(DataConfig, "data.") if k.rpartition(".")[2] not in _OWN},
    KIND: "pathological",
    CLASSES: 2,
    ALPHA: 0.5,
}
# Where the images of a preset are by default. CelebA's need a file of attributes, and consent to a
# licence, so they can only be local.
_PRESET_DATA: dict[str, dict[str, Any]] = {
    "digits": {SOURCE: "digits"},
    "cifar10": {SOURCE: "uoft-cs/cifar10", "data.image_column": "img"},
    "cifar10-16": {SOURCE: "uoft-cs/cifar10", "data.image_column": "img"},
}
# How many of them, wherever they are.
_PRESET_IMAGES = {"cifar10-16": 4000}


def take_data(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split dotted settings into the cloud's and those of the clients' data (``data.``).

    Raises ConfigError if a key of the data is unknown, or follows from other settings.
    """
    data = {key: value for key, value in values.items() if key.startswith("data.")}
    if unknown := [key for key in data if key not in CLIENT_DEFAULTS]:
        known = ", ".join(CLIENT_DEFAULTS)
        raise ConfigError(f"{unknown[0]} is not a setting of the clients' data; known: {known}")
    return {key: value for key, value in values.items() if key not in data}, data


def with_reference(
    values: Mapping[str, Any], data: Mapping[str, Any], path: Path | None = None
) -> dict[str, Any]:
    """The cloud's settings, comparing samples with the clients' data where these are not the
    preset's, the preset would compare, and neither ``values`` nor the file ``path`` says with what.

    Else a federation of somebody's own images would be measured by its distance to the digits, or
    to their digits rather than the classes that a file of labels gives them. Details that are said
    of the reference, such as how many images, stay. Nothing else is checked. Raises ConfigError for
    a file that cannot be read, or no such preset.
    """
    default = CloudConfig.model_fields[PRESET].default
    of_preset = read_preset(_given(values, path).get(PRESET, default))
    reference = of_preset.get("evaluation", {}).get("reference")
    if reference is None or says_reference(values, path):
        return dict(values)
    given = {key: data[f"data.{key}"] for key in _OF_REFERENCE if f"data.{key}" in data}
    given = {key: value for key, value in given.items() if value not in (None, UNSET)}
    defaults = {key: DataConfig.model_fields[key].default for key in _OF_REFERENCE}
    presets = defaults | {key: reference[key] for key in _OF_REFERENCE if key in reference}
    # A preset's columns are those of its own images.
    same = given.get("source", presets["source"]) == presets["source"]
    own = (presets if same else defaults) | given
    if own == presets:
        return dict(values)
    # As many as the preset has, unless that is said.
    if (most := data.get("data.max_images")) not in (None, UNSET):
        own["max_images"] = most
    said = dict(flattened(_given(values, path)))
    named = {f"{_REFERENCE}.{key}": value for key, value in own.items()}
    return {**values, **{key: value for key, value in named.items() if key not in said}}


def says_reference(values: Mapping[str, Any], path: Path | None) -> bool:
    """Whether settings or the file say what samples are compared with, not only how."""
    said = dict(flattened(_given(values, path)))
    which = (f"{_REFERENCE}_file", f"{_REFERENCE}_clients")
    return bool({_REFERENCE, f"{_REFERENCE}.source"} & said.keys()) or any(map(said.get, which))


def is_own(reference: DataConfig | None, data: DataConfig) -> bool:
    """Whether samples are compared with the clients' own images."""
    if reference is None:
        return False
    return all(getattr(reference, key) == getattr(data, key) for key in _OF_REFERENCE)


def _given(values: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    return with_overrides(read_toml(path) if path else {}, values)


def data_of(
    data: Mapping[str, Any],
    partition_id: int,
    num_partitions: int,
    *,
    seed: int,
    preset: str,
    source: str = "command line",
) -> DataConfig:
    """The data of one of several clients that share a data set.

    Args:
        data: settings with dotted keys from ``data.``; "" and None stand for the default.
        preset: the run's, whose data set it is where ``data`` names none.
        source: what an error names as the place of the settings.

    Raises ConfigError if a setting is wrong, or there is no data set.
    """
    own = {"num_partitions": num_partitions, "partition_id": partition_id, "seed": seed}
    values = {k: v for k, v in {**CLIENT_DEFAULTS, **data}.items() if v not in (UNSET, None)}
    if SOURCE not in values:
        if preset not in _PRESET_DATA:
            raise ConfigError(
                f"{source}: {SOURCE} is missing, and preset {preset!r} has no images of its own; "
                "give a local path or a Hugging Face name (and data.attribute_file for attributes)"
            )
        values = {**_PRESET_DATA[preset], **values}
    if preset in _PRESET_IMAGES:
        values = {"data.max_images": _PRESET_IMAGES[preset], **values}
    values |= {f"data.partition.{key}": value for key, value in own.items()}
    return load_config(ClientConfig, None, values, source=source).data


def part_of_data(config: CloudConfig, number: int, data: Mapping[str, Any]) -> DataConfig:
    """The data of client ``number``, from 0, of ``schedule.min_clients`` clients."""
    clients = config.schedule.min_clients
    return data_of(data, number, clients, seed=config.seed, preset=config.preset)
