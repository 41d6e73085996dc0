"""The certificates and keys that settings name: there, and good, before anything is started."""

from fedphd.common.config.links import NodeConfig, SuperLinkConfig
from fedphd.common.errors import within
from fedphd.deploy.keys.files import check_fits, check_in_date, read_latest, read_node_key
from fedphd.deploy.keys.registered import registered


def check_server(config: SuperLinkConfig) -> None:
    """Raise ConfigError unless a server can use what ``config`` names."""
    if config.tls_files:
        with within("superlink"):
            check_in_date(config.tls_files[0])
            check_fits(*config.tls_files)
    if config.node_keys:
        with within("superlink.node_keys"):
            registered(config.node_keys)


def check_node(config: NodeConfig) -> None:
    """Raise ConfigError unless a node can use what ``config`` names."""
    if config.root_certificates:
        with within("node.root_certificates"):
            read_latest(config.root_certificates)
    if config.private_key:
        with within("node.private_key"):
            read_node_key(config.private_key)
