"""Whatever a client or the cloud sends, an edge averages the others, and lives on."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from support.edge_rounds import START, ScriptedEdge
from support.hostile import FEW, MANY, bad_arrays, bad_records, scalars, spoiled, with_array
from support.memory import MemoryGrid, streaming
from support.peers import FakeClient, interval_task, plan

from fedphd.common.errors import ReplyError
from fedphd.common.events import EventLog
from fedphd.common.wire.messages import TRAIN, IntervalReply
from fedphd.common.wire.offers import CHOOSE
from fedphd.common.wire.records import (
    read_array,
    read_payload,
    read_weights,
    to_records,
    weights_record,
)
from fedphd.edge.app import EdgeService

# Rounds with the good clients alone, (10 * 1 + 30 * 5) / 40 = 4; and with an honest third of 20.
GOOD, ALL = [14.0, 24.0, 34.0], [13.0, 23.0, 33.0]


class Hostile(FakeClient):
    """An honest client whose answers of one ``kind`` a test replaces."""

    kind = TRAIN
    answer: Any = staticmethod(lambda records: records)

    def __call__(self, message: Message) -> Message | None:
        reply = super().__call__(message)
        if reply is not None and message.metadata.message_type == self.kind:
            return Message(self.answer(reply.content), reply_to=message)
        return reply


def content_of(records: RecordDict) -> Any:
    return json.loads(str(records.config_records["fedphd"]["payload"]))


def with_scalars(records: RecordDict, content: Any) -> RecordDict:
    return RecordDict({**records, **scalars(content)})


def check(answer: Any, kind: str = TRAIN, *, refused: bool | None = None) -> None:
    """One round with a client that answers so; ``refused``: whether it must be; None: may be."""
    # Alone it would give 1 more: (10 * 1 + 30 * 5 + 20 * 1) / 60 = 3.
    bad = Hostile("bad", (20, 0), step=1.0)
    bad.kind, bad.answer = kind, answer
    world = ScriptedEdge(
        [bad, FakeClient("small", (10, 0)), FakeClient("large", (0, 30), step=5.0)]
    )
    average = world.run()
    assert average is not None
    [stats] = world.told
    if stats.failures:
        [failure] = stats.failures
        assert failure.startswith("bad: ")
        assert len(failure) < 1000
        assert world.failed == [("bad", failure.removeprefix("bad: "))]
        assert average.tolist() == GOOD
        assert stats.clients == ["large", "small"]
        assert stats.num_samples == world.strategy.offer.num_samples == 40
    elif "bad" in stats.clients:
        assert average.tolist() == pytest.approx(ALL)
        assert stats.steps <= 9 + 20
    else:
        # It went elsewhere.
        assert kind == CHOOSE
        assert average.tolist() == GOOD
    assert refused is None or refused == bool(stats.failures)


@MANY
@given(st.data())
def test_spoiled_scalars_of_a_trained_client(data: st.DataObject) -> None:
    check(lambda records: with_scalars(records, data.draw(spoiled(content_of(records)))))


@FEW
@given(st.data())
def test_spoiled_choices(data: st.DataObject) -> None:
    check(lambda records: with_scalars(records, data.draw(spoiled(content_of(records)))), CHOOSE)


@MANY
@given(bad_arrays(START))
def test_bad_arrays_of_a_trained_client(array: Array) -> None:
    check(lambda records: with_array(records, array), refused=True)


@FEW
@given(bad_records(), st.sampled_from([TRAIN, CHOOSE]))
def test_other_records(bad: RecordDict, kind: str) -> None:
    check(lambda records: bad, kind, refused=True)


ABSURD = [
    ("client_id", "large", "answers as large; expected bad"),
    ("steps", 21, "claims 21 steps; at most 20 fit"),
    ("steps", -1, "malformed TrainReply: steps"),
    ("num_examples", 10**18, f"claims {10**18} examples"),
    ("num_examples", -1, "malformed TrainReply: num_examples"),
    ("num_examples", math.nan, "malformed TrainReply: num_examples"),
    ("interval", 2, "answers interval 2 round 1; expected interval 1 round 1"),
    ("edge_round", 2, "answers interval 1 round 2; expected interval 1 round 1"),
]


@pytest.mark.parametrize(("key", "value", "reason"), ABSURD, ids=[f"{k}={v}" for k, v, _ in ABSURD])
def test_absurd_figures_are_named(key: str, value: Any, reason: str) -> None:
    bad = Hostile("bad", (20, 0))
    bad.answer = lambda records: with_scalars(records, content_of(records) | {key: value})
    world = ScriptedEdge(
        [bad, FakeClient("small", (10, 0)), FakeClient("large", (0, 30), step=5.0)]
    )
    average = world.run()
    assert average is not None
    assert average.tolist() == GOOD
    assert reason in world.told[0].failures[0]


def test_values_near_the_largest_float_are_refused_before_they_are_summed() -> None:
    check(lambda records: with_array(records, Array(torch.full((3,), 3e38).numpy())), refused=True)


def test_a_second_reply_does_not_count() -> None:
    world = ScriptedEdge([FakeClient("a", (10, 0), step=1.0), FakeClient("b", (0, 10), step=5.0)])
    messages = world.strategy.configure_train(1, weights_record(START), ConfigRecord(), world.grid)
    replies = list(world.grid.send_and_receive(messages, timeout=3.0))
    average, _ = world.strategy.aggregate_train(1, [replies[0], *replies, replies[0]])
    assert average is not None
    assert read_array(next(iter(average.values()))).tolist() == [13.0, 23.0, 33.0]
    [stats] = world.told
    assert (stats.clients, stats.num_samples, stats.steps) == (["a", "b"], 20, 6)
    first = world.roster.name_of(replies[0].metadata.src_node_id)
    assert stats.failures == [f"{first}: answers a second time; only its first answer counts"] * 2


def test_reply_of_a_node_that_was_not_asked_does_not_count() -> None:
    world = ScriptedEdge([FakeClient("a", step=1.0), FakeClient("b", step=5.0, edge="edge-1")])
    messages = world.strategy.configure_train(1, weights_record(START), ConfigRecord(), world.grid)
    replies = list(world.grid.send_and_receive(messages, timeout=3.0))
    stranger = Message(replies[0].content, reply_to=Message(RecordDict(), 99, TRAIN))
    average, _ = world.strategy.aggregate_train(1, [stranger, *replies])
    assert average is not None
    assert read_array(next(iter(average.values()))).tolist() == [11.0, 21.0, 31.0]


@pytest.mark.parametrize("num_good", [2, 3, 6])
@pytest.mark.parametrize("name", ["a", "z"])
def test_update_that_is_far_too_long_is_dropped_whenever_it_comes(num_good: int, name: str) -> None:
    good = [FakeClient(f"client-{n}", step=1.0) for n in range(num_good)]
    bad = FakeClient(name, step=11.0)
    config = plan(schedule={"edge_rounds": 2})
    world = ScriptedEdge([*good, bad] if name == "z" else [bad, *good], config)
    average = world.run()
    assert average is not None
    assert average.tolist() == [12.0, 22.0, 32.0]
    assert name not in {client for stats in world.told for client in stats.clients}
    [failure] = world.told[0].failures
    # The 2-norm of 11 in each of three places, over a step of one batch.
    assert f"{name}: its change of the weights, per optimiser step, has the norm 19.05, " in failure
    assert "11 times the median 1.732 of its round; at most 10 times is allowed" in failure
    assert world.told[1].failures == [], "who failed is left alone for a while"


def test_many_images_make_a_long_update_that_counts() -> None:
    # 20 batches of 32 images move it 20 times as far.
    many = FakeClient("many", (640, 0), step=20.0)
    world = ScriptedEdge([many, *(FakeClient(f"client-{n}", (10, 10)) for n in range(3))])
    world.run()
    assert world.told[0].failures == []
    assert "many" in world.told[0].clients


def test_claiming_images_makes_no_room_for_a_long_update() -> None:
    # By the images that it claims, the update were as long as the others'.
    liar = FakeClient("liar", (5_000_000, 5_000_000), step=100_000.0)
    world = ScriptedEdge([liar, *(FakeClient(f"client-{n}", (10, 10)) for n in range(3))])
    world.roster.max_samples = 10_000_000
    world.run()
    (failure,) = world.told[0].failures
    assert failure.startswith("liar: its change of the weights")
    assert "liar" not in world.told[0].clients


def test_bound_can_be_switched_off() -> None:
    clients = [FakeClient("bad", step=1000.0), FakeClient("a"), FakeClient("b"), FakeClient("c")]
    world = ScriptedEdge(clients, plan(aggregation={"max_update_ratio": 0.0}))
    world.run()
    assert world.told[0].clients == ["a", "b", "bad", "c"]


def test_trimmed_mean_of_clients_is_without_images_and_extremes() -> None:
    clients = [FakeClient("a"), FakeClient("b", step=2.0)]
    clients += [FakeClient("c", (900, 0), step=6.0), FakeClient("d", step=9.0)]
    world = ScriptedEdge(clients, plan(aggregation={"method": "trimmed_mean", "trim": 0.25}))
    average = world.run()
    assert average is not None
    # (2 + 6) / 2, though c has nearly all images.
    assert average.tolist() == [14.0, 24.0, 34.0]


def test_two_clients_are_too_few_to_trim() -> None:
    clients = [FakeClient("a", (10, 0)), FakeClient("b", (30, 0), step=5.0)]
    average = ScriptedEdge(clients, plan(aggregation={"method": "trimmed_mean"})).run()
    assert average is not None
    assert average.tolist() == GOOD


@contextmanager
def service(folder: Path) -> Iterator[EdgeService]:
    """An edge of two clients, which a cloud talks to."""
    grid = streaming(MemoryGrid({2: FakeClient("a"), 3: FakeClient("b", step=3.0)}))
    events = EventLog(folder / "events.jsonl", role="edge", node="edge-0")
    yield EdgeService("edge-0", grid, events, threading.Event())
    events.close()


TASK = interval_task(plan())
ORDER = json.loads(TASK.model_dump_json())


def ask(edge: EdgeService, records: RecordDict) -> list[float]:
    """The weights that an order of the cloud leads to."""
    reply = edge.handle(Message(records, 1, TRAIN))
    assert read_payload(reply, IntervalReply).edge_id == "edge-0"
    return read_weights(reply).tolist()


@FEW
@given(st.data())
def test_spoiled_orders_of_a_cloud(tmp_path_factory: Any, data: st.DataObject) -> None:
    with service(tmp_path_factory.mktemp("edge")) as edge:
        # Not the plan's numbers: a cloud may order as many rounds as it likes.
        head = {key: value for key, value in ORDER.items() if key != "plan"}
        content = {"plan": ORDER["plan"]} | data.draw(spoiled(head))
        try:
            weights = ask(edge, with_scalars(to_records(TASK, START), content))
        except ReplyError:
            pass
        else:
            assert weights == [12.0, 22.0, 32.0]
        assert ask(edge, to_records(TASK, START)) == [12.0, 22.0, 32.0], "it lives on"


@FEW
@given(bad_arrays(START), bad_records())
def test_bad_arrays_and_records_of_a_cloud(
    tmp_path_factory: Any, array: Array, bad: RecordDict
) -> None:
    with service(tmp_path_factory.mktemp("edge")) as edge:
        for records in (to_records(TASK, array), bad, to_records(TASK)):
            with pytest.raises(ReplyError):
                ask(edge, records)
        assert ask(edge, to_records(TASK, START)) == [12.0, 22.0, 32.0]


def test_bound_learns_from_interval_to_interval(tmp_path: Path) -> None:
    with service(tmp_path) as edge:
        nodes = {n: FakeClient(f"client-{n}") for n in range(2, 5)}
        edge.grid = edge.roster.grid = streaming(MemoryGrid({**nodes}))
        ask(edge, to_records(TASK, START))
        assert edge._bounds is not None
        # Measured by the first interval: the long update is held back, the next one used at once.
        [bound] = edge._bounds
        bound.start()
        held = [len(bound.offer((norm,), None)) for norm in (170.0, 1.7)]  # type: ignore[arg-type]
        assert held == [0, 1]
