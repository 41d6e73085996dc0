"""The clients' data where one command starts all of them: one data set, cut into their parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedphd.common.config.data import DataConfig
from fedphd.common.config.roles import ClientConfig, load_config
from fedphd.common.config.text import setting_keys
from fedphd.common.errors import ConfigError

UNSET = ""
PRESET = "preset"
SOURCE = "data.source"
KIND = "data.partition.kind"
CLASSES = "data.partition.classes_per_partition"
ALPHA = "data.partition.alpha"


def _data_defaults() -> dict[str, Any]:
    """Settings of clients' data that a run configuration may have, at their defaults."""
    # Which part is whose, and of how many, follows from the number of clients; the seed, too,
    # is the run's.
    own = ("num_partitions", "partition_id", "seed")
    keys = setting_keys(DataConfig, "data.")
    unset = {key: UNSET for key in keys if key.rpartition(".")[2] not in own}
    return {**unset, KIND: "pathological", CLASSES: 2, ALPHA: 0.5}


CLIENT_DEFAULTS: dict[str, Any] = _data_defaults()
# Where the images of a preset are, if nobody says otherwise. CelebA's come with a file of
# attributes and a licence to agree to, so they can only be local.
_PRESET_DATA: dict[str, dict[str, Any]] = {
    "digits": {SOURCE: "digits"},
    "cifar10": {SOURCE: "uoft-cs/cifar10", "data.image_column": "img"},
}


def take_data(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part settings of ``--set`` into the cloud's and those of the clients' data (``data.``).

    Raises:
        ConfigError: a key of the data is unknown, or is not for people to set.
    """
    data = {key: value for key, value in values.items() if key.startswith("data.")}
    for key in data:
        if key not in CLIENT_DEFAULTS:
            raise ConfigError(
                f"{key}: no setting of the clients' data; known: {', '.join(CLIENT_DEFAULTS)}"
            )
    return {key: value for key, value in values.items() if key not in data}, data


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
        data: settings with dotted keys from ``data.``, as ``SimulatedClients`` has them; "" is
            for "as by default".
        partition_id: which client, from 0.
        num_partitions: of how many.
        seed: of the split.
        preset: the run's, whose data set it is where ``data`` names none.
        source: what an error names as the place of the settings.

    Raises:
        ConfigError: a setting is wrong, or there is no data set; names it.
    """
    own = {"num_partitions": num_partitions, "partition_id": partition_id, "seed": seed}
    settings = {**CLIENT_DEFAULTS, **data}
    values = {
        key: plain_value(value) for key, value in settings.items() if value not in (UNSET, None)
    }
    if SOURCE not in values:
        if preset not in _PRESET_DATA:
            raise ConfigError(
                f"{source}: {SOURCE} is missing, and preset {preset!r} brings no images; give a "
                "local path or a Hugging Face name (and data.attribute_file for attributes)"
            )
        values = {**_PRESET_DATA[preset], **values}
    values |= {f"data.partition.{key}": value for key, value in own.items()}
    return load_config(ClientConfig, None, values, source=source).data


def plain_value(value: Any) -> Any:
    """Flower's run configuration knows no lists: text that is a JSON list becomes one."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
