"""Draws a federation in so many rows and columns: cloud, edges and clients, those in trouble first.

Everything that is drawn comes from ``Federation``; nothing here waits or reads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedphd.deploy.launch.render import human_bytes, human_seconds
from fedphd.deploy.live.model import ANSWERED, STARTS, THERE, TRAINS, Client, Federation, Server

_BARS = "▁▂▃▄▅▆▇█"
_WIDE = 110
_NARROW = 70
_MESSAGES_SHARE = 4
_FIGURES = (("loss", 6), ("took", 10), ("moved", 8), ("per second", 10))
_STYLES = {TRAINS: "cyan", ANSWERED: "green", "failed": "red", "refused": "red", "left": "yellow"}


@dataclass(frozen=True)
class Row:
    """A line of the tree: branch and name, then what it does, then its figures."""

    name: Text
    doing: Text
    figures: tuple[str, ...] = ("", "", "", "")


def draw(
    run: Federation,
    title: str,
    messages: Sequence[str],
    *,
    width: int,
    height: int,
    now: float,
    foot: str = "",
) -> RenderableType:
    """The picture of a run in at most ``height`` lines of ``width`` columns.

    ``messages`` stand above, the newest of them; what does not fit is counted. ``now`` is a Unix
    time.
    """
    head: list[RenderableType] = [
        _headline(run, title, now),
        _bar(run, width),
        _figures(run, width),
    ]
    # On a small screen the head, a heading, the cloud and the foot come before messages.
    room = min(max(2, height // _MESSAGES_SHARE), height - len(head) - 2 - bool(foot))
    above: list[RenderableType] = list(_messages(messages, room))
    below: list[RenderableType] = (
        [Text(foot, style="dim", no_wrap=True, overflow="ellipsis")] if foot else []
    )
    # A heading, and the cloud.
    left = height - len(above) - len(head) - len(below) - 1
    table = _table(width)
    for row in _rows(run, max(1, left), now):
        table.add_row(row.name, row.doing, *row.figures[: len(_columns(width))])
    return Group(*above, *head, table, *below)


def _messages(messages: Sequence[str], room: int) -> Iterator[Text]:
    if room <= 0:
        return
    shown = messages if len(messages) <= room else messages[len(messages) - room + 1 :]
    if hidden := len(messages) - len(shown):
        yield Text(f"+ {hidden} earlier messages", style="dim")
    for line in shown:
        yield Text(f"! {line}", style="bold yellow", no_wrap=True, overflow="ellipsis")


def _headline(run: Federation, title: str, now: float) -> Text:
    parts = []
    if run.intervals:
        done, over = run.cloud.interval, run.ended is not None
        under_way = min(run.intervals, done if over else done + 1)
        parts.append(f"interval {under_way} of {run.intervals}{' done' if over else ''}")
    if (took := run.took_s(now)) is not None:
        parts.append(human_seconds(took))
    if run.verdict is not None:
        parts.append(run.verdict[1] if run.verdict[0] else "finished")
    elif (left := run.left_s(now)) is not None:
        parts.append(f"about {human_seconds(left)} left")
    elif run.is_trained:
        parts.append("trained, the last evaluation is under way")
    elif run.started is None:
        parts.append("starting")
    return Text(" | ".join([*parts, title]), style="bold", no_wrap=True, overflow="ellipsis")


def _bar(run: Federation, width: int) -> Table:
    share = run.share_done()
    line = Table.grid(padding=(0, 1))
    line.add_row(ProgressBar(1.0, share, width=min(60, width - 6)), f"{share:.0%}")
    return line


def _figures(run: Federation, width: int) -> Text:
    """Losses, distances, size of the network, and what the cloud does beside."""
    parts = []
    if losses := run.cloud.losses:
        parts.append(f"loss {_course(losses)} {spark(losses, 20 if width >= _WIDE else 8)}")
    if run.distances:
        when = f"after interval {run.measured_after}" if run.measured_after else "before training"
        parts.append(f"{run.measure} {_course(run.distances, '.1f')} {when}")
    if run.parameters:
        parts.append(f"{run.parameters / 1e6:.2f} M parameters")
    if run.samples:
        parts.append(run.samples)
    if run.working:
        what, done, total = run.working
        parts.append(f"{what} {done / max(1, total):.0%}")
    if not parts:
        missing = [c.name for c in run.clients.values() if c.state == STARTS]
        parts.append(f"waiting for {len(missing)} of {len(run.clients)} clients" if missing else "")
    return Text(" | ".join(parts), no_wrap=True, overflow="ellipsis")


def _course(values: Sequence[float], form: str = ".4f") -> str:
    """From the first to the last."""
    ends = values if len(values) < 2 else (values[0], values[-1])
    return " -> ".join(format(value, form) for value in ends)


def spark(values: Sequence[float], columns: int) -> str:
    """The last values as a line of bars, from the smallest to the largest of them."""
    last = values[-columns:]
    low, high = min(last), max(last)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in last)


def _table(width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True, show_edge=False, header_style="dim")
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=30, ratio=None)
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    for name, columns in _columns(width):
        table.add_column(name, no_wrap=True, justify="right", width=columns)
    return table


def _columns(width: int) -> tuple[tuple[str, int], ...]:
    """The figures that there is room for: names and widths."""
    return _FIGURES if width >= _NARROW else _FIGURES[:1]


def _rows(run: Federation, room: int, now: float) -> Iterator[Row]:
    """The cloud, then each edge with its clients, in at most ``room`` lines."""
    yield Row(Text(run.cloud.name, style="bold"), _cloud_does(run), _server_figures(run.cloud))
    room -= 1
    homeless = [client for client in run.clients.values() if client.edge not in run.edges]
    groups: list[tuple[Server | None, list[Client]]] = [
        (edge, [c for c in run.clients.values() if c.edge == edge.name])
        for edge in run.edges.values()
    ]
    # Flat, they are the cloud's own; before the first round they belong nowhere.
    if homeless:
        groups.append((None, homeless))
    yield from _groups(run, groups, room, now)


def _groups(
    run: Federation, groups: list[tuple[Server | None, list[Client]]], room: int, now: float
) -> Iterator[Row]:
    # Edges come first: with too little room for all, the last line says how many more there are.
    if room <= 0:
        return
    hidden = max(0, len(groups) - room)
    if hidden:
        hidden = min(hidden + 1, len(groups))
    shown = groups[: len(groups) - hidden]
    heads = sum(server is not None for server, _ in shown) + bool(hidden)
    shares = share_out([len(clients) for _, clients in shown], max(0, room - heads))
    for number, ((server, clients), share) in enumerate(zip(shown, shares, strict=True)):
        last = number == len(groups) - 1
        if server is not None:
            name = Text(f"{'└' if last else '├'}─ ").append(server.name, style="bold")
            yield Row(name, _edge_does(server), _server_figures(server))
        bar = "   " if last else "│  "
        yield from _client_rows(run, clients, share, now, bar if server is not None else "")
    if hidden:
        yield Row(Text(f"└─ + {hidden} more", style="dim"), Text())


def share_out(wanted: Sequence[int], room: int) -> list[int]:
    """Lines for groups that want so many: none gets fewer than another that wants no more."""
    given = [0] * len(wanted)
    while room > 0 and (open_ := [i for i, want in enumerate(wanted) if given[i] < want]):
        for i in open_[:room]:
            given[i] += 1
        room -= len(open_[:room])
    return given


def _client_rows(
    run: Federation, clients: list[Client], share: int, now: float, bar: str
) -> Iterator[Row]:
    """So many lines of clients, those in trouble first, then those that train."""
    if share == 0:
        return
    ordered = sorted(clients, key=lambda client: _rank(run, client, now))
    shown = ordered if len(ordered) <= share else ordered[: share - 1]
    hidden = ordered[len(shown) :]
    # In the order of their names, so that they stand still as long as nothing changes.
    for number, client in enumerate(sorted(shown, key=_by_number)):
        last = number == len(shown) - 1 and not hidden
        name = Text(f"{bar}{'└' if last else '├'}─ {client.name}")
        seconds = "" if client.seconds is None else f"{client.seconds:.1f} s"
        yield Row(name, _client_does(run, client, now), (_loss(client.loss), seconds, "", ""))
    if hidden:
        yield Row(Text(f"{bar}└─ + {len(hidden)} more", style="dim"), _states(hidden))


def _rank(run: Federation, client: Client, now: float) -> tuple[int, tuple[int, str]]:
    order = (client.is_broken, run.is_slow(client, now), client.state == TRAINS,
             client.state == ANSWERED)  # fmt: skip
    return next((place for place, true in enumerate(order) if true), len(order)), _by_number(client)


def _by_number(client: Client) -> tuple[int, str]:
    digits = "".join(filter(str.isdigit, client.name))
    return int(digits or 0), client.name


def _states(clients: Sequence[Client]) -> Text:
    counts: dict[str, int] = {}
    for client in clients:
        counts[client.state] = counts.get(client.state, 0) + 1
    return Text(", ".join(f"{n} {state}" for state, n in sorted(counts.items())), style="dim")


def _cloud_does(run: Federation) -> Text:
    cloud = run.cloud
    if cloud.rounds:
        return _edge_does(cloud)
    if cloud.state != "running":
        return _state(cloud.state, cloud.detail)
    return Text(f"interval {cloud.interval}/{run.intervals} done")


def _edge_does(edge: Server) -> Text:
    if edge.state not in ("running", STARTS):
        return _state(edge.state, edge.detail)
    if edge.link and edge.link != "connected":
        return Text(f"cloud {edge.link}", style="yellow")
    if edge.asked:
        back = f"{len(edge.answered)}/{len(edge.asked)} back"
        return Text(f"round {edge.round + 1}/{edge.rounds}, {back}")
    if edge.rounds:
        return Text(f"round {edge.round}/{edge.rounds} done")
    return Text(edge.link or edge.state, style="dim")


def _client_does(run: Federation, client: Client, now: float) -> Text:
    if client.state == TRAINS:
        slow = run.is_slow(client, now)
        took = human_seconds(now - client.since)
        if slow:
            return Text(f"slow: {took}, usually {run.usual_s() or 0.0:.0f} s", style="yellow")
        return Text(f"trains for {took}", style=_STYLES[TRAINS])
    if client.state == ANSWERED:
        return Text(f"answered in {human_seconds(client.seconds or 0.0)}", style="green")
    if client.state == THERE and run.ended is not None:
        return Text("was there at the end", style="dim")
    return _state(client.state, client.detail)


def _state(state: str, detail: str) -> Text:
    style = _STYLES.get(state, "dim")
    return Text(f"{state}: {detail}" if detail else state, style=style)


def _server_figures(server: Server) -> tuple[str, str, str, str]:
    loss = server.losses[-1] if server.losses else None
    took = "" if server.seconds is None else human_seconds(server.seconds)
    rate = "" if server.rate is None else f"{human_bytes(server.rate)}"
    return _loss(loss), took, human_bytes(server.moved) if server.moved else "", rate


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
