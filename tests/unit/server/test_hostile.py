"""Whatever an edge sends: the cloud's average stays that of the others, and it lives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from support.edges import Cloud, FakeEdge, run_config
from support.hostile import FEWEST, bad_arrays, bad_records, scalars, spoiled, with_array

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.errors import ConfigError
from fedphd.common.wire.messages import TRAIN
from fedphd.common.wire.records import weights_record
from fedphd.common.wire.traffic import Traffic

DENSE = Cloud().dense
PLAIN = {"aggregation": {"factor": 0.0}}


class Hostile(FakeEdge):
    """An honest edge whose answers to orders a test replaces."""

    answer: Any = staticmethod(lambda records: records)

    def __call__(self, message: Message) -> Message | None:
        reply = super().__call__(message)
        if reply is not None and message.metadata.message_type == TRAIN:
            return Message(self.answer(reply.content), reply_to=message)
        return reply


def check(answer: Any, *, refused: bool | None = None) -> None:
    """One interval with an edge that answers so; ``refused``: whether it must be; None: may be."""
    bad = Hostile("bad", step=1.0)
    bad.answer = answer
    world = Cloud(bad, FakeEdge("good", step=3.0), config=run_config(**PLAIN))
    change = world.run()
    [stats] = world.told
    mine = [text for text in stats.failures if text.startswith("bad: ")]
    assert all(len(text) < 1000 for text in stats.failures)
    share = stats.edge_weights.get("bad", 0.0)
    if mine:
        assert share == 0.0
        assert "bad" not in world.roster.peers, "it is left alone for a while"
    expected = torch.full_like(change, share * 1.0 + (1 - share) * 3.0)
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-5)
    assert math.isfinite(world.strategy.ema.steps)
    assert refused is None or refused == bool(mine)


def content_of(records: RecordDict) -> Any:
    return json.loads(str(records.config_records["fedphd"]["payload"]))


@FEWEST
@given(st.data())
def test_spoiled_scalars(data: st.DataObject) -> None:
    def answer(records: RecordDict) -> RecordDict:
        content = content_of(records)
        # 64 tensors: most drawn places would lie in there.
        content["network"]["unet"] = {}
        return RecordDict({**records, **scalars(data.draw(spoiled(content)))})

    check(answer)


@FEWEST
@given(bad_arrays(DENSE))
def test_bad_arrays(array: Array) -> None:
    check(lambda records: with_array(records, array), refused=True)


@FEWEST
@given(bad_records())
def test_other_records(bad: RecordDict) -> None:
    check(lambda records: bad, refused=True)


ABSURD: list[tuple[str, Any, str]] = [
    ("traffic", {"sent_bytes": 10**30, "received_bytes": 0}, "claims 1e+30 bytes over its links"),
    ("mean_steps", 1e29, "claims 1e+29 client steps; at most 20000000 fit"),
    ("images", 10**30, f"claims {10**30} images of steps; at most "),
    ("images", -1, "malformed IntervalReply: images"),
    ("client_rounds", 10**18, f"claims {10**18} client rounds; at most 2 fit"),
    ("samples_per_round", -1.0, "malformed IntervalReply: samples_per_round"),
    ("clients", ["\x1b[2J"], "names a client '\\x1b[2J' is not a valid name"),
    ("rounds", [{}] * 3, "claims 3 edge rounds; an interval has 2"),
    ("rounds", [{"clients": ["x"]}], "names 'x' in a round, but not among its clients"),
    ("rounds", [{"left_out": ["a b"]}], "names a client 'a b' is not a valid name"),
    ("interval", 2, "answers as bad for interval 2"),
]


@pytest.mark.parametrize(
    ("key", "value", "reason"), ABSURD, ids=[f"{n}-{a[0]}" for n, a in enumerate(ABSURD)]
)
def test_absurd_figures_are_named(key: str, value: Any, reason: str) -> None:
    def answer(records: RecordDict) -> RecordDict:
        return RecordDict({**records, **scalars(content_of(records) | {key: value})})

    edges = [Hostile("bad", step=1.0), Hostile("worse", step=1.0)]
    for edge in edges:
        edge.answer = answer
    world = Cloud(*edges, FakeEdge("good", step=3.0), config=run_config(**PLAIN))
    change = world.run()
    torch.testing.assert_close(change, torch.full_like(change, 3.0), rtol=0, atol=1e-5)
    assert any(text.startswith(f"bad: {reason}") for text in world.told[0].failures)


def test_texts_of_an_edge_are_cut_off() -> None:
    world = Cloud(FakeEdge("e", reply={"failures": ("\x1b[2J" + "x" * 10**6,)}))
    world.run()
    [failure] = world.told[0].failures
    assert len(failure) < 1000
    assert "\x1b" not in failure


def test_most_traffic_that_passes_does_not_overflow_when_it_is_summed() -> None:
    most = Traffic(sent_bytes=10**15, received_bytes=10**15)
    edges = [FakeEdge(f"edge-{n}", reply={"traffic": most}) for n in range(3)]
    world = Cloud(*edges)
    world.run()
    assert world.told[0].client_edge.sent_bytes == 3 * 10**15


def test_second_and_strange_replies_do_not_count() -> None:
    world = Cloud(FakeEdge("a", step=1.0), FakeEdge("b", step=3.0), config=run_config(**PLAIN))
    arrays = weights_record(world.strategy.weights())
    messages = world.strategy.configure_train(1, arrays, ConfigRecord(), world.grid)
    one, other = world.grid.send_and_receive(messages)
    stranger = Message(one.content, reply_to=Message(RecordDict(), 99, TRAIN))
    world.strategy.aggregate_train(1, [one, stranger, one, other, one])
    change = world.strategy.weights() - world.dense
    torch.testing.assert_close(change, torch.full_like(change, 2.0), rtol=0, atol=1e-5)
    [stats] = world.told
    assert stats.failures == [
        "a stranger: an answer that nobody asked for",
        *["a: an answer that nobody asked for"] * 2,
    ]
    assert stats.edge_weights == {"a": 0.5, "b": 0.5}


def three(**bad: Any) -> list[FakeEdge]:
    return [FakeEdge("a", step=1.0), FakeEdge("b", step=1.0), FakeEdge("bad", **bad)]


def test_update_that_is_far_too_long_is_dropped() -> None:
    world = Cloud(*three(step=11.0), config=run_config(**PLAIN))
    change = world.run()
    torch.testing.assert_close(change, torch.ones_like(change), rtol=0, atol=1e-5)
    [failure] = world.told[0].failures
    assert failure.startswith("bad: its change of the weights, per optimiser step, has the norm ")
    assert "11 times the median" in failure
    assert "bad" not in world.roster.peers


@pytest.mark.parametrize(
    ("edges", "aggregation"),
    [
        (three(step=9.0), {}),
        (three(step=11.0), {"max_update_ratio": 0.0}),
        (three(step=11.0), {"max_update_ratio": 12.0}),
        ([FakeEdge("a", step=1.0), FakeEdge("bad", step=1000.0)], {}),
        # 20 batches, so 20 times as far.
        (three(step=20.0, samples=640.0), {}),
    ],
    ids=["within", "no bound", "larger bound", "two edges", "many images"],
)
def test_update_that_is_not_too_long_counts(edges: list[FakeEdge], aggregation: Any) -> None:
    world = Cloud(*edges, config=run_config(aggregation={"factor": 0.0} | aggregation))
    world.run()
    assert world.told[0].failures == []
    assert world.told[0].edge_weights["bad"] > 0


def test_who_claims_ever_more_images_gets_no_longer_update_for_them() -> None:
    world = Cloud(*three(step=1000.0, samples=1e6), config=run_config(aggregation={"factor": 0.0}))
    world.run()
    assert "bad: its change of the weights" in world.told[0].failures[0]


def test_who_lists_countless_clients_does_not_make_them_usual() -> None:
    listed = {f"invented-{number}": 1000 for number in range(40)}
    edges = three(step=1000.0, samples=1e6, clients=listed)
    world = Cloud(*edges, config=run_config(aggregation={"factor": 0.0}))
    world.run()
    assert "bad: its change of the weights" in world.told[0].failures[0]


def test_who_claims_ever_more_steps_does_not_end_the_moving_average() -> None:
    world = Cloud(
        FakeEdge("bad", samples=1e6, reply={"mean_steps": 1e7}), config=run_config(**PLAIN)
    )
    world.run()
    assert world.told[0].mean_steps <= 1000


def test_the_change_of_many_clients_variates_is_long_and_counts() -> None:
    edges = [FakeEdge(name, change=torch.ones_like) for name in "ab"]
    clients = {f"client-{number}": 10 for number in range(11)}
    many = FakeEdge(
        "many", clients=clients, change=lambda c: torch.full_like(c, 11.0), client_rounds=22
    )
    world = Cloud(*edges, many, config=run_config(objective={"method": "scaffold"}))
    world.run()
    assert world.told[0].failures == []


def test_long_change_of_the_variate_is_dropped() -> None:
    edges = [FakeEdge(name, change=torch.ones_like) for name in "ab"]
    edges.append(FakeEdge("bad", change=lambda c: torch.full_like(c, 11.0)))
    world = Cloud(*edges, config=run_config(objective={"method": "scaffold"}))
    world.run()
    assert "bad: its change of the control variate has the norm" in world.told[0].failures[0]
    assert world.strategy.variate is not None
    assert world.strategy.variate.unique().tolist() == [2.0]


def test_an_edge_of_newcomers_counts_after_the_first_interval() -> None:
    def then(first: float, later: float) -> Callable[[torch.Tensor], torch.Tensor]:
        values = iter((first, later))
        return lambda c: torch.full_like(c, next(values))

    edges = [FakeEdge(name, change=then(1.0, 0.01)) for name in "ab"]
    edges.append(FakeEdge("new", change=then(1.0, 1.0)))
    settings = {"objective": {"method": "scaffold"}, "schedule": {"intervals": 2}}
    world = Cloud(*edges, config=run_config(**settings))
    world.run()
    assert [stats.failures for stats in world.told] == [[], []]


TRIMMED = {"aggregation": {"method": "trimmed_mean", "trim": 0.1}}


def test_trimmed_mean_of_three_edges_is_the_median() -> None:
    edges = [
        FakeEdge(n, step=s, samples=m) for n, s, m in (("a", 1, 900), ("b", 2, 1), ("c", 9, 1))
    ]
    world = Cloud(*edges, config=run_config(**TRIMMED))
    change = world.run()
    torch.testing.assert_close(change, torch.full_like(change, 2.0), rtol=0, atol=1e-5)
    assert world.told[0].edge_weights == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})


def test_two_edges_are_too_few_to_trim() -> None:
    edges = [FakeEdge("a", step=1.0, samples=30.0), FakeEdge("b", step=5.0)]
    world = Cloud(*edges, config=run_config(aggregation=TRIMMED["aggregation"] | {"factor": 0.0}))
    change = world.run()
    torch.testing.assert_close(change, torch.full_like(change, 2.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"aggregation.method": "trimmed_mean", "objective.method": "scaffold"},
            "'trimmed_mean' cannot be used with objective.method = 'scaffold'",
        ),
        ({"aggregation.max_update_ratio": 0.5}, "would drop half of all replies; use more than 1"),
        ({"aggregation.trim": 0.5}, "aggregation.trim = 0.5"),
    ],
)
def test_settings_that_exclude_each_other(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(CloudConfig, None, changes)
