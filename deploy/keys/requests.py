"""A site's request to join: proof that it has its keys, which themselves never leave it.

A request holds one or two certificate requests in PEM: that of a server names the hosts at which
it can be reached, that of a node (a client, or an edge towards the cloud) names none.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import NameOID

from fedphd.common.errors import ConfigError
from fedphd.deploy.keys.authority import alternative_names, name_of
from fedphd.deploy.keys.files import (
    CURVE,
    UNREADABLE,
    PrivateKey,
    PublicKey,
    check_new,
    openssh,
    read_bytes,
    removed_on_failure,
    write_private_key,
    write_public,
)
from fedphd.deploy.keys.names import check_name, checked_hosts, shown

RoleName = Literal["cloud", "edge", "client"]
MOST_BYTES = 64 * 1024
_BLOCK = re.compile(
    rb"-----BEGIN CERTIFICATE REQUEST-----.+?-----END CERTIFICATE REQUEST-----\n?", re.DOTALL
)


@dataclass(frozen=True)
class JoinRequest:
    """What a site asks for: its name, a node's key, a server's key and its hosts."""

    name: str
    node_key: PublicKey | None
    server_key: PublicKey | None
    hosts: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a request from a site.

        What it says is safe to print: names that participants may have, and hosts.

        Raises:
            ConfigError: it is not one, a signature is wrong, its parts name different sites or ask
                for the same, or a name or a host is none.
        """
        content = read_bytes(path)[:MOST_BYTES]
        try:
            parts = [x509.load_pem_x509_csr(block) for block in _BLOCK.findall(content)]
            names = {check_name(_common_name(part)) for part in parts}
            if len(names) != 1:
                raise ValueError(f"it names {len(names)} sites, not one")
            asked = [(_hosts(part), _proven_key(part)) for part in parts]
            nodes = [key for hosts, key in asked if not hosts]
            servers = [(hosts, key) for hosts, key in asked if hosts]
            if len(nodes) > 1 or len(servers) > 1:
                # Else what is shown of one of them would not be all that is granted.
                raise ValueError(f"it has {len(nodes)} keys of nodes and {len(servers)} of servers")
        except UNREADABLE as error:
            raise ConfigError(
                f"{path}: is not a request of `fedphd keys request`: {error}"
            ) from error
        hosts, server_key = servers[0] if servers else ((), None)
        return cls(names.pop(), nodes[0] if nodes else None, server_key, hosts)


def files_of(folder: Path, name: str) -> list[Path]:
    """Where ``make_request`` puts what it makes; a role has some of it, the request as the last."""
    return [folder / f"{name}{end}" for end in (".key", "-node", "-node.pub", ".request")]


def make_request(
    folder: Path, role: RoleName, name: str, hosts: tuple[str, ...] = ()
) -> JoinRequest:
    """Make a site's keys and its request, in ``folder``.

    That are ``NAME.key`` of a server, ``NAME-node`` and ``NAME-node.pub`` of a node, and
    ``NAME.request``.

    Raises:
        ConfigError: ``name`` cannot be a participant's; or a server has no host, one that is none,
            or one twice; or a client has one.
        StartError: one of the files is there already or cannot be written; then none is made.
    """
    try:
        check_name(name)
        hosts = checked_hosts(hosts)
    except ValueError as error:
        raise ConfigError(f"{error}") from error
    if role != "client" and not hosts:
        raise ConfigError(f"{role} {name} serves others: name a host at which they reach it")
    if role == "client" and hosts:
        raise ConfigError(
            f"client {name} serves nobody, but has the host {hosts[0]}; leave out --host"
        )
    key_path, node_path, public_path, request_path = files = files_of(folder, name)
    for path in files:
        # Before anything is made: half a set of keys helps nobody.
        check_new(path)
    parts: list[bytes] = []
    node_key = server_key = None
    with removed_on_failure() as made:
        if role != "cloud":
            node = ec.generate_private_key(CURVE)
            write_private_key(node_path, node, PrivateFormat.OpenSSH)
            made.append(node_path)
            write_public(public_path, openssh(node.public_key(), name))
            made.append(public_path)
            parts.append(_asked(name, node, ()))
            node_key = node.public_key()
        if role != "client":
            server = ec.generate_private_key(CURVE)
            write_private_key(key_path, server, PrivateFormat.PKCS8)
            made.append(key_path)
            parts.append(_asked(name, server, hosts))
            server_key = server.public_key()
        write_public(request_path, b"".join(parts))
    return JoinRequest(name, node_key, server_key, hosts)


def _asked(name: str, key: PrivateKey, hosts: tuple[str, ...]) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(name_of(name))
    if hosts:
        builder = builder.add_extension(alternative_names(hosts), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _common_name(request: x509.CertificateSigningRequest) -> str:
    names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _proven_key(request: x509.CertificateSigningRequest) -> PublicKey:
    key = request.public_key()
    if not isinstance(key, PublicKey):
        raise ValueError("its key is not an EC key")
    if not request.is_signature_valid:
        raise ValueError("its signature is not by its key")
    return key


def _hosts(request: x509.CertificateSigningRequest) -> tuple[str, ...]:
    try:
        found = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    for name in found:
        if not isinstance(name, x509.DNSName | x509.IPAddress):
            raise ValueError(
                f"it asks for the {type(name).__name__} {shown(str(name.value))}; a server is "
                "certified for hosts alone"
            )
    return checked_hosts(tuple(str(name.value) for name in found))
