"""What a process says of itself, from its events."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from fedphd.common.events import Event
from fedphd.common.history.events import (
    SERVES,
    Ended,
    IntervalEnded,
    LinkChanged,
    PeerChanged,
    RoundEnded,
    Started,
    Trained,
)
from fedphd.common.history.status import MOST_GONE, STALE_S, Status, StatusBoard


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_cloud_is_ready_while_its_serverapp_runs() -> None:
    board = StatusBoard("cloud", "cloud")
    assert board.snapshot().reason == "its ServerApp does not run"
    board.event(Started(pid=1))
    assert board.snapshot().ready
    board.event(Ended(exit_code=0, message=""))
    assert not board.snapshot().ready


def test_an_edge_is_ready_while_it_is_connected_to_the_cloud() -> None:
    board = StatusBoard("edge", "edge-0")
    board.event(Started(pid=1))
    assert board.snapshot().reason == "it is connected to no server"
    board.event(LinkChanged(server="c:1", change="connected"))
    assert board.snapshot().ready
    board.event(LinkChanged(server="c:1", change="lost, trying again"))
    assert not board.snapshot().ready
    assert board.snapshot().upstream == {"c:1": "lost, trying again"}


def test_a_client_is_ready_with_one_of_its_edges() -> None:
    board = StatusBoard("client", "client-0")
    board.linked("a:1", "connected")
    board.linked("b:1", "lost")
    assert board.snapshot().ready
    board.linked("a:1", "lost")
    assert not board.snapshot().ready


def test_a_loop_that_hangs_is_not_live() -> None:
    clock = Clock()
    board = StatusBoard("cloud", "cloud", clock=clock)
    board.event(Started(pid=1))
    # Before the first time round it has longer.
    clock.now = STALE_S
    assert board.snapshot().live
    board.beat()
    clock.now += STALE_S
    status = board.snapshot()
    assert (status.live, status.ready) == (False, False)
    assert "has not come round" in status.reason
    board.beat()
    assert board.snapshot().ready


def test_peers_and_rounds_are_those_of_the_events() -> None:
    board = StatusBoard("cloud", "cloud")
    for name in ("edge-0", "edge-1"):
        board.event(PeerChanged(peer=name, change="joined", detail="", time=1.0))
    board.event(PeerChanged(peer="edge-0", change=SERVES, detail="client-0,client-2", time=2.0))
    board.event(PeerChanged(peer="edge-1", change="left", detail="", time=3.0))
    board.event(
        IntervalEnded(
            interval=2, intervals=8, edge_weights={"edge-0": 1.0}, sparse=False, parameters=1,
            macs=1, client_edge_bytes=0, edge_cloud_bytes=0, training_flops=0.0, left_s=0.0,
            time=9.0,
        )
    )  # fmt: skip
    status = board.snapshot()
    assert (status.interval, status.intervals, status.last_event) == (2, 8, 9.0)
    first, second = status.peers["edge-0"], status.peers["edge-1"]
    assert (first.state, first.clients) == ("connected", ["client-0", "client-2"])
    assert (first.since, first.last_seen) == (1.0, 9.0)
    assert (second.state, second.since, second.last_seen) == ("left", 3.0, 3.0)


def test_a_peer_that_failed_and_answers_again_is_connected() -> None:
    board = StatusBoard("edge", "edge-0")
    board.event(PeerChanged(peer="client-0", change="joined", detail="", time=1.0))
    board.event(PeerChanged(peer="client-0", change="failed", detail="late", time=2.0))
    assert board.snapshot().peers["client-0"].detail == "late"
    board.event(
        RoundEnded(
            interval=3, edge_round=2, round=12, rounds=20, clients=["client-0"], num_samples=1,
            label_distribution=[1.0], failures=[], sent_bytes=0, received_bytes=0, seconds=1.0,
            left_s=0.0, time=5.0,
        )
    )  # fmt: skip
    status = board.snapshot()
    assert (status.interval, status.edge_round) == (3, 2)
    assert (status.peers["client-0"].state, status.peers["client-0"].last_seen) == ("connected", 5)


def test_a_client_says_which_round_it_trained_in_last() -> None:
    board = StatusBoard("client", "client-0")
    told = list[Event]()
    board.on_event = told.append
    board.event(Trained(interval=3, edge_round=2, images=1, steps=1, seconds=1.0))
    assert (board.snapshot().interval, board.snapshot().edge_round) == (3, 2)
    assert [event.event for event in told] == ["trained"]


def test_a_peer_is_of_the_role_that_tells_of_it() -> None:
    board = StatusBoard("cloud", "cloud")
    for role, peer in (("cloud", "cloud"), ("edge", "client-0")):
        board.event(PeerChanged(role=role, peer=peer, change="joined", detail=""))
    kinds = {name: peer.kind for name, peer in board.snapshot().peers.items()}
    assert kinds == {"cloud": "edge", "client-0": "client"}


def test_a_peer_that_was_late_is_connected() -> None:
    board = StatusBoard("edge", "edge-0")
    for change, at in (("joined", 1.0), ("failed", 2.0), ("late", 3.0)):
        board.event(PeerChanged(peer="client-0", change=change, detail=change, time=at))
    late = board.snapshot().peers["client-0"]
    assert (late.state, late.since, late.detail) == ("connected", 3.0, "late")


@pytest.mark.parametrize("change", ["left", "failed", "refused"])
def test_only_the_latest_of_those_that_are_not_connected_are_remembered(change: str) -> None:
    board = StatusBoard("edge", "edge-0")
    for n in range(2 * MOST_GONE):
        board.event(PeerChanged(peer=f"here-{n}", change="joined", detail="", time=1.0))
    for n in range(MOST_GONE + 3):
        name = f"node-{n}"
        if change != "refused":
            board.event(PeerChanged(peer=name, change="joined", detail="", time=2.0))
        board.event(PeerChanged(peer=name, change=change, detail="", time=3.0))
    peers = board.snapshot().peers
    connected = [name for name, peer in peers.items() if peer.state == "connected"]
    assert connected == [f"here-{n}" for n in range(2 * MOST_GONE)]
    gone = [name for name, peer in peers.items() if peer.state == change]
    assert gone == [f"node-{n}" for n in range(3, MOST_GONE + 3)]


@pytest.mark.parametrize("change", ["left", "failed", "refused"])
def test_who_comes_back_is_shown_and_not_forgotten_with_those_that_stay_away(change: str) -> None:
    board = StatusBoard("edge", "edge-0")
    for n in range(MOST_GONE + 1):
        board.event(PeerChanged(peer=f"node-{n}", change=change, detail="", time=1.0))
    # One that is still remembered, and one that is not.
    back = ("node-1", "node-0")
    for name in back:
        board.event(PeerChanged(peer=name, change="joined", detail="", time=2.0))
    for n in range(MOST_GONE):
        board.event(PeerChanged(peer=f"more-{n}", change=change, detail="", time=3.0))
    peers = board.snapshot().peers
    assert [peers[name].state for name in back] == ["connected", "connected"]
    assert len(peers) == MOST_GONE + len(back)


def test_who_answered_a_round_and_left_before_its_end_is_not_connected() -> None:
    board = StatusBoard("edge", "edge-0")
    board.event(PeerChanged(peer="client-0", change="joined", detail="", time=1.0))
    board.event(PeerChanged(peer="client-0", change="left", detail="", time=2.0))
    board.event(
        RoundEnded(
            interval=1, edge_round=1, round=1, rounds=2, clients=["client-0"], num_samples=1,
            label_distribution=[1.0], failures=[], sent_bytes=0, received_bytes=0, seconds=1.0,
            left_s=0.0, time=5.0,
        )
    )  # fmt: skip
    assert board.snapshot().peers["client-0"].state == "left"


def test_who_failed_and_was_forgotten_is_shown_when_it_answers() -> None:
    board = StatusBoard("edge", "edge-0")
    for n in range(MOST_GONE + 2):
        board.event(PeerChanged(role="edge", peer=f"node-{n}", change="failed", detail="late"))
    assert "node-0" not in board.snapshot().peers
    answered = ["node-0", "node-5"]
    board.event(
        RoundEnded(
            interval=1, edge_round=1, round=1, rounds=2, clients=answered, num_samples=1,
            label_distribution=[1.0], failures=[], sent_bytes=0, received_bytes=0, seconds=1.0,
            left_s=0.0, role="edge", time=5.0,
        )
    )  # fmt: skip
    # They fail no more, so those that do push none of them out.
    for n in range(MOST_GONE):
        board.event(PeerChanged(role="edge", peer=f"more-{n}", change="failed", detail="late"))
    peers = board.snapshot().peers
    shown = [(peers[name].kind, peers[name].state, peers[name].last_seen) for name in answered]
    assert shown == [("client", "connected", 5.0)] * 2
    assert len(peers) == MOST_GONE + 2


def test_a_change_costs_the_same_for_few_and_many_peers() -> None:
    def steps(peers: int) -> int:
        board, count = StatusBoard("edge", "edge-0"), 0
        for n in range(peers):
            board.event(PeerChanged(peer=f"node-{n}", change="joined", detail=""))

        def note(*_: object) -> Callable[..., Any]:
            nonlocal count
            count += 1
            return note

        board.event(PeerChanged(peer="node-0", change="left", detail=""))
        before = sys.gettrace()
        sys.settrace(note)
        try:
            board.event(PeerChanged(peer="node-0", change="joined", detail=""))
        finally:
            sys.settrace(before)
        return count

    assert steps(1000) == steps(10)


def test_whether_it_is_well_is_said_without_a_copy_of_its_peers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = StatusBoard("cloud", "cloud")
    board.event(Started(pid=1))

    def no_copy(self: Status, **how: object) -> Status:
        raise AssertionError("copied")

    monkeypatch.setattr(Status, "model_copy", no_copy)
    assert board.health() == (True, "")
    board.event(Ended(exit_code=0, message=""))
    assert board.health() == (True, "its ServerApp does not run")
