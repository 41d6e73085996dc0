"""The run configuration of Flower's simulation, and ``fedphd simulate``.

``flwr run .`` takes settings as ``--run-config 'schedule.intervals=3'``. Flower only accepts keys
that stand in ``[tool.flwr.app.config]``, so every setting of a training run stands there with
the value "" for "as in the preset".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedphd.common.config.data import DataConfig
from fedphd.common.config.roles import (
    ClientConfig,
    CloudConfig,
    load_config,
    section_class,
    validate,
)
from fedphd.common.config.run import FederationConfig
from fedphd.common.errors import ConfigError

UNSET = ""
PRESET = "preset"
SOURCE = "data.source"
KIND = "data.partition.kind"
CLASSES = "data.partition.classes_per_partition"
ALPHA = "data.partition.alpha"
ROLE_FILE = "role-file"
MIN_CLIENTS = "schedule.min_clients"
RUN_CONFIG = "--run-config"


@dataclass(frozen=True)
class SimulatedClients:
    """The clients of a simulation: their data, and each one's share of the machine.

    Attributes:
        data: settings of their data, with dotted keys from ``data.``; the others have their
            defaults.
        cpus: CPU cores per client.
        gpus: GPUs per client, parts allowed.
    """

    data: Mapping[str, Any]
    cpus: int = 1
    gpus: float = 0.0

    def run_config(self, config: CloudConfig) -> dict[str, Any]:
        """Keys of Flower's run configuration; preset and seed are the run's."""
        # Flower's run configuration knows no lists: they travel as text.
        data = {
            key: json.dumps(value) if isinstance(value, list | tuple) else value
            for key, value in self.data.items()
        }
        return {**data, PRESET: config.preset, "seed": config.seed}

    def federation(self, config: CloudConfig) -> dict[str, Any]:
        """Flower's own settings of the simulation."""
        return {
            "num-supernodes": config.schedule.min_clients,
            "client-resources-num-cpus": self.cpus,
            "client-resources-num-gpus": self.gpus,
        }


def setting_keys(cls: type[BaseModel] = FederationConfig, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a training run."""
    keys: list[str] = []
    for name, field in cls.model_fields.items():
        section = section_class(field.annotation)
        keys += setting_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


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
    values = {key: _value(value) for key, value in settings.items() if value not in (UNSET, None)}
    if SOURCE not in values:
        if preset not in _PRESET_DATA:
            raise ConfigError(
                f"{source}: {SOURCE} is missing, and preset {preset!r} brings no images; give a "
                "local path or a Hugging Face name (and data.attribute_file for attributes)"
            )
        values = {**_PRESET_DATA[preset], **values}
    values |= {f"data.partition.{key}": value for key, value in own.items()}
    return load_config(ClientConfig, None, values, source=source).data


def kept_states(run_id: int) -> Path:
    """The folder of simulated clients' training states while a run lasts, in Flower's home."""
    home = os.environ.get("FLWR_HOME") or Path.home() / ".flwr"
    return Path(home) / "fedphd" / f"run-{run_id}"


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def default_run_config() -> dict[str, Any]:
    """What ``[tool.flwr.app.config]`` must hold, with defaults."""
    settings = {key: UNSET for key in [*setting_keys(), "out_dir", "device", "num_threads"]}
    return {PRESET: "digits", **CLIENT_DEFAULTS, **settings, ROLE_FILE: UNSET}


def cloud_config(run_config: Mapping[str, Any], num_nodes: int) -> CloudConfig:
    """The training run that a run configuration describes.

    Lists are given as text, such as ``model.block_out_channels="[32, 64]"``.

    Args:
        run_config: keys and values; "" is as in the preset.
        num_nodes: simulated nodes; the run waits for all of them, unless it is told otherwise.

    Raises:
        ConfigError: a value is wrong; names the key.
    """
    known = {*setting_keys(), "out_dir", "device", "num_threads", PRESET}
    given = {key: run_config[key] for key in known if run_config.get(key, UNSET) != UNSET}
    values = {MIN_CLIENTS: num_nodes, **{key: _value(value) for key, value in given.items()}}
    config = load_config(CloudConfig, None, values, source=RUN_CONFIG)
    if config.schedule.min_clients > num_nodes:
        raise ConfigError(
            f"{RUN_CONFIG}: {MIN_CLIENTS} = {config.schedule.min_clients}, but {num_nodes} nodes "
            "are simulated; lower it, or simulate more by --federation-config "
            f"'num-supernodes={config.schedule.min_clients}'"
        )
    return config


def client_config(
    run_config: Mapping[str, Any], partition_id: int, num_partitions: int
) -> ClientConfig:
    """A simulated client's configuration; raises ConfigError that names the key."""
    values = client_values(run_config, partition_id, num_partitions)
    return validate(ClientConfig, values, source=RUN_CONFIG)


def client_values(
    run_config: Mapping[str, Any], partition_id: int, num_partitions: int
) -> dict[str, Any]:
    """A simulated client's configuration as plain values."""
    given = {key: run_config[key] for key in CLIENT_DEFAULTS if key in run_config}
    seed = run_config.get("seed", UNSET)
    data = data_of(
        given,
        partition_id,
        num_partitions,
        seed=0 if seed == UNSET else seed,
        preset=str(run_config[PRESET]),
        source=RUN_CONFIG,
    )
    return {
        "client_id": f"client-{partition_id}",
        "device": run_config.get("device", UNSET) or "auto",
        "data": data.model_dump(mode="json"),
    }


def _value(value: Any) -> Any:
    """Flower's run configuration knows no lists: text that is a JSON list becomes one."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
