"""The events of a small federation's run: two edges, clients, intervals of five edge rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.events import Event
from fedphd.common.history.events import (
    Ended,
    IntervalEnded,
    LinkChanged,
    PeerChanged,
    Replied,
    RoundBegan,
    RoundEnded,
    Started,
)

INTERVALS, EDGE_ROUNDS = 3, 5


def at(time: float, node: str, event: Event) -> Event:
    """An event of a participant, ``time`` seconds after 1000."""
    role = node.partition("-")[0]
    return event.model_copy(update={"time": 1000.0 + time, "role": role, "node": node})


def started(time: float, *nodes: str) -> list[Event]:
    """Servers start, and edges reach their cloud."""
    found = []
    for node in nodes:
        found.append(at(time, node, Started(pid=1)))
        if node != "cloud":
            found.append(at(time, node, LinkChanged(server="c:1", change="connected")))
    return found


def peer(time: float, node: str, name: str, change: str = "joined", detail: str = "") -> Event:
    return at(time, node, PeerChanged(peer=name, change=change, detail=detail))


def began(time: float, edge: str, number: int, *clients: str) -> Event:
    """The run's edge round ``number`` begins."""
    interval, edge_round = divmod(number - 1, EDGE_ROUNDS)
    event = RoundBegan(
        interval=interval + 1, edge_round=edge_round + 1, round=number,
        rounds=INTERVALS * EDGE_ROUNDS, clients=list(clients),
    )  # fmt: skip
    return at(time, edge, event)


def replied(time: float, edge: str, client: str, seconds: float, loss: float = 0.5) -> Event:
    event = Replied(interval=1, edge_round=1, client=client, loss=loss, seconds=seconds)
    return at(time, edge, event)


def ended(time: float, edge: str, number: int, moved: int = 0, **values: Any) -> Event:
    """The run's edge round ``number`` has ended."""
    interval, edge_round = divmod(number - 1, EDGE_ROUNDS)
    given: dict[str, Any] = {
        "interval": interval + 1, "edge_round": edge_round + 1, "round": number,
        "rounds": INTERVALS * EDGE_ROUNDS, "clients": [], "num_samples": 1,
        "label_distribution": [], "failures": [], "sent_bytes": moved, "received_bytes": 0,
        "seconds": 2.0, "left_s": 60.0, "loss": 0.25,
    }  # fmt: skip
    return at(time, edge, RoundEnded(**given | values))


def interval(time: float, number: int, **values: Any) -> Event:
    given: dict[str, Any] = {
        "interval": number, "sparse": True, "intervals": INTERVALS, "parameters": 700_000,
        "macs": 1, "client_edge_bytes": 0, "edge_cloud_bytes": 4_000_000, "training_flops": 1.0,
        "left_s": 40.0, "seconds": 8.0, "loss": 0.3,
    }  # fmt: skip
    return at(time, "cloud", IntervalEnded(**given | values))


def over(time: float, exit_code: int = 0, message: str = "finished") -> Event:
    return at(time, "cloud", Ended(exit_code=exit_code, message=message))


def half_a_run(num_clients: int = 6) -> list[Event]:
    """Clients with even numbers train at edge-0, and client-0 has answered after 4 s."""
    names = [f"client-{number}" for number in range(num_clients)]
    even, odd = names[::2], names[1::2]
    events = [*started(0, "edge-0", "edge-1", "cloud")]
    events += [peer(1, edge, name) for edge in ("edge-0", "edge-1") for name in names]
    for edge, clients in (("edge-0", even), ("edge-1", odd)):
        events += [peer(2, "cloud", edge), began(3, edge, 1, *clients)]
        events += [replied(7, edge, name, 4.0) for name in clients]
        events += [ended(7, edge, 1, 1_000_000), began(8, edge, 2, *clients)]
    return [*events, replied(12, "edge-0", "client-0", 4.0, 0.125)]


def write_run(folder: Path, events: list[Event], *, num_clients: int = 6) -> Path:
    """A run's folder with a configuration, and these events as its log."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "schedule.min_clients": num_clients, "schedule.intervals": INTERVALS,
        "pruning.sparse_rounds": EDGE_ROUNDS,
    }  # fmt: skip
    config = load_config(CloudConfig, overrides=values)
    (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    (folder / "clients.json").write_text("{}", encoding="utf-8")
    append(folder / "metrics.jsonl", events)
    return folder


def append(path: Path, events: list[Event]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(event.model_dump(mode="json")) + "\n" for event in events)
