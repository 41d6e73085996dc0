"""All keys of a federation at once, for development: real sites make their own."""

from pathlib import Path

from fedphd.deploy.keys.authority import CERTIFICATE, SERVER_DAYS, Authority, pem
from fedphd.deploy.keys.files import write_public
from fedphd.deploy.keys.registered import register
from fedphd.deploy.keys.requests import JoinRequest, RoleName, make_request

EDGES = "edges"
CLIENTS = "clients"


def grant(
    request: JoinRequest,
    authority: Authority,
    *,
    certificate: Path,
    node_keys: Path,
    days: int = SERVER_DAYS,
    replace: bool = False,
) -> None:
    """Sign and register what a request asks for.

    Args:
        certificate: where a server's certificate goes.
        node_keys: folder in which a node's key is registered.
        days: for which the certificate is good.
        replace: the key comes in place of the one that the name has.

    Raises:
        ConfigError: the name is registered with another key, and ``replace`` is not set.
        StartError: the certificate is there already; the key is registered then.
    """
    if request.node_key is not None:
        register(node_keys, request.name, request.node_key, replace=replace)
    if request.server_key is not None:
        signed = authority.certify(request.name, request.server_key, request.hosts, days=days)
        write_public(certificate, pem(signed))


def make_all(
    folder: Path, *, edges: int, clients: int, hosts: tuple[str, ...], days: int
) -> list[str]:
    """Make an authority and the keys of ``cloud``, ``edge-0`` ..., ``client-0`` ... in ``folder``.

    Servers are certified for their names and ``hosts``. Edges' keys are registered in ``edges``,
    the folder for the cloud, and clients' in ``clients``, the folder for every edge.

    Returns the participants' names. Raises StartError where one of the files is there.
    """
    authority = Authority.new(name="FedPhD development CA", days=days)
    roles: list[tuple[RoleName, str]] = [("cloud", "cloud")]
    roles += [("edge", f"edge-{number}") for number in range(edges)]
    roles += [("client", f"client-{number}") for number in range(clients)]
    for role, name in roles:
        served = () if role == "client" else (name, *hosts)
        request = make_request(folder, role, name, served)
        (folder / f"{name}.request").unlink()
        registry = folder / (EDGES if role == "edge" else CLIENTS)
        grant(request, authority, certificate=folder / f"{name}.pem", node_keys=registry, days=days)
    # Last, since whoever finds it takes everything for made.
    authority.write(folder)
    return [name for _, name in roles]


def is_made(folder: Path) -> bool:
    """Whether ``make_all`` has made everything in ``folder``."""
    return (folder / CERTIFICATE).exists()
