"""Virtual edges that share one grid of clients: what is asked once, and with whose offers."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from support.memory import FakeTime, MemoryGrid
from support.peers import FakeClient
from support.waiting import HANG_S

from fedphd.common.events import EventLog
from fedphd.common.wire.messages import FINISH, HELLO, TRAIN, Ack, Finish, Hello
from fedphd.common.wire.offers import CHOOSE, Choose, ChooseReply, Offer
from fedphd.common.wire.payload import Payload
from fedphd.common.wire.records import read_payload, read_weights, to_records
from fedphd.deploy.simulation.virtual_edges import SharedClients, VirtualEdges, _grid_of_edge

NODE = 5


class World:
    """One client, shared by ``num_edges`` edges."""

    def __init__(self, num_edges: int = 2) -> None:
        self.client = FakeClient("client-0", counts=(6, 4), edge="edge-1")
        self.memory = MemoryGrid({NODE: self.client})
        self.time = FakeTime()
        self.num_edges = num_edges
        self.shared = SharedClients(self.memory, clock=self.time.clock)

    def ask(self, kind: str, payload: Payload) -> str:
        """Push an edge's message; returns its id."""
        return self.shared.push_messages([Message(to_records(payload), NODE, kind)])[0]

    def choose(self, edge_id: str, *, held: float = 0.0, **changes: Any) -> str:
        offer = Offer(edge_id=edge_id, label_distribution=(0.5, 0.5), num_samples=held)
        values: dict[str, Any] = {
            "interval": 1, "edge_round": 1, "policy": "homogeneity", "target": (0.5, 0.5),
            "factor": 1.0, "offset": 0.0, "epsilon": 1e-8, "seed": 0, "offer_wait_s": 5.0,
            "synchronised": False, "num_edges": self.num_edges,
        }  # fmt: skip
        asked = Choose(asking=edge_id, offers=(offer,), **(values | changes))
        return self.ask(CHOOSE, asked)

    def answers(self, *message_ids: str) -> list[Message]:
        return self.shared.pull_messages(message_ids)

    def offers(self) -> list[dict[str, float]]:
        """What each question that reached the client offered: samples held, by edge."""
        return [{o.edge_id: o.num_samples for o in asked.offers} for asked in self.client.asked]


def test_simulated_clients_need_not_be_told_of_the_end() -> None:
    world = World()
    told = world.ask(FINISH, Finish(exit_code=0, message="done"))
    [answer] = world.answers(told)
    assert answer.metadata.reply_to_message_id == told
    assert read_payload(answer, Ack).name == str(NODE)
    assert world.memory.pushed == []


def test_a_question_waits_for_all_edges_offers() -> None:
    world = World()
    first = world.choose("edge-0", held=3.0)
    assert world.answers(first) == []
    second = world.choose("edge-1", held=4.0)
    replies = [read_payload(a, ChooseReply) for a in world.answers(first, second)]
    assert [reply.edge_id for reply in replies] == ["edge-1", "edge-1"]
    assert world.offers() == [{"edge-0": 3.0, "edge-1": 4.0}]


def test_a_question_that_waited_in_vain_goes_out_with_the_latest_offers() -> None:
    world = World()
    world.answers(world.choose("edge-0"), world.choose("edge-1", held=4.0))
    early = world.choose("edge-0", held=10.0, edge_round=2)
    assert world.answers(early) == []
    world.time.now_s = 5.1
    assert len(world.answers(early)) == 1
    assert world.offers()[1] == {"edge-0": 10.0, "edge-1": 4.0}
    # The other edge gets the choice that was made, and the client is not asked again.
    late = world.choose("edge-1", held=9.0, edge_round=2)
    assert len(world.answers(late)) == 1
    assert len(world.client.asked) == 2


def test_synchronised_questions_wait_for_every_edge_itself() -> None:
    world = World()
    world.answers(world.choose("edge-0"), world.choose("edge-1"))
    early = world.choose("edge-0", edge_round=2, synchronised=True)
    assert world.answers(early) == []
    late = world.choose("edge-1", held=7.0, edge_round=2, synchronised=True)
    assert len(world.answers(early, late)) == 2
    assert world.offers()[1] == {"edge-0": 0.0, "edge-1": 7.0}


