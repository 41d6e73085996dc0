"""The ClientApp as Flower runs it: by its own ``flower-supernode``, and simulated.

For each message both start from nothing but the node's and the run's configuration. What must
outlast a message is kept in a node's ``context.state``, or in a simulated client's file.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedphd.client.app import ClientRuntime, build_app
from fedphd.client.flat_unet import UNetCache
from fedphd.client.stores import ContextStore
from fedphd.common.config.roles import ClientConfig, load_config
from fedphd.common.errors import ConfigError
from fedphd.common.stores import FileStore, StateStore
from fedphd.common.wire.failures import failed
from fedphd.deploy.launch.client_data import UNSET
from fedphd.deploy.launch.runs import ROLE_FILE, clients_folder
from fedphd.deploy.simulation.run_config import client_config, state_folder

CACHED_CLIENTS = 64
# Shared, since the simulated clients of a process answer one message at a time.
_NETWORKS = UNetCache()


def runtime_of(context: Context) -> ClientRuntime:
    """The client that a node is: a simulated one has a partition id, a real one names its file.

    Raises:
        ConfigError: the node's configuration names no client.
    """
    node = context.node_config
    if _is_simulated(context):
        part, num_parts = int(node["partition-id"]), int(node["num-partitions"])
        return _runtime(client_config(context.run_config, part, num_parts))
    if not (path := node.get("config")):
        raise ConfigError(
            "this node's configuration names no client file: start flower-supernode with "
            "--node-config 'config=\"/path/to/client.toml\"'"
        )
    return _runtime(load_config(ClientConfig, Path(str(path))))


@lru_cache(maxsize=CACHED_CLIENTS)
def _runtime(config: ClientConfig) -> ClientRuntime:
    """The client of ``config``, kept, since its data need not be read for each message."""
    torch.set_num_threads(config.num_threads)
    return ClientRuntime(config, networks=_NETWORKS)


def state_of(context: Context) -> StateStore:
    """Where the client that a node is keeps its training state."""
    if _is_simulated(context):
        part = context.node_config["partition-id"]
        name = f"client-{part}.safetensors"
        return FileStore(_folder(context) / name)
    return ContextStore(context.state)


def _folder(context: Context) -> Path:
    """Where a simulation's training states are: in the run's folder, so that it can be resumed."""
    role = str(context.run_config.get(ROLE_FILE, UNSET))
    return clients_folder(Path(role).parent) if role else state_folder(context.run_id)


def _is_simulated(context: Context) -> bool:
    return "partition-id" in context.node_config


class _NamedApp(ClientApp):
    """An app that is pickled as the name of the one in this module.

    Flower's simulation pickles the app with every message. By value, which is how functions within
    functions travel, that searches all loaded modules for each of them.
    """

    def __reduce__(self) -> str:
        return "client_app"


def _in_peers_words(
    message: Message, context: Context, answer: Callable[[Message, Context], Message]
) -> Message:
    """Answer errors in words that are fit for peers: Flower would send the whole texts."""
    # A simulation has no peers, and whoever runs it looks at the run, not into Ray's logs.
    if _is_simulated(context):
        return answer(message, context)
    try:
        return answer(message, context)
    except Exception as error:
        return failed(message, error)


client_app = build_app(runtime_of, state_of=state_of, kind=_NamedApp, mods=[_in_peers_words])
