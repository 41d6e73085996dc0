"""The certificates and keys that settings name: there, and good, before anything is started.

A server's certificate may come to its end later.
"""

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedphd.common.config.links import NodeConfig, SuperLinkConfig
from fedphd.common.errors import within
from fedphd.deploy.keys.files import (
    check_fits,
    check_in_date,
    read_certificate,
    read_latest,
    read_node_key,
)
from fedphd.deploy.keys.registered import registered

# So long before its end a certificate is to be renewed.
SOON: Final = datetime.timedelta(days=14)
_DAY: Final = datetime.timedelta(days=1)


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


@dataclass(eq=False)
class Expiry:
    """Says, once a day, that a server's certificate ends soon or has ended.

    It is read once: whatever lies at its path later, a process has the one with which it started.

    Args:
        say: told when it ends, and what to do.
        clock: Unix time in seconds; for tests.
    """

    certificate: Path
    say: Callable[[str], None]
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self._end = read_certificate(self.certificate).not_valid_after_utc
        self._next = self._end - SOON

    def follow(self) -> None:
        """Look once at the clock."""
        now = datetime.datetime.fromtimestamp(self.clock(), datetime.UTC)
        if now < self._next:
            return
        self._next = now + _DAY
        what = f"its certificate {self.certificate}"
        at = f"{self._end:%Y-%m-%d %H:%M} UTC"
        if now > self._end:
            what += f" has expired on {at}, and nobody new can connect"
        else:
            what += f" ends on {at}"
        self.say(f"{what}; have a new one signed, and start this process again")
