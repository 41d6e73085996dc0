"""Messages in the store of Flower's simulation, the real one, with its nodes and its run."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.typing import Run
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from support.memory import MemoryGrid
from support.waiting import HANG_S

from fedphd.common.wire import handover
from fedphd.common.wire.handover import hand_over_at_once, tell_of_replies


class Simulation:
    """A store, as ``flwr-simulation`` makes it."""

    def __init__(self, num_nodes: int) -> None:
        hand_over_at_once()
        factory = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
        )
        self.state: Any = factory.state()
        run = Run.create_empty(1)
        run.primary_task_id, run.federation = 1, NOOP_FEDERATION
        self.state.run_ids[1] = RunRecord(run=run)
        self.state.task_store[1] = Task(task_id=1, run_id=1)
        self.nodes = [self._node(number) for number in range(num_nodes)]
        self.grid = InMemoryGrid(state_factory=factory)
        self.grid.set_run(run)

    def _node(self, number: int) -> int:
        node: int = self.state.create_node("", "", bytes([number]) * 32, heartbeat_interval=1e6)
        self.state.acknowledge_node_heartbeat(node, heartbeat_interval=1e6)
        return node

    def send(self, text: str, node: int) -> None:
        content = RecordDict({"text": ConfigRecord({"is": text})})
        assert len(list(self.grid.push_messages([Message(content, node, "train")]))) == 1

    def take(self, node: int, limit: int | None = 1) -> list[str]:
        """What the simulation hands to a node."""
        taken = self.state.get_message_ins(node_id=node, limit=limit)
        return [message.content["text"]["is"] for message in taken]


def test_whoever_is_asked_for_messages_come_as_they_were_sent_and_once() -> None:
    world = Simulation(3)
    first, second, third = world.nodes
    for text, node in (("a", first), ("b", second), ("c", first), ("d", first)):
        world.send(text, node)
    assert [world.take(third), world.take(first)] == [["a"], ["b"]]
    assert world.take(second, None) == ["c", "d"]
    assert [world.take(node) for node in world.nodes] == [[], [], []]


def test_a_message_that_ran_out_of_time_is_not_handed_over() -> None:
    world = Simulation(1)
    [node] = world.nodes
    world.send("late", node)
    world.send("here", node)
    world.state.message_ins_store[next(iter(world.state.message_ins_store))].metadata.ttl = 0.0
    assert world.take(node) == ["here"]
    assert len(world.state.message_ins_store) == 1


def test_only_what_is_handed_over_is_looked_at() -> None:
    world = Simulation(2)
    busy, idle = world.nodes
    for number in range(50):
        world.send(str(number), busy)
    looked: list[set[str]] = []
    check = world.state._check_stored_messages
    world.state._check_stored_messages = lambda ids: (looked.append(ids), check(ids))[1]
    assert world.take(idle) == ["0"]
    assert [len(ids) for ids in looked] == [1]


def test_a_message_that_is_sent_while_nothing_is_there_comes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A look may take half of it with two nodes.
    monkeypatch.setattr(handover, "_TURN_S", 60.0)
    world = Simulation(2)
    came: list[tuple[list[str], float]] = []

    def look() -> None:
        came.append((world.take(world.nodes[0]), time.monotonic()))

    looking = threading.Thread(target=look)
    looking.start()
    time.sleep(0.1)
    sent_s = time.monotonic()
    world.send("a", world.nodes[1])
    looking.join(HANG_S)
    [(taken, taken_s)] = came
    assert taken == ["a"]
    assert taken_s - sent_s < 15.0


def test_who_sent_a_message_is_told_of_its_reply() -> None:
    world = Simulation(1)
    [node] = world.nodes
    told: list[str] = []
    tell_of_replies(world.grid, told.append)
    world.send("a", node)
    [message] = world.state.get_message_ins(node_id=node, limit=1)
    reply = Message(RecordDict(), reply_to=message)
    reply.metadata.__dict__["_message_id"] = "reply"
    assert told == []
    assert world.state.store_message_res(reply) == "reply"
    assert told == [message.metadata.message_id]
    # A second one is refused, and told to nobody.
    assert world.state.store_message_res(reply) is None
    assert len(told) == 1
    assert len(list(world.grid.pull_messages(told))) == 1


def test_another_grid_tells_nothing() -> None:
    told: list[str] = []
    grid = MemoryGrid({2: lambda message: Message(RecordDict(), reply_to=message)})
    tell_of_replies(grid, told.append)
    ids = list(grid.push_messages([Message(RecordDict(), 2, "train")]))
    assert len(list(grid.pull_messages(ids))) == 1
    assert told == []


@pytest.mark.parametrize(("num_nodes", "looks"), [(2, 2), (1000, 1000)])
def test_a_turn_without_messages_takes_a_second_however_many_nodes_there_are(
    num_nodes: int, looks: int
) -> None:
    outbox = handover._Outbox()
    started_s = time.monotonic()
    assert [outbox.take(num_nodes) for _ in range(looks)] == [None] * looks
    assert 0.9 < time.monotonic() - started_s < 10.0