def test_offers_that_do_not_come_are_waited_for_no_longer_than_allowed() -> None:
    world = World()
    early = world.choose("edge-0", held=3.0)
    world.time.now_s = 4.9
    assert world.answers(early) == []
    world.time.now_s = 5.1
    assert len(world.answers(early)) == 1
    assert world.offers() == [{"edge-0": 3.0}]


def test_an_interval_begins_with_new_offers() -> None:
    world = World()
    world.answers(world.choose("edge-0"), world.choose("edge-1", held=4.0))
    assert world.answers(world.choose("edge-0", interval=2)) == []


@pytest.mark.parametrize("before_the_answer", [True, False])
def test_nothing_is_kept_of_what_nobody_waits_for(before_the_answer: bool) -> None:
    world = World()
    first, second = world.choose("edge-0"), world.choose("edge-1")
    if not before_the_answer:
        world.answers()
    world.shared.forget(first)
    assert len(world.answers(first, second)) == 1
    for store in (world.shared._answers, world.shared._question_of, world.shared._open):
        assert store == {}
    assert world.shared._sent == {}


def test_an_edge_that_gives_up_is_not_kept_waiting_for() -> None:
    world = World()
    world.client.silent = {TRAIN}
    edge = _grid_of_edge(world.memory, world.shared, 2, num_trainings=16)
    order = Message(to_records(Hello(asking="edge-0")), NODE, TRAIN)
    [reply] = edge.send_and_receive([order], timeout=0.0)
    assert reply.error.reason == "no reply within 0 s"
    assert len(world.memory.pushed) == 1
    assert world.shared._question_of == {}
    with pytest.raises(NotImplementedError, match="wrap this grid in a StreamingGrid"):
        world.shared.send_and_receive([order])


def test_choices_of_long_ago_are_forgotten() -> None:
    world = World()
    for interval in range(1, 5):
        ids = [world.choose(edge, interval=interval) for edge in ("edge-0", "edge-1")]
        assert len(world.answers(*ids)) == 2
    assert [key[2] for key in world.shared._kept] == [3, 4]


def test_what_a_client_gets_shares_no_record_with_what_others_get() -> None:
    """Flower writes into a record that it serialises, while another thread may pickle it."""
    world = World()
    world.memory.nodes = {NODE: world.client, NODE + 1: world.client}
    weights = torch.arange(4.0)
    records = to_records(Hello(asking="edge-0"), weights)
    world.shared.push_messages([Message(records, node, TRAIN) for node in (NODE, NODE + 1)])
    sent = [message.content for message in world.memory.pushed]
    assert len(sent) == 2
    for name, record in records.items():
        assert len({id(record), id(sent[0][name]), id(sent[1][name])}) == 3
    arrays = [array for content in (records, *sent) for array in content.array_records.values()]
    flat = [array for record in arrays for array in record.values()]
    assert len({id(array) for array in flat}) == 3
    assert len({id(array.data) for array in flat}) == 1
    for message in world.memory.pushed:
        assert torch.equal(read_weights(message), weights)
        assert read_payload(message, Hello) == Hello(asking="edge-0")


def test_no_more_clients_train_at_a_time_than_there_is_room_for() -> None:
    world = World()
    world.memory.nodes = {NODE + n: world.client for n in range(5)}
    shared = SharedClients(world.memory, max_trainings=2, clock=world.time.clock)
    ids = shared.push_messages(
        [Message(to_records(Hello(asking="edge-0")), NODE + n, TRAIN) for n in range(5)]
    )
    started = world.memory.pushed
    assert [message.metadata.dst_node_id for message in started] == [NODE, NODE + 1]
    # The edge gives up one that waits, and one that trains: only the latter makes room.
    shared.forget(ids[2])
    assert len(started) == 2
    assert len(shared._open) == 4
    shared.forget(ids[0])
    assert [message.metadata.dst_node_id for message in started[2:]] == [NODE + 3]
    # A greeting is no training.
    shared.push_messages([Message(to_records(Hello(asking="edge-0")), NODE + 4, HELLO)])
    assert len(started) == 4
    answers = shared.pull_messages(ids)
    assert [answer.metadata.reply_to_message_id for answer in answers] == [ids[1], ids[3]]
    assert [message.metadata.dst_node_id for message in started[4:]] == [NODE + 4]
    assert [a.metadata.reply_to_message_id for a in shared.pull_messages(ids)] == [ids[4]]


