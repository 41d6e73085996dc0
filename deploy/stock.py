"""The ClientApp as Flower runs it: by its own ``flower-supernode``, and simulated.

Both start from nothing for each message but the node's and the run's configuration, and keep
what must last in ``context.state``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context

from fedphd.client.app import ClientRuntime, build_app
from fedphd.client.network import Networks
from fedphd.common.config import ClientConfig, load_config
from fedphd.common.errors import ConfigError
from fedphd.deploy.simulate import client_config

CACHED_CLIENTS = 64
# Simulated clients of one process answer one message after the other.
_NETWORKS = Networks()


def runtime_of(context: Context) -> ClientRuntime:
    """The client that a node is.

    A simulated node has a partition id; a ``flower-supernode`` names its file:
    ``--node-config 'config="/path/to/client.toml"'``.

    Raises:
        ConfigError: the node's configuration names no client.
    """
    if "partition-id" in context.node_config:
        config = client_config(
            context.run_config,
            int(context.node_config["partition-id"]),
            int(context.node_config["num-partitions"]),
        )
        return _runtime(config)
    path = context.node_config.get("config")
    if not path:
        raise ConfigError(
            "this node names no client: start flower-supernode with "
            "--node-config 'config=\"/path/to/client.toml\"'"
        )
    return _runtime(load_config(ClientConfig, Path(str(path))))


@lru_cache(maxsize=CACHED_CLIENTS)
def _runtime(config: ClientConfig) -> ClientRuntime:
    """A process may serve many simulated clients; their data need not be read each time."""
    torch.set_num_threads(config.num_threads)
    return ClientRuntime(config, networks=_NETWORKS)


client_app = build_app(runtime_of, state_in_context=True)
