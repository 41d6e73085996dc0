"""``fedphd status``: who is connected to whom, drawn as a tree."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Annotated
from urllib.request import ProxyHandler, build_opener

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree
from typer import Exit, Option

from fedphd.common.errors import ConfigError, ConnectionLostError, FedPhDError
from fedphd.common.history.status import CONNECTED, PeerStatus, Status
from fedphd.deploy.launch.health import HEALTH, HealthAddress, parse_status
from fedphd.deploy.launch.render import human_seconds

ANSWER_S = 5.0
_WIDE = 10_000


def status(
    addresses: Annotated[
        list[str] | None,
        Option(
            "--address",
            help="host:port of a process's health address; may be repeated",
            show_default="those of the processes whose state is below the current folder",
        ),
    ] = None,
    folder: Annotated[
        Path, Option(help="where to look for processes' state folders (health.json)")
    ] = Path(),
    as_json: Annotated[bool, Option("--json", help="print the answers as a JSON list")] = False,
) -> None:
    """Show who is connected to whom, the round, when each was last seen, and the version."""
    found: list[Status] = []
    problems: list[str] = []
    asked = dict.fromkeys(map(_checked, addresses or ()), "")
    if not asked:
        found_here = find(folder, tell=problems.append)
        asked = {one.address: f"{one.node} was killed, or hangs: " for one in found_here}
    if not asked and not problems:
        raise FedPhDError(
            f"no running process has its state below {folder.absolute()} ({HEALTH}); name an "
            "address by --address, or another --folder"
        )
    for address, who in asked.items():
        try:
            found.append(ask(address))
        except FedPhDError as error:
            problems.append(f"{who}{error}")
    if as_json:
        print(json.dumps([one.model_dump(mode="json") for one in found], indent=2))
        for problem in problems:
            print(f"fedphd: {problem}", file=sys.stderr)
    else:
        # A line for each process, however long, where a program reads it.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
        for tree in draw(found):
            console.print(tree)
        if stand_twice(found):
            console.print("[dim]A client is connected to every edge that it may choose.[/dim]")
        for problem in problems:
            console.print(f"[red]{escape(problem)}[/red]")
    ready = all(one.ready for one in found)
    raise Exit(ConnectionLostError.exit_code if problems else 0 if ready else 1)


def _checked(address: str) -> str:
    if not address.rpartition(":")[2].isdigit():
        raise ConfigError(f"--address = {address}: is not an address; write host:port")
    return address


def find(
    folder: Path, *, tell: Callable[[str], None] = lambda problem: None
) -> Iterator[HealthAddress]:
    """The health addresses that state folders below ``folder`` name: cloud, edges, clients.

    In a folder of runs those of the newest. ``tell`` gets a sentence on each file that cannot be
    read, or names no address.
    """
    places = [*folder.glob(f"*/{HEALTH}"), *folder.glob(f".fedphd/*/{HEALTH}")]
    places += [*folder.glob(f"*/.fedphd/*/{HEALTH}"), *folder.glob(f"state/*/{HEALTH}")]
    if not places:
        # Of `fedphd local` the last that was started.
        below = [*folder.glob(f"runs/*/state/*/{HEALTH}"), *folder.glob(f"*/state/*/{HEALTH}")]
        runs = {place.parents[2] for place in below}
        newest = max(runs, key=lambda run: run.stat().st_mtime, default=None)
        places = [place for place in below if place.parents[2] == newest]
    read = [one for place in sorted(set(places)) if (one := _read(place, tell))]
    order = {"cloud": 0, "edge": 1, "client": 2}
    yield from sorted(read, key=lambda one: (order.get(one.role, 3), one.node))


def _read(place: Path, tell: Callable[[str], None]) -> HealthAddress | None:
    try:
        return HealthAddress.model_validate_json(place.read_text("utf-8"))
    except FileNotFoundError:
        # Its process has ended meanwhile.
        return None
    except OSError as error:
        tell(f"{place}: cannot be read: {error.strerror}")
    except ValueError:
        tell(
            f"{place}: names no health address, as after a power failure: start its process again, "
            "or remove the file"
        )
    return None


def ask(address: str) -> Status:
    """The status of the process at ``address``; raises ConnectionLostError if none answers."""
    try:
        # What is asked is in the own network, which a proxy (http_proxy) knows nothing of.
        direct = build_opener(ProxyHandler({}))
        with direct.open(f"http://{address}/status", timeout=ANSWER_S) as answer:
            return parse_status(answer.read())
    except ValidationError as error:
        raise ConnectionLostError(
            f"{address}: what answers there is no fedphd, or one of another version; name the "
            "address in its setting health.address, or in health.json"
        ) from error
    except (HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        why = getattr(reason, "strerror", None) or str(reason) or type(error).__name__
        raise ConnectionLostError(f"{address}: no process answers: {why}") from error


def draw(found: Iterable[Status], now: float | None = None) -> Iterator[Tree]:
    """A tree for each process that is below no other one; ``now`` is a Unix time."""
    now = time.time() if now is None else now
    by_node = {one.node: one for one in found}
    below = {name for one in by_node.values() for name in one.peers if name in by_node}
    for name, one in by_node.items():
        if name not in below:
            tree = Tree(_headline(one))
            _add_peers(tree, one, by_node, now)
            yield tree


def stand_twice(found: Iterable[Status]) -> bool:
    """Whether a client is below several edges in the trees."""
    names = [name for one in found if one.role == "edge" for name in one.peers]
    return len(set(names)) < len(names)


def _add_peers(tree: Tree, one: Status, by_node: dict[str, Status], now: float) -> None:
    for name, peer in sorted(one.peers.items()):
        known = by_node.get(name)
        branch = tree.add(_peer(name, peer, now) if known is None else _headline(known))
        if known and known.peers:
            _add_peers(branch, known, by_node, now)
        else:
            for client in peer.clients:
                branch.add(escape(client))


def _headline(one: Status) -> str:
    mark = "[green]ready[/green]" if one.ready else f"[red]not ready[/red]: {escape(one.reason)}"
    rounds = ""
    if one.interval:
        of = f" of {one.intervals}" if one.intervals else ""
        edge_round = f" round {one.edge_round}" if one.edge_round else ""
        rounds = f" | interval {one.interval}{of}{edge_round}"
    links = "".join(f" | {server} {change}" for server, change in one.upstream.items())
    return f"[bold]{escape(one.node)}[/bold] {mark}{rounds}{escape(links)} | fedphd {one.version}"


def _peer(name: str, peer: PeerStatus, now: float) -> str:
    colour = "green" if peer.state == CONNECTED else "red"
    detail = f": {peer.detail}" if peer.detail and peer.state != CONNECTED else ""
    ago = human_seconds(max(0.0, now - peer.last_seen))
    return f"{escape(name)} [{colour}]{peer.state}[/{colour}]{escape(detail)} | seen {ago} ago"