def wait_s(grid: SharedClients | VirtualEdges, message_id: str) -> float:
    """How long a grid lets somebody wait who would wait long."""
    started_s = time.monotonic()
    grid.wait([message_id], HANG_S)
    return time.monotonic() - started_s


def test_an_edge_is_woken_by_an_answer_that_another_edge_has_pulled() -> None:
    world = World()
    first, second = world.choose("edge-0"), world.choose("edge-1")
    woken: list[float] = []
    waiting = threading.Thread(target=lambda: woken.append(wait_s(world.shared, first)))
    waiting.start()
    assert len(world.answers(second)) == 1
    waiting.join(HANG_S)
    assert woken[0] < HANG_S / 4
    pulled = len(world.memory.pushed)
    assert len(world.answers(first)) == 1
    assert len(world.memory.pushed) == pulled


def test_who_asked_is_woken_when_flower_has_a_reply() -> None:
    world = World()
    order = world.ask(TRAIN, Hello(asking="edge-0"))
    [sent_as] = world.shared._sent
    world.shared._came(sent_as)
    assert wait_s(world.shared, order) < HANG_S / 4
    assert len(world.answers(order)) == 1
    # One that nobody waits for any more.
    world.shared._came(sent_as)


def test_the_cloud_is_woken_when_an_edge_is_done(tmp_path: Path) -> None:
    with closing(EventLog(tmp_path / "events.jsonl", role="cloud", node="cloud")) as log:
        edges = VirtualEdges(MemoryGrid({}), ["edge-0"], log)
        [asked] = edges.push_messages([Message(to_records(Hello(asking="cloud")), 1, HELLO)])
        assert wait_s(edges, asked) < HANG_S / 4
        [reply] = edges.pull_messages([asked])
    assert reply.metadata.reply_to_message_id == asked


def test_an_edge_works_on_one_order_at_a_time(tmp_path: Path) -> None:
    release, at_work = threading.Event(), threading.Event()
    order: list[str] = []

    def handle(message: Message) -> Message:
        kind = message.metadata.message_type
        order.append(kind)
        if kind == TRAIN:
            at_work.set()
            assert release.wait(HANG_S)
        order.append(f"{kind} done")
        return Message(to_records(Ack(name="edge-0")), reply_to=message)

    with closing(EventLog(tmp_path / "events.jsonl", role="cloud", node="cloud")) as log:
        edges = VirtualEdges(MemoryGrid({}), ["edge-0", "edge-1"], log)
        edges._edges[1].handle = handle  # type: ignore[method-assign]
        hello = to_records(Hello(asking="cloud"))
        ids = edges.push_messages([Message(hello, 1, kind) for kind in (TRAIN, HELLO)])
        assert at_work.wait(HANG_S)
        # The other edge's thread is idle, and may not take it.
        [other] = edges.push_messages([Message(hello, 2, HELLO)])
        edges.wait([other], HANG_S)
        assert len(edges.pull_messages([other])) == 1
        assert order == [TRAIN]
        release.set()
        for message_id in ids:
            edges.wait([message_id], HANG_S)
    assert order == [TRAIN, f"{TRAIN} done", HELLO, f"{HELLO} done"]


def test_an_order_that_waits_for_room_has_not_begun() -> None:
    world = World()
    world.memory.nodes = {NODE + n: world.client for n in range(2)}
    shared = SharedClients(world.memory, max_trainings=1, clock=world.time.clock)
    orders = [Message(to_records(Hello(asking="edge-0")), NODE + n, TRAIN) for n in range(2)]
    first, second = shared.push_messages(orders)
    assert [shared.has_begun(message_id) for message_id in (first, second)] == [True, False]
    assert len(shared.pull_messages([first, second])) == 1
    assert shared.has_begun(second)
    # A question waits for offers, no longer than it says.
    assert world.shared.has_begun(world.choose("edge-0"))
