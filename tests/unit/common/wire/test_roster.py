"""The roster: who joins, who is left alone, who is refused, and why."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from support.memory import FakeTime, Handler, MemoryGrid, streaming

from fedphd.common.wire.messages import HELLO, Hello, HelloReply
from fedphd.common.wire.records import read_payload, to_records
from fedphd.common.wire.roster import GREET_BATCH, NAME_RETRY_S, Acquaintances, Peer, Roster


def introduces(name: str, num_samples: int = 10, **changes: Any) -> Handler:
    """A node that says who it is."""

    def handle(message: Message) -> Message:
        assert message.metadata.message_type == HELLO
        assert read_payload(message, Hello).asking == "edge-0"
        values: dict[str, Any] = {"kind": "client", "num_samples": num_samples}
        reply = HelloReply(name=name, **(values | changes))
        return Message(to_records(reply), reply_to=message)

    return handle


def silent(message: Message) -> None:
    return None


class Fixture:
    """A roster over ``nodes``, and what it told."""

    def __init__(
        self,
        nodes: dict[int, Handler],
        *,
        kind: Literal["client", "edge"] = "client",
        bound: dict[int, str] | None = None,
        known: Acquaintances | None = None,
    ) -> None:
        self.time = FakeTime()
        self.memory = MemoryGrid(nodes)
        self.changes: list[tuple[str, str, str]] = []
        self.roster = Roster(
            streaming(self.memory, time=self.time),
            asking="edge-0",
            kind=kind,
            hello_s=2.0,
            retry_s=60.0,
            max_samples=100,
            bound=bound.get if bound is not None else None,
            on_change=lambda *change: self.changes.append(change),
            known=known or Acquaintances(),
            clock=self.time.clock,
        )

    def asked(self) -> list[int]:
        """Nodes that were greeted since the last look."""
        nodes = [message.metadata.dst_node_id for message in self.memory.pushed]
        self.memory.pushed.clear()
        return nodes


def test_joining_and_leaving() -> None:
    world = Fixture({5: introduces("b", 3), 9: introduces("a", 4)})
    assert list(world.roster.refresh().items()) == [("a", Peer("a", 9, 4)), ("b", Peer("b", 5, 3))]
    assert world.changes == [("b", "joined", ""), ("a", "joined", "")]
    assert (world.roster.name_of(5), world.roster.name_of(6)) == ("b", "6")
    del world.memory.nodes[5]
    assert list(world.roster.refresh()) == ["a"]
    assert world.changes[2:] == [("b", "left", "")]


def test_known_peers_are_greeted_once() -> None:
    world = Fixture({5: introduces("a")})
    world.roster.refresh()
    world.memory.nodes[6] = introduces("b")
    world.roster.refresh()
    world.roster.refresh()
    assert world.asked() == [5, 6]


def test_asking_again_updates_what_an_edge_sees() -> None:
    world = Fixture({5: introduces("edge-1", 0, kind="edge", clients={"a": 1})}, kind="edge")
    assert world.roster.refresh()["edge-1"].clients == {"a": 1}
    world.memory.nodes[5] = introduces("edge-1", 0, kind="edge", clients={"a": 1, "b": 2})
    assert world.roster.refresh()["edge-1"].clients == {"a": 1}
    assert world.roster.refresh(ask_again=True)["edge-1"].clients == {"a": 1, "b": 2}
    assert [(change, detail) for _, change, detail in world.changes] == [
        ("joined", ""), ("serves", "a"), ("serves", "a,b"),
    ]  # fmt: skip


def test_a_name_stays_with_the_node_that_has_it_while_that_is_alive() -> None:
    world = Fixture({5: introduces("a")})
    world.roster.refresh()
    world.memory.nodes[8] = introduces("a")
    reason = "node 8 uses this name too; it stays with the node that has it"
    for _ in range(3):
        assert world.roster.refresh() == {"a": Peer("a", 5, 10)}
        world.time.now_s += NAME_RETRY_S
    # Said once, however often it asks.
    assert world.changes == [("a", "joined", ""), ("a", "refused", reason)]
    # Its heartbeat is gone: now it may be the same participant, started again.
    del world.memory.nodes[5]
    assert world.roster.refresh() == {"a": Peer("a", 8, 10)}
    assert world.changes[2:] == [("a", "left", ""), ("a", "joined", "")]


def test_a_key_speaks_for_its_own_name_only() -> None:
    world = Fixture(
        {5: introduces("a"), 6: introduces("a"), 7: introduces("c")}, bound={5: "a", 6: "b"}
    )
    assert world.roster.refresh() == {"a": Peer("a", 5, 10)}
    assert world.changes == [
        ("a", "joined", ""),
        ("b", "refused", "calls itself a, and its key is that of b"),
        ("7", "refused", "calls itself c, and its key is registered for no name"),
    ]


def test_a_key_does_not_take_the_name_of_one_that_is_gone() -> None:
    world = Fixture({5: introduces("a")}, bound={5: "a", 6: "b"})
    world.roster.refresh()
    world.memory.nodes = {6: introduces("a")}
    assert world.roster.refresh() == {}
    assert world.changes[-1] == ("b", "refused", "calls itself a, and its key is that of b")


def test_a_key_under_which_somebody_else_started_is_asked_for_its_name_again() -> None:
    world = Fixture({5: introduces("a")}, bound={5: "a"})
    world.roster.refresh()
    world.memory.nodes = {5: introduces("c")}
    assert list(world.roster.refresh()) == ["a"], "it is greeted once"
    world.roster.doubt("a", "another")
    world.roster.rest("a", "answers as c; expected a", "error")
    assert world.roster.refresh() == {}
    assert world.changes[-1] == ("a", "refused", "calls itself c, and its key is that of a")


def test_a_client_that_was_started_with_other_data_takes_part_at_once() -> None:
    world = Fixture({5: introduces("a", 10)})
    world.roster.refresh()
    world.memory.nodes = {5: introduces("a", 12)}
    world.roster.doubt("a", "another")
    world.roster.rest("a", "label counts do not fit", "error")
    assert {name: peer.num_samples for name, peer in world.roster.refresh().items()} == {"a": 12}


def test_one_that_says_the_same_again_is_left_alone() -> None:
    world = Fixture({5: introduces("a", 10)})
    world.roster.refresh()
    world.roster.doubt("a", "another")
    world.roster.rest("a", "label counts do not fit", "error")
    before = list(world.changes)
    assert world.roster.refresh() == {}
    assert list(world.roster.everyone) == ["a"]
    assert world.changes == before
    world.time.now_s += 61.0
    assert list(world.roster.refresh()) == ["a"]


def test_one_that_is_doubted_and_leaves_has_left() -> None:
    world = Fixture({5: introduces("a", 10)})
    world.roster.refresh()
    world.roster.doubt("a", "another")
    world.memory.nodes = {}
    assert world.roster.refresh() == {}
    assert world.changes == [("a", "joined", ""), ("a", "left", "")]


def test_one_that_is_somebody_else_by_now_leaves_and_joins() -> None:
    world = Fixture({5: introduces("a", 10)})
    world.roster.refresh()
    world.roster.doubt("a", "another")
    world.memory.nodes = {5: introduces("b", 10)}
    assert list(world.roster.refresh()) == ["b"]
    assert world.changes == [("a", "joined", ""), ("a", "left", ""), ("b", "joined", "")]


def test_the_name_of_one_that_is_doubted_stays_its_own() -> None:
    world = Fixture({5: introduces("a", 10)})
    world.roster.refresh()
    world.roster.doubt("a", "another")
    world.memory.nodes = {4: introduces("a", 10), 5: introduces("a", 12)}
    assert {name: peer.node_id for name, peer in world.roster.refresh().items()} == {"a": 5}


def test_edges_that_share_whom_they_know_doubt_together() -> None:
    known = Acquaintances()
    nodes: dict[int, Handler] = {5: introduces("a", 10)}
    one, other = Fixture(nodes, known=known), Fixture(nodes, known=known)
    for world in (one, other):
        world.roster.refresh()
    for world in (one, other):
        world.roster.doubt("a", "another")
        world.roster.rest("a", "label counts do not fit", "error")
    assert other.roster.refresh() == one.roster.refresh() == {}
    assert known.doubted == {}


def test_peer_that_comes_back_is_not_left_alone_any_more() -> None:
    world = Fixture({5: introduces("a")})
    world.roster.refresh()
    world.roster.rest("a", "no reply within 3 s", "error")
    world.memory.nodes = {8: introduces("a")}
    assert list(world.roster.refresh()) == ["a"]


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (introduces("cloud-7", 0, kind="edge"),
         "cloud-7 joins as edge; expected client"),
        (introduces("a", protocol=9, version="7.0"),
         "client a speaks protocol 9 (fedphd 7.0); this is protocol 8 (fedphd "),
        (introduces("a", protocol=9), "): install the same version on every machine"),
        (introduces("a", 0), "a claims 0 images; 1 to 100 (schedule.max_client_samples)"),
        (introduces("a", 101), "a claims 101 images; 1 to 100"),
        (introduces("a", 10**30), f"a claims {10**30} images; 1 to 100"),
        (introduces("a\nb"), "; use 1 to 64 letters"),
        (introduces("a" * 65), "; use 1 to 64 letters"),
        (silent, "no reply within 2 s"),
        (lambda message: Message(to_records(Hello(asking="x")), reply_to=message),
         "malformed HelloReply"),
    ],
)  # fmt: skip
def test_refused_nodes_and_why(node: Handler, text: str) -> None:
    world = Fixture({5: node, 6: introduces("good")})
    assert list(world.roster.refresh()) == ["good"]
    [(name, change, reason)] = [c for c in world.changes if c[0] != "good"]
    assert (name, change) == ("5", "refused")
    assert text in reason


def test_a_version_that_says_more_is_told_apart_by_its_protocol() -> None:
    class Newer(HelloReply):
        mood: str = "good"

    def handle(message: Message) -> Message:
        reply = Newer(kind="client", name="a", num_samples=10, protocol=9, version="7.0")
        return Message(to_records(reply), reply_to=message)

    world = Fixture({5: handle})
    world.roster.refresh()
    [(_, change, reason)] = world.changes
    assert change == "refused"
    assert reason.startswith("client a speaks protocol 9 (fedphd 7.0); this is protocol 8")


@pytest.mark.parametrize("count", [0, -5, 101, 10**400])
def test_edge_that_lists_absurd_counts_is_refused(count: int) -> None:
    node = introduces("edge-1", 0, kind="edge", clients={"a": 10, "b": count})
    world = Fixture({5: node}, kind="edge")
    assert world.roster.refresh() == {}
    [(_, change, reason)] = world.changes
    assert change == "refused"
    assert reason.startswith(f"edge-1 lists b with {count} images; 1 to 100")


def test_refused_node_is_asked_again_after_a_while() -> None:
    world = Fixture({5: silent})
    world.roster.refresh()
    world.memory.nodes[5] = introduces("a")
    assert world.roster.refresh() == {}
    world.time.now_s += 59.0
    assert world.roster.refresh() == {}
    assert world.asked() == [5]
    world.time.now_s += 2.0
    assert list(world.roster.refresh()) == ["a"]


def test_nobody_complains_of_a_node_that_leaves_while_it_is_greeted() -> None:
    def leaves(message: Message) -> Message:
        gone = Error(ErrorCode.NODE_UNAVAILABLE, "no heartbeat")
        return Message(gone, reply_to=message)

    world = Fixture({5: leaves, 6: introduces("a")})
    assert list(world.roster.refresh()) == ["a"]
    assert world.changes == [("a", "joined", "")]


def test_nodes_that_were_refused_and_left_are_forgotten() -> None:
    known = Acquaintances()
    world = Fixture({5: silent, 6: introduces("a"), 7: introduces("a")}, known=known)
    world.roster.refresh()
    assert (set(known.refused), known.told) == ({5, 7}, {(7, "a")})
    del world.memory.nodes[5], world.memory.nodes[7]
    world.roster.refresh()
    assert (known.refused, known.told) == ({}, set())


def test_peer_that_failed_rests() -> None:
    world = Fixture({5: introduces("a"), 6: introduces("b")})
    world.roster.refresh()
    world.roster.rest("a", "tensor x holds nan", "error")
    assert world.changes[-1] == ("a", "failed", "tensor x holds nan")
    assert list(world.roster.peers) == ["b"]
    assert list(world.roster.everyone) == ["a", "b"]
    world.asked()
    world.roster.refresh(ask_again=True)
    assert world.asked() == [6]
    world.time.now_s += 61.0
    assert list(world.roster.refresh()) == ["a", "b"]


def test_a_process_that_is_gone_is_asked_again_as_soon_as_its_next_one_is_there() -> None:
    # With a key both have the same node id.
    world = Fixture({5: introduces("a"), 6: introduces("b")})
    world.roster.refresh()
    nodes = {**world.memory.nodes}
    del world.memory.nodes[5]
    world.roster.rest("a", "no heartbeat from it", "gone")
    assert list(world.roster.everyone) == ["b"]
    assert list(world.roster.refresh()) == ["b"]
    world.memory.nodes = nodes
    assert list(world.roster.refresh()) == ["a", "b"]
    assert world.changes[2:] == [
        ("a", "failed", "no heartbeat from it"),
        ("a", "left", ""),
        ("a", "joined", ""),
    ]


def test_peer_that_was_late_is_asked_again_once_it_has_answered() -> None:
    world = Fixture({5: introduces("a")})
    world.roster.refresh()
    world.memory.nodes[5] = silent
    grid = world.roster.grid
    [failed] = grid.send_and_receive([Message(RecordDict(), 5, "train")], timeout=1.0)
    world.roster.rest("a", failed.error.reason, "error")
    assert list(world.roster.refresh()) == []
    asked = world.memory.pushed[-1]
    world.memory.deliver(asked, Message(RecordDict(), reply_to=asked))
    world.time.sleep(5.0)
    assert list(world.roster.refresh()) == ["a"]
    assert world.changes[1:] == [
        ("a", "failed", "no reply within 1 s"),
        ("a", "late", "its answer (train) came 5.0 s too late, and is dropped"),
    ]


def test_configure_drops_those_who_claim_too_much() -> None:
    world = Fixture({5: introduces("a", 50), 6: introduces("b", 51)})
    world.roster.refresh()
    world.roster.configure(hello_s=1.0, retry_s=1.0, max_samples=50)
    assert list(world.roster.everyone) == ["a"]
    assert world.changes[-1] == ("b", "refused", "claims 51 images; at most 50 are allowed")
    world.asked()
    world.time.now_s += 1e9
    assert list(world.roster.refresh()) == ["a"]
    assert world.asked() == []


def test_who_claims_too_much_for_one_run_is_asked_again_by_one_that_allows_more() -> None:
    world = Fixture({5: introduces("a", 51)})
    world.roster.refresh()
    world.roster.configure(hello_s=1.0, retry_s=1.0, max_samples=50)
    assert list(world.roster.refresh()) == []
    world.roster.configure(hello_s=1.0, retry_s=1.0, max_samples=60)
    assert list(world.roster.refresh()) == ["a"]


def test_configure_sets_the_waits() -> None:
    world = Fixture({5: silent})
    world.roster.configure(hello_s=0.5, retry_s=4.0, max_samples=100)
    world.roster.refresh()
    assert 0.5 <= world.time.now_s <= 0.75
    world.roster.refresh()
    assert world.asked() == [5]
    world.time.now_s += 4.0
    world.roster.refresh()
    assert world.asked() == [5]


def test_greeting_many_nodes_stops_in_time_and_goes_on_later() -> None:
    """Two batches fit before the first silent node has used up the time."""
    nodes = {n: introduces(f"client-{n:03}") for n in range(1, 3 * GREET_BATCH + 1)}
    world = Fixture({**nodes, GREET_BATCH + 1: silent})
    assert len(world.roster.refresh()) == 2 * GREET_BATCH - 1
    assert world.time.now_s >= 2.0
    world.asked()
    assert len(world.roster.refresh()) == 3 * GREET_BATCH - 1
    assert world.asked() == list(range(2 * GREET_BATCH + 1, 3 * GREET_BATCH + 1))


def test_a_node_that_greets_others_first_gets_half_of_the_time() -> None:
    heard: list[float] = []

    def listening(message: Message) -> Message:
        heard.append(read_payload(message, Hello).wait_s)
        return introduces("a")(message)

    Fixture({5: listening}).roster.refresh()
    assert heard == [1.0]


def test_servers_of_one_process_greet_a_node_once() -> None:
    known = Acquaintances()
    nodes = {5: introduces("a", 3), 6: introduces("b", 200)}
    first, second = (Fixture(nodes, known=known) for _ in range(2))
    assert list(first.roster.refresh()) == ["a"]
    assert first.asked() == [5, 6]
    # It is told once too, also that one was refused.
    assert second.roster.refresh() == first.roster.peers
    assert second.asked() == []
    assert [change for _, change, _ in first.changes] == ["joined", "refused"]
    assert second.changes == []
    # Whoever failed at one is left alone there, and there alone.
    first.roster.rest("a", "too late", "error")
    assert list(first.roster.peers) == []
    assert list(second.roster.peers) == ["a"]
    del second.memory.nodes[5]
    assert list(second.roster.refresh()) == []
    assert list(first.roster.everyone) == []
