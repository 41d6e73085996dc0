"""``fedphd keys``: who may talk; a federation's certificates and its nodes' keys."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer, confirm

from fedphd.deploy.cli.flags import say
from fedphd.deploy.cli.hints import CommandGroup
from fedphd.deploy.keys import registered
from fedphd.deploy.keys.authority import (
    AUTHORITY_DAYS,
    CERTIFICATE,
    KEY,
    MOST_DAYS,
    SERVER_DAYS,
    Authority,
)
from fedphd.deploy.keys.development import CLIENTS, EDGES, Made, grant, make_all
from fedphd.deploy.keys.files import read_public_key
from fedphd.deploy.keys.requests import JoinRequest, make_request


class Role(StrEnum):
    """What a site runs."""

    cloud = "cloud"
    edge = "edge"
    client = "client"


Out = Annotated[Path, Option(help="folder for what is made")]
Hosts = Annotated[
    list[str] | None,
    Option("--host", help="name or IP address at which others reach the server; may be repeated"),
]
NodeKeys = Annotated[
    Path, Option(help="folder of registered keys, superlink.node_keys of those who let them in")
]
Replace = Annotated[bool, Option("--replace", help="in place of the key that the name has")]
Days = Annotated[
    int, Option(metavar="N", min=1, max=MOST_DAYS, help="days for which a certificate is good")
]
DEV_EDGES, DEV_CLIENTS = 2, 6

keys_app = Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Certificates of servers, and keys of nodes. On one machine: dev. On real sites private "
    "keys never travel: the operator makes an authority, each site a request, and the operator "
    "signs it.",
)


@keys_app.command("dev")
def dev(
    out: Out = Path("keys"),
    edges: Annotated[
        int | None,
        Option(metavar="N", min=0, help="number of edges", show_default=str(DEV_EDGES)),
    ] = None,
    clients: Annotated[
        int | None,
        Option(metavar="N", min=1, help="number of clients", show_default=str(DEV_CLIENTS)),
    ] = None,
    host: Hosts = None,
    days: Days = SERVER_DAYS,
) -> None:
    """Make everything at once, for development; what is there already stays."""
    hosts = tuple(host or ())
    if made := Made.find(out):
        made.check(edges=edges, clients=clients, hosts=hosts)
        say(f"{out} holds keys of {made} already; they stay as they are")
        return
    num_edges = DEV_EDGES if edges is None else edges
    names = make_all(
        out,
        edges=num_edges,
        clients=DEV_CLIENTS if clients is None else clients,
        hosts=hosts,
        days=days,
    )
    say(f"{out}: {CERTIFICATE}; for each server NAME.pem and NAME.key; for each node NAME-node")
    if num_edges:
        say(f"{out / EDGES}: the cloud's superlink.node_keys; {out / CLIENTS}: every edge's")
    else:
        say(f"{out / CLIENTS}: the cloud's superlink.node_keys; without edges it is flat")
    say(f"made for {', '.join(names)}")


@keys_app.command("authority")
def authority(
    out: Out = Path("authority"),
    name: Annotated[str, Option(help="its name in certificates")] = "FedPhD CA",
    days: Days = AUTHORITY_DAYS,
) -> None:
    """Operator: make the certificate authority of a federation."""
    Authority.new(name=name, days=days).write(out)
    say(f"{out / CERTIFICATE}: give it to every site")
    say(f"{out / KEY}: keep it here; who has it can pretend to be any server")


@keys_app.command("request")
def request(
    role: Annotated[Role, Argument(help="what the site runs")],
    name: Annotated[str, Argument(help="its stable name: edge_id or client_id")],
    host: Hosts = None,
    out: Out = Path(),
) -> None:
    """Site: make the own keys, and a request for the operator."""
    made = make_request(out, role.value, name, tuple(host or ()))
    _show(made)
    say(f"{out / f'{name}.request'}: send it to the operator; the other files stay here")


@keys_app.command("sign")
def sign(
    file: Annotated[Path, Argument(metavar="REQUEST", help="what a site sent")],
    node_keys: NodeKeys,
    authority: Annotated[Path, Option(help="folder of the authority")] = Path("authority"),
    days: Days = SERVER_DAYS,
    replace: Replace = False,
    yes: Annotated[bool, Option("--yes", help="do not ask")] = False,
) -> None:
    """Operator: certify a site's server and register its node's key."""
    asked, issuer = JoinRequest.read(file), Authority.read(authority)
    _show(asked)
    if asked.server_key is not None:
        say("CAUTION: this asks to be a SERVER. Who has its key can pretend to be whoever others")
        say("reach at these hosts; no client needs that, and no host may be another site's:")
        for host in asked.hosts:
            say(f"  {host}")
    if not yes:
        confirm("Is this what the site's own command printed, and may it join?", abort=True)
    certificate = file.with_name(f"{asked.name}.pem")
    grant(asked, issuer, certificate=certificate, node_keys=node_keys, days=days, replace=replace)
    if asked.server_key is not None:
        say(f"{certificate}: send it back to the site, with {authority / CERTIFICATE}")
    if asked.node_key is not None:
        say(f"{node_keys}: {asked.name} may join")


@keys_app.command("register")
def register(
    name: Annotated[str, Argument(help="the node's stable name")],
    public_key: Annotated[Path, Argument(help="its OpenSSH public key")],
    node_keys: NodeKeys,
    replace: Replace = False,
) -> None:
    """Operator: register a key that was made by other means, such as ssh-keygen."""
    key = read_public_key(public_key)
    registered.register(node_keys, name, key, replace=replace)
    say(f"{node_keys}: {name} may join with {registered.fingerprint(key)}")


@keys_app.command("revoke")
def revoke(
    name: Annotated[str, Argument(help="the node's stable name")], node_keys: NodeKeys
) -> None:
    """Operator: let a node in no more; one that is connected is out within seconds."""
    registered.revoke(node_keys, name)
    say(f"{node_keys}: {name} may join no more; a new key brings it back")


@keys_app.command("list")
def list_keys(node_keys: NodeKeys) -> None:
    """Show who may join, with the keys' fingerprints."""
    for name, key in registered.registered(node_keys).items():
        say(f"{name:<20} {registered.fingerprint(key)}")


def _show(request: JoinRequest) -> None:
    """What a request is for, as both sides see it."""
    say(request.name)
    for kind, key in (("node", request.node_key), ("server", request.server_key)):
        if key is not None:
            say(f"  {kind:<7} key {registered.fingerprint(key)}")
    if request.hosts:
        say(f"  hosts   {', '.join(request.hosts)}")
