"""How processes reach one another: addresses, certificates and keys of servers and nodes."""

import re
from pathlib import Path
from typing import Self

from pydantic import field_validator, model_validator

from fedphd.common.config.data import Section, setting
from fedphd.common.config.paths import UserPath
from fedphd.common.errors import ConfigError

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.\-]+):([0-9]{1,5})")


def check_address(value: str) -> str:
    """Return ``value`` if it is ``host:port``, port 1 to 65535; raise ValueError otherwise."""
    return _checked(value, first_port=1)


def _checked(value: str, *, first_port: int) -> str:
    if not (match := _ADDRESS.fullmatch(value)) or not first_port <= int(match[2]) <= 65535:
        raise ValueError(
            f"{value!r} is not an address; write host:port with a port from {first_port} to 65535, "
            "such as 127.0.0.1:9092 or [::1]:9092"
        )
    return value


class SuperLinkConfig(Section):
    """The stock ``flower-superlink`` that a cloud or an edge runs."""

    address: str = setting("0.0.0.0:9092", "host:port that nodes connect to (Fleet API)")
    ssl_certfile: UserPath | None = setting(None, "server certificate (PEM); absent: no TLS")
    ssl_keyfile: UserPath | None = setting(None, "server private key (PEM)")
    ssl_ca_certfile: UserPath | None = setting(None, "CA certificate (PEM)")
    node_keys: UserPath | None = setting(
        None,
        "folder with the public keys, NAME.pub, of the nodes that may join, which `fedphd keys` "
        "fills (needs TLS); absent: anybody may",
    )
    insecure: bool = setting(
        False, "without certificates: plain text, which anybody on the way reads and changes"
    )

    _address = field_validator("address")(check_address)

    @property
    def tls_files(self) -> tuple[Path, Path, Path] | None:
        """Certificate, key and the authority's certificate; None: plain text."""
        if self.ssl_certfile and self.ssl_keyfile and self.ssl_ca_certfile:
            return self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certfile
        return None

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        given = [self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certfile]
        if any(given) and not all(given):
            raise ValueError("give all of ssl_certfile, ssl_keyfile and ssl_ca_certfile, or none")
        if self.node_keys and not self.ssl_certfile:
            raise ValueError(
                "node_keys needs ssl_certfile, ssl_keyfile and ssl_ca_certfile: without TLS a "
                "node's signature can be replayed"
            )
        if self.insecure and self.ssl_certfile:
            raise ValueError("insecure = true contradicts ssl_certfile; keep one of them")
        return self

    def check_protected(self) -> None:
        """Raise ConfigError where what travels is not encrypted, and nobody asked for that."""
        if not self.ssl_certfile and not self.insecure:
            raise ConfigError(
                f"superlink.address = {self.address}: would serve plain text; give "
                "superlink.ssl_certfile, ssl_keyfile and ssl_ca_certfile (`fedphd keys` makes "
                "them), or superlink.insecure = true (--insecure) on a network that you trust"
            )


class EdgeSuperLinkConfig(SuperLinkConfig):
    """An edge's ``flower-superlink``, whose port leaves room for a cloud on the same machine."""

    address: str = setting("0.0.0.0:9192", "host:port that clients connect to (Fleet API)")


class NodeConfig(Section):
    """How a node (a client, or an edge towards the cloud) reaches a SuperLink."""

    root_certificates: UserPath | None = setting(
        None, "CA certificate (PEM) that signs the servers; absent: no TLS"
    )
    private_key: UserPath | None = setting(
        None, "OpenSSH EC private key of this node (needs TLS); absent: a fresh one"
    )
    lost_after_s: float = setting(
        300.0, "seconds without a server before this process gives up", gt=0
    )
    insecure: bool = setting(
        False, "without root_certificates: plain text, which anybody on the way reads and changes"
    )

    @model_validator(mode="after")
    def _keys_need_tls(self) -> Self:
        if self.private_key and not self.root_certificates:
            raise ValueError(
                "private_key needs root_certificates: without TLS a node's signature can be "
                "replayed"
            )
        if self.insecure and self.root_certificates:
            raise ValueError("insecure = true contradicts root_certificates; keep one of them")
        return self

    def check_protected(self) -> None:
        """Raise ConfigError where what travels is not encrypted, and nobody asked for that."""
        if not self.root_certificates and not self.insecure:
            raise ConfigError(
                "node.root_certificates is not given, so all would travel in plain text; give the "
                "certificate authority of the servers, or node.insecure = true (--insecure) on a "
                "network that you trust"
            )


class HealthConfig(Section):
    """Where a process says over HTTP how it is."""

    address: str | None = setting(
        "127.0.0.1:0",
        "host:port that answers /live, /ready and /status; port 0: a free one, which health.json "
        "in state_dir names; null: none",
    )
    metrics: bool = setting(False, "whether it answers /metrics too, for Prometheus")
    client_names: bool = setting(False, "whether /metrics names clients, or only counts them")
    class_shares: bool = setting(
        False, "whether an edge's /metrics shows the share of each class among its clients' images"
    )

    @field_validator("address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        # Port 0: a free one.
        return None if value is None else _checked(value, first_port=0)

    @model_validator(mode="after")
    def _asked_for(self) -> Self:
        if self.metrics and self.address is None:
            raise ValueError("health.metrics = true needs health.address, which is null")
        for name in ("client_names", "class_shares"):
            if getattr(self, name) and not self.metrics:
                raise ValueError(
                    f"health.{name} = true says what /metrics shows; it needs health.metrics = true"
                )
        return self
