"""The cloud's part of reference statistics from clients."""

from __future__ import annotations

from fedphd.common.wire.roster import Peer
from fedphd.server.statistics import assign_clients


def edge(number: int, *clients: str) -> Peer:
    return Peer(f"edge-{number}", number, clients=dict.fromkeys(clients, 10))


def test_each_client_is_asked_through_one_edge() -> None:
    edges = {"edge-1": edge(1, *"abcd"), "edge-0": edge(0, *"abcd"), "edge-2": edge(2, "d")}
    assert assign_clients(edges) == {"edge-0": ["a", "c"], "edge-1": ["b"], "edge-2": ["d"]}


def test_an_edge_without_clients_is_left_alone() -> None:
    assert assign_clients({"edge-0": edge(0), "edge-1": edge(1, "a")}) == {
        "edge-0": [],
        "edge-1": ["a"],
    }
    assert assign_clients({}) == {}
