"""All keys of a federation at once, for development: real sites make their own."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedphd.common.errors import ConfigError
from fedphd.deploy.keys.authority import CERTIFICATE, KEY, SERVER_DAYS, Authority, pem
from fedphd.deploy.keys.files import check_new, hosts_of, removed_on_failure, write_public
from fedphd.deploy.keys.names import checked_hosts
from fedphd.deploy.keys.registered import SUFFIX, register
from fedphd.deploy.keys.requests import JoinRequest, RoleName, files_of, make_request

EDGES = "edges"
CLIENTS = "clients"
_FIX = "leave the option out to keep them, or name another folder by --out for new ones"
# What only a participant of that kind has.
_OWN = {"edge": re.compile(r"edge-\d+\.key"), "client": re.compile(r"client-\d+-node")}


def grant(
    request: JoinRequest,
    authority: Authority,
    *,
    certificate: Path,
    node_keys: Path,
    days: int = SERVER_DAYS,
    replace: bool = False,
) -> None:
    """Sign and register what a request asks for: both, or nothing if one of them cannot be.

    Args:
        certificate: where a server's certificate goes.
        node_keys: folder in which a node's key is registered.
        days: for which the certificate is good.
        replace: the key comes in place of the one that the name has.

    Raises:
        ConfigError: the name is registered with another key, and ``replace`` is not set.
        StartError: the certificate is there already, or a file cannot be written.
    """
    with removed_on_failure() as made:
        if request.server_key is not None:
            signed = authority.certify(request.name, request.server_key, request.hosts, days=days)
            write_public(certificate, pem(signed))
            made.append(certificate)
        # Last, since a key that was replaced could not be brought back.
        if request.node_key is not None:
            register(node_keys, request.name, request.node_key, replace=replace)


def make_all(
    folder: Path, *, edges: int, clients: int, hosts: tuple[str, ...], days: int
) -> list[str]:
    """Make an authority and the keys of ``cloud``, ``edge-0`` ..., ``client-0`` ... in ``folder``.

    Servers are certified for their names and ``hosts``. Edges' keys are registered in ``edges``,
    the folder for the cloud, and clients' in ``clients``, the folder for every edge.

    Returns the participants' names.

    Raises:
        ConfigError: a host is none or named twice, or there are too many ``days``.
        StartError: one of the files is there already or cannot be written; then none is made.
    """
    authority = Authority.new(name="FedPhD development CA", days=days)
    roles: list[tuple[RoleName, str]] = [("cloud", "cloud")]
    roles += [("edge", f"edge-{number}") for number in range(edges)]
    roles += [("client", f"client-{number}") for number in range(clients)]
    _check_all_new(folder, roles)
    with removed_on_failure() as made:
        for role, name in roles:
            served = () if role == "client" else (name, *(host for host in hosts if host != name))
            request = make_request(folder, role, name, served)
            made += files_of(folder, name)
            certificate, registry = folder / f"{name}.pem", _registry(folder, role)
            grant(request, authority, certificate=certificate, node_keys=registry, days=days)
            made += [certificate, registry / f"{name}{SUFFIX}"]
            files_of(folder, name)[-1].unlink()
        # Last, since whoever finds it takes everything for made.
        authority.write(folder)
    return [name for _, name in roles]


def _registry(folder: Path, role: RoleName) -> Path:
    return folder / (EDGES if role == "edge" else CLIENTS)


def _check_all_new(folder: Path, roles: list[tuple[RoleName, str]]) -> None:
    """Raise StartError where a file of one of the participants is already."""
    files = [folder / CERTIFICATE, folder / KEY]
    for role, name in roles:
        files += [*files_of(folder, name), folder / f"{name}.pem"]
        files.append(_registry(folder, role) / f"{name}{SUFFIX}")
    for path in files:
        check_new(path)


@dataclass(frozen=True)
class Made:
    """What ``make_all`` has made in a folder before."""

    folder: Path
    num_edges: int
    num_clients: int

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """What is in ``folder``; None where it has not made everything."""
        if not ((folder / CERTIFICATE).exists() and (folder / "cloud.key").exists()):
            return None
        names = [path.name for path in folder.iterdir()]
        edges, clients = (sum(bool(own.fullmatch(n)) for n in names) for own in _OWN.values())
        return cls(folder, edges, clients)

    def check(self, *, edges: int | None, clients: int | None, hosts: tuple[str, ...]) -> None:
        """Raise ConfigError unless it is what is asked for; None: whatever there is."""
        for option, asked, found in (
            ("--edges", edges, self.num_edges),
            ("--clients", clients, self.num_clients),
        ):
            if asked is not None and asked != found:
                raise ConfigError(f"{option} {asked}: {self.folder} holds keys of {self}; {_FIX}")
        try:
            hosts = checked_hosts(hosts)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for number in range(-1, self.num_edges):
            path = self.folder / ("cloud.pem" if number < 0 else f"edge-{number}.pem")
            good = hosts_of(path)
            if lacking := [host for host in hosts if host not in good]:
                raise ConfigError(
                    f"--host {lacking[0]}: {path} is good for {', '.join(good)}; {_FIX}"
                )

    def __str__(self) -> str:
        return f"{_count(self.num_edges, 'edge')} and {_count(self.num_clients, 'client')}"


def _count(number: int, kind: str) -> str:
    return f"{number} {kind}{'' if number == 1 else 's'}"
