"""The ClientApp as Flower's own ``flower-supernode`` runs it: a fresh process per message."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context

from fedphd.client.app import ClientRuntime, build_app
from fedphd.common.config import ClientConfig, load_config
from fedphd.common.errors import ConfigError


def runtime_of(context: Context) -> ClientRuntime:
    """Build the client that ``--node-config 'config="client.toml"'`` describes."""
    path = context.node_config.get("config")
    if not path:
        raise ConfigError(
            "this node names no client: start flower-supernode with "
            "--node-config 'config=\"/path/to/client.toml\"'"
        )
    return ClientRuntime(load_config(ClientConfig, Path(str(path))))


client_app = build_app(runtime_of)
