"""The run configuration of Flower's simulation, and ``fedphd simulate``.

``flwr run .`` takes settings as ``--run-config 'schedule.intervals=3'``. Flower only accepts keys
that stand in ``[tool.flwr.app.config]``, so every setting of a training run stands there with
the value "" for "as in the preset".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedphd.common.config.roles import ClientConfig, CloudConfig, load_config, validate
from fedphd.common.config.text import setting_keys
from fedphd.common.errors import ConfigError
from fedphd.deploy.launch.client_data import (
    CLIENT_DEFAULTS,
    PRESET,
    UNSET,
    data_of,
    plain_value,
)
from fedphd.deploy.launch.runs import ROLE_FILE

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


def state_folder(run_id: int) -> Path:
    """The folder of simulated clients' training states while a run lasts, in Flower's home."""
    home = os.environ.get("FLWR_HOME") or Path.home() / ".flwr"
    return Path(home) / "fedphd" / f"run-{run_id}"


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
    values = {MIN_CLIENTS: num_nodes, **{key: plain_value(value) for key, value in given.items()}}
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
