"""The run configuration of Flower's simulation, for ``flwr run .`` and ``fedphd simulate``.

Flower's ``--run-config 'schedule.intervals=3'`` only accepts keys of ``[tool.flwr.app.config]``.
Those that people change most stand there; the key ``settings`` takes any other, as ``--set`` does:
``settings="ema.decay=0.9 num_classes=4"``. "" says nothing: the preset's or default value holds.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedphd.common.config.roles import ClientConfig, CloudConfig, load_config, validate
from fedphd.common.config.text import flattened, parse_settings, settings_text, split_settings
from fedphd.common.errors import ConfigError
from fedphd.deploy.launch import client_data
from fedphd.deploy.launch.client_data import ALPHA, CLASSES, KIND, PRESET, SOURCE, UNSET
from fedphd.deploy.launch.runs import ROLE_FILE

MIN_CLIENTS = "schedule.min_clients"
RUN_CONFIG = "--run-config"
SETTINGS = "settings"
# The settings that are keys of their own.
NAMED = (
    PRESET, SOURCE, KIND, CLASSES, ALPHA, "topology", "reproducible", "seed",
    "schedule.intervals", "schedule.edge_rounds", "schedule.participation", "schedule.num_edges",
    "objective.method", "pruning.mode", "pruning.ratio", "pruning.sparse_rounds",
    "training.learning_rate", "training.batch_size", "training.local_amount",
    "evaluation.every_intervals", "evaluation.num_samples", "out_dir", "device",
)  # fmt: skip
# Settings of a cloud that others connect to.
_NOT_SIMULATED = ("superlink", "state_dir")


@dataclass(frozen=True)
class SimulatedClients:
    """The clients of a simulation: their data, and each one's CPU cores and (parts of) GPUs.

    ``data`` has settings with dotted keys from ``data.``; the others have their defaults.
    """

    data: Mapping[str, Any]
    cpus: int = 1
    gpus: float = 0.0

    def run_config(self, config: CloudConfig) -> dict[str, str]:
        """What the clients read of Flower's run configuration; preset and seed are the run's."""
        return {SETTINGS: settings_text(self._settings(config))}

    def record(self, config: CloudConfig) -> dict[str, Any]:
        """The same for the run's folder: dotted settings, lists as JSON text."""
        settings = self._settings(config).items()
        return {k: json.dumps(v) if isinstance(v, list | tuple) else v for k, v in settings}

    def _settings(self, config: CloudConfig) -> dict[str, Any]:
        return {**self.data, PRESET: config.preset, "seed": config.seed}

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


def default_run_config() -> dict[str, str]:
    """What ``[tool.flwr.app.config]`` must hold."""
    return dict.fromkeys((*NAMED, SETTINGS, ROLE_FILE), UNSET)


def given_settings(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings that a run configuration gives, by their own keys and in ``settings``.

    Raises ConfigError where ``settings`` cannot be read, or has what it cannot have; names it.
    """
    keys = {key: run_config[key] for key in NAMED if run_config.get(key, UNSET) != UNSET}
    source = f"{RUN_CONFIG}: {SETTINGS}:"
    text = split_settings(str(run_config.get(SETTINGS, UNSET)))
    settings = dict(flattened(parse_settings(text, source=source)))
    for key, value in settings.items():
        if key in keys:
            raise ConfigError(
                f"{source} {key} = {value!r}, but the key {key} = {keys[key]!r} is given too; "
                "keep one of them"
            )
        if key.partition(".")[0] in _NOT_SIMULATED:
            raise ConfigError(f"{source} {key}: a simulation has no such setting; leave it out")
    return {**keys, **settings}


def cloud_config(run_config: Mapping[str, Any], num_nodes: int) -> CloudConfig:
    """The training run that a run configuration describes.

    It waits for all of the ``num_nodes`` that are simulated, unless it is told otherwise. Raises
    ConfigError where a setting is unknown, or its value is wrong; names the key.
    """
    given, of_data = client_data.take_data(given_settings(run_config))
    given = client_data.with_reference(given, of_data)
    config = load_config(CloudConfig, None, {MIN_CLIENTS: num_nodes, **given}, source=RUN_CONFIG)
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
    given, of_data = client_data.take_data(given_settings(run_config))
    data = client_data.data_of(
        of_data,
        partition_id,
        num_partitions,
        seed=given.get("seed", 0),
        preset=given.get(PRESET, CloudConfig.model_fields[PRESET].default),
        source=RUN_CONFIG,
    )
    name, device = f"client-{partition_id}", given.get("device", "auto")
    values = {"client_id": name, "device": device, "data": data.model_dump(mode="json")}
    return validate(ClientConfig, values, source=RUN_CONFIG)
