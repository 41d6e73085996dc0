"""The run configuration of Flower's simulation, and ``fedphd simulate``.

``flwr run .`` takes settings as ``--run-config 'schedule.intervals=3'``. Flower only accepts keys
that stand in ``[tool.flwr.app.config]``, so every setting of a training run stands there with
the value "" for "as in the preset".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from fedphd.common.config import (
    ClientConfig,
    CloudConfig,
    load_config,
    section_class,
    validate,
)
from fedphd.common.errors import ConfigError
from fedphd.common.settings import FederationConfig

UNSET = ""
PRESET = "preset"
SOURCE = "data.source"
KIND = "data.partition.kind"
CLASSES = "data.partition.classes_per_partition"
ALPHA = "data.partition.alpha"
ROLE_FILE = "role-file"
MIN_CLIENTS = "schedule.min_clients"
RUN_CONFIG = "--run-config"

CLIENT_DEFAULTS: dict[str, Any] = {
    SOURCE: "digits",
    KIND: "pathological",
    CLASSES: 2,
    ALPHA: 0.5,
}


def setting_keys(cls: type[BaseModel] = FederationConfig, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a training run."""
    keys: list[str] = []
    for name, field in cls.model_fields.items():
        section = section_class(field.annotation)
        keys += setting_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


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
    given = {key: run_config.get(key, default) for key, default in CLIENT_DEFAULTS.items()}
    seed = run_config.get("seed", UNSET)
    partition = {
        "kind": given[KIND],
        "num_partitions": num_partitions,
        "partition_id": partition_id,
        "classes_per_partition": given[CLASSES],
        "alpha": given[ALPHA],
        "seed": 0 if seed == UNSET else seed,
    }
    return {
        "client_id": f"client-{partition_id}",
        "device": run_config.get("device", UNSET) or "auto",
        "data": {"source": given[SOURCE], "partition": partition},
    }


def _value(value: Any) -> Any:
    """Flower's run configuration knows no lists: text that is a JSON list becomes one."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
