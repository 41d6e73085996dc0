"""An edge round: who counts when, and an average that bad replies cannot touch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message
from support.edge_rounds import START, ScriptedEdge
from support.metrics import metrics
from support.peers import FakeClient, plan

from fedphd.common.rng import sample_participants
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.messages import TRAIN, UNetSpec
from fedphd.common.wire.offers import CHOOSE, Choose
from fedphd.common.wire.records import read_array, read_payload, weights_record
from fedphd.edge.averaging import WeightedSum


def test_weighted_sum_by_hand() -> None:
    total = WeightedSum()
    assert total.mean() is None
    total.add(torch.tensor([1.0, 10.0]), 1.0)
    total.add(torch.tensor([5.0, 30.0]), 3.0)
    # (1 * 1 + 3 * 5) / 4 and (1 * 10 + 3 * 30) / 4
    mean = total.mean()
    assert mean is not None
    assert mean.tolist() == [4.0, 25.0]


def test_average_of_two_clients_by_their_samples() -> None:
    small = FakeClient("small", (10, 0), step=1.0, loss=0.2)
    large = FakeClient("large", (0, 30), step=5.0, loss=0.6)
    world = ScriptedEdge([small, large])
    # (10 * 1 + 30 * 5) / 40 = 4 more than before.
    average = world.run()
    assert average is not None
    assert average.tolist() == [14.0, 24.0, 34.0]
    [stats] = world.told
    assert stats.clients == ["large", "small"]
    assert stats.num_samples == 40
    assert stats.metrics.loss.value == pytest.approx((10 * 0.2 + 30 * 0.6) / 40)
    assert stats.mean_steps == 3.0
    assert stats.failures == []
    # Each of three weights moved by 1 and by 5; a step of 10 and of 30 images is one batch.
    assert stats.update_norms == pytest.approx([math.sqrt(3), 5 * math.sqrt(3)])
    assert stats.phases.keys() == {"asking", "sending", "training", "averaging"}
    assert stats.seconds == pytest.approx(sum(stats.phases.values()))


def test_validation_counts_those_that_hold_out_images() -> None:
    some = FakeClient("some", (10, 0), reply={"metrics": metrics(validation_loss=0.5)})
    more = FakeClient("more", (0, 30), reply={"metrics": metrics(validation_loss=0.1)})
    world = ScriptedEdge([some, more, FakeClient("none", (99, 1))])
    world.run()
    [stats] = world.told
    assert stats.metrics.validation_loss.value == pytest.approx((10 * 0.5 + 30 * 0.1) / 40)
    assert stats.metrics.validation_loss.weight == 40
    world = ScriptedEdge([FakeClient("none")])
    world.run()
    assert world.told[0].metrics.validation_loss.value is None


def test_rounds_build_on_one_another() -> None:
    world = ScriptedEdge([FakeClient("a", (4, 4))], plan(schedule={"edge_rounds": 3}))
    average = world.run()
    assert average is not None
    assert average.tolist() == [13.0, 23.0, 33.0]
    assert [task.edge_round for task in world.clients["a"].tasks] == [1, 2, 3]
    assert world.strategy.interval_mean_steps() == 9.0
    assert world.strategy.offer.num_samples == 24.0


def test_clients_that_choose_another_edge_do_not_train_here() -> None:
    world = ScriptedEdge([FakeClient("a", step=1.0), FakeClient("b", step=9.0, edge="edge-1")])
    average = world.run()
    assert average is not None
    assert average.tolist() == [11.0, 21.0, 31.0]
    assert world.told[0].clients == ["a"]
    assert world.told[0].failures == []
    assert world.clients["b"].tasks == []
    assert world.strategy.offer.num_samples == 10.0


def order(world: ScriptedEdge) -> list[FakeClient]:
    """The clients in the first round's seeded order."""
    names = sample_participants(world.clients, fraction=1.0, seed=0, interval=1, edge_round=1)
    return [world.clients[name] for name in names]


def test_asked_one_by_one_the_second_sees_what_the_first_brought() -> None:
    world = ScriptedEdge(
        [FakeClient("a", (6, 2)), FakeClient("b", (6, 2)), FakeClient("c", (6, 2))],
        plan(schedule={"query_batch": 1}),
    )
    world.run()
    offers = [client.asked[0].offers[0] for client in order(world)]
    assert [offer.num_samples for offer in offers] == [0.0, 8.0, 16.0]
    assert offers[0].label_distribution == (0.5, 0.5)
    assert offers[1].label_distribution == (0.75, 0.25)
    asked = [m.metadata.dst_node_id for m in world.sent(CHOOSE)]
    assert [world.memory.nodes[node] for node in asked] == order(world)


def kinds(world: ScriptedEdge) -> list[str]:
    """Questions (c) and orders to train (t), in the order in which they were sent."""
    sent = [message.metadata.message_type for message in world.memory.pushed]
    return [kind[0] for kind in map({CHOOSE: "c", TRAIN: "t"}.get, sent) if kind]


def test_who_has_chosen_trains_while_others_are_asked() -> None:
    one_by_one = plan(schedule={"query_batch": 1})
    world = ScriptedEdge([FakeClient(name) for name in "abc"], one_by_one)
    world.run()
    assert kinds(world) == ["c", "t", "c", "t", "c", "t"]
    world = ScriptedEdge([FakeClient(name) for name in "abc"], plan(schedule={"query_batch": 2}))
    world.run()
    assert kinds(world) == ["c", "c", "t", "t", "c", "t"]


def test_clients_that_share_their_processes_are_all_asked_before_they_train() -> None:
    one_by_one = plan(schedule={"query_batch": 1})
    world = ScriptedEdge([FakeClient(name) for name in "abc"], one_by_one, shared_questions=True)
    world.run()
    assert kinds(world) == ["c", "c", "c", "t", "t", "t"]


def test_asked_together_all_see_the_same() -> None:
    world = ScriptedEdge(
        [FakeClient(name, (6, 2)) for name in "abc"],
        plan(schedule={"query_batch": 100, "edge_rounds": 2}),
    )
    world.run()
    for client in world.clients.values():
        assert [asked.offers[0].num_samples for asked in client.asked] == [0.0, 24.0]


def test_batches_of_two() -> None:
    world = ScriptedEdge(
        [FakeClient(name, (6, 2)) for name in "abcde"], plan(schedule={"query_batch": 2})
    )
    world.run()
    counts = [client.asked[0].offers[0].num_samples for client in order(world)]
    assert counts == [0.0, 0.0, 16.0, 16.0, 32.0]


def test_only_sampled_clients_are_asked() -> None:
    config = plan(schedule={"participation": 0.5})
    world = ScriptedEdge([FakeClient(name) for name in "abcd"], config)
    world.run()
    names = sample_participants("abcd", fraction=0.5, seed=0, interval=1, edge_round=1)
    assert [c.name for c in world.clients.values() if c.asked] == sorted(names)
    assert world.told[0].clients == sorted(names)


@pytest.mark.parametrize("one", [{"schedule": {"num_edges": 1, "edge_rounds": 3}},
                                 {"schedule": {"edge_rounds": 3}, "topology": "flat"}])  # fmt: skip
def test_where_there_is_no_choice_a_client_is_asked_once(one: dict[str, Any]) -> None:
    world = ScriptedEdge([FakeClient("a", (6, 2)), FakeClient("b", (0, 3))], plan(**one))
    world.run()
    assert [len(client.asked) for client in world.clients.values()] == [1, 1]
    assert [stats.clients for stats in world.told] == [["a", "b"]] * 3
    assert [stats.num_samples for stats in world.told] == [11] * 3
    # What it holds counts each of them once per round.
    assert world.strategy.offer.num_samples == 33


def test_a_second_edge_that_nobody_waited_for_gives_clients_a_choice() -> None:
    config = plan(schedule={"num_edges": 1, "edge_rounds": 3})
    world = ScriptedEdge([FakeClient("a"), FakeClient("b", edge="edge-1")], config, num_edges=2)
    world.run()
    assert [len(client.asked) for client in world.clients.values()] == [3, 3]
    assert {asked.num_edges for c in world.clients.values() for asked in c.asked} == {2}
    assert [stats.clients for stats in world.told] == [["a"]] * 3


def test_who_is_known_keeps_its_place_in_the_rounds_order() -> None:
    config = plan(schedule={"num_edges": 1, "edge_rounds": 6, "participation": 0.5})
    world = ScriptedEdge([FakeClient(name) for name in "abcd"], config)
    world.run()
    trained = [world.memory.nodes[m.metadata.dst_node_id].name for m in world.sent(TRAIN)]
    rounds = [
        sample_participants("abcd", fraction=0.5, seed=0, interval=1, edge_round=n)
        for n in range(1, 7)
    ]
    assert trained == [name for names in rounds for name in names]
    assert sum(len(client.asked) for client in world.clients.values()) == len({*trained})


def test_question_is_in_samples_and_says_how_to_choose() -> None:
    config = plan(
        selection={"policy": "min_kl", "factor": 4.0, "offset": -0.5, "epsilon": 1e-6}, seed=5,
        reproducible=True, waits={"offer_s": 2.5, "round_s": 90.0},
    )  # fmt: skip
    world = ScriptedEdge([FakeClient("a", (10, 0)), FakeClient("b", (0, 30))], config, interval=3)
    world.run()
    asked = world.clients["a"].asked[0]
    assert asked.policy == "min_kl"
    # Mean samples per client: 20.
    assert (asked.factor, asked.offset, asked.epsilon) == (80.0, -10.0, 1e-6)
    assert (asked.asking, asked.interval, asked.edge_round) == ("edge-0", 3, 1)
    assert (asked.target, asked.seed) == ((0.5, 0.5), 5)
    assert (asked.offer_wait_s, asked.synchronised) == (90.0, True)


def test_an_edge_in_step_that_never_comes_is_waited_for_once_in_an_interval() -> None:
    config = plan(
        schedule={"edge_rounds": 2, "query_batch": 1}, reproducible=True,
        waits={"round_s": 0.05, "query_s": 20.0},
    )  # fmt: skip
    world = ScriptedEdge([Patient(name) for name in "abc"], config)
    world.run()
    asked = [choose for client in world.clients.values() for choose in client.asked]
    waits = sorted((choose.edge_round, choose.offer_wait_s) for choose in asked)
    assert waits == [(1, 0.0), (1, 0.0), (1, 0.05), (2, 0.0), (2, 0.0), (2, 0.0)]


@pytest.mark.parametrize(("sparse", "expected"), [(True, 0.25), (False, 0.0)])
def test_task_of_a_client_follows_the_plan(sparse: bool, expected: float) -> None:
    config = plan(
        pruning={"mode": "one_shot", "ratio": 0.25, "sparsity_lambda": 0.25,
                 "optimizer_moments": "reset"},
        training={"batch_size": 7}, seed=5,
    )  # fmt: skip
    world = ScriptedEdge([FakeClient("a")], config, sparse=sparse, cut='{"x": 1}', interval=4)
    world.run()
    [task] = world.clients["a"].tasks
    assert task.sparsity_lambda == expected
    assert (task.cut, task.optimizer_moments, task.seed) == ('{"x": 1}', "reset", 5)
    assert (task.interval, task.edge_round, task.training.batch_size) == (4, 1, 7)


OTHER = TensorLayout(("a", "b"), ((3,), ()))
BAD: list[tuple[dict[str, Any], str]] = [
    ({"weights": torch.tensor([1.0, math.nan, 2.0])}, "tensor a holds nan"),
    ({"weights": torch.tensor([1.0, 2.0, math.inf])}, "tensor b holds inf"),
    ({"weights": torch.zeros(4)}, "got 4 values; the network has 3"),
    ({"weights": torch.zeros(1)}, "got 1 values; the network has 3"),
    ({"weights": torch.zeros(3, 1)}, "weights: expected a flat float32 array"),
    ({"weights": torch.zeros(3, dtype=torch.float64)}, "weights: expected a flat float32 array"),
    ({"reply": {"network": UNetSpec(unet={}, layout=OTHER.to_json())}},
     "tensor a has shape (3,); expected (2,)"),
    ({"reply": {"network": UNetSpec(unet={}, layout="[")}}, "layout of the weights is malformed"),
    ({"reply": {"num_examples": 10**18}}, f"claims {10**18} examples, but registered with 10"),
    ({"reply": {"num_examples": 0}}, "claims 0 examples, but registered with 10"),
    ({"reply": {"edge_round": 2}},
     "answers interval 1 round 2; expected interval 1 round 1"),
    ({"reply": {"interval": 9}}, "answers interval 9 round 1; expected interval 1 round 1"),
    ({"reply": {"steps": 10**13}}, "malformed TrainReply: steps"),
    ({"reply": {"metrics": metrics(loss=1e300)}}, "malformed TrainReply: metrics.loss.total"),
    ({"reply": {"metrics": metrics(loss=1e20)}}, "claims metrics that no single client has"),
    ({"reply": {"metrics": metrics(2.0, loss=0.5)}}, "claims metrics that no single client has"),
    ({"reply": {"metrics": metrics(validation_loss=-0.1)}},
     "malformed TrainReply: metrics.validation_loss"),
    ({"silent": {TRAIN}}, "no reply within 3 s"),
    ({"choice": {"client_id": "good"}}, "answers as good; expected bad"),
    ({"choice": {"label_counts": (5, 6)}}, "label counts [5, 6] do not fit 2 classes and the 10"),
    ({"choice": {"label_counts": (15, -5)}}, "label counts [15, -5] do not fit"),
    ({"choice": {"label_counts": (10,)}}, "label counts [10] do not fit 2 classes"),
    ({"choice": {"label_counts": ()}}, "label counts [] do not fit 2 classes"),
    ({"silent": {CHOOSE}}, "no reply within 20 s"),
]  # fmt: skip


def test_edges_in_step_ask_a_client_again_that_failed_at_one_of_them() -> None:
    bad = FakeClient("bad", (10, 0), weights=torch.zeros(4))
    config = plan(schedule={"edge_rounds": 2}, reproducible=True)
    world = ScriptedEdge([bad, FakeClient("good")], config)
    world.run()
    assert [client.asked[-1].edge_round for client in world.clients.values()] == [2, 2]
    assert [len(stats.failures) for stats in world.told] == [1, 1]
    assert [stats.clients for stats in world.told] == [["good"], ["good"]]


@pytest.mark.parametrize(("badly", "reason"), BAD, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("query_batch", [1, 10])
def test_bad_reply_leaves_out_its_client_only(
    badly: dict[str, Any], reason: str, query_batch: int
) -> None:
    bad = FakeClient("bad", (10, 0), **badly)
    small = FakeClient("small", (10, 0), step=1.0)
    large = FakeClient("large", (0, 30), step=5.0)
    config = plan(schedule={"edge_rounds": 2, "query_batch": query_batch})
    world = ScriptedEdge([bad, small, large], config)
    average = world.run()
    assert average is not None
    # Two rounds of (10 * 1 + 30 * 5) / 40 = 4.
    assert average.tolist() == [18.0, 28.0, 38.0]
    assert [stats.clients for stats in world.told] == [["large", "small"]] * 2
    [[failure], later] = [stats.failures for stats in world.told]
    assert failure.startswith(f"bad: {reason}")
    assert later == [], "a client that failed is left alone for a while"
    assert world.told[0].failed == {"late" if "silent" in badly else "malformed": 1}
    assert world.failed == [("bad", failure.removeprefix("bad: "))]
    # 2 rounds of 10 + 30; nothing of the bad client.
    assert world.strategy.offer.num_samples == 80.0
    assert world.strategy.offer.label_distribution == pytest.approx((0.25, 0.75))


def test_client_whose_training_fails_says_why() -> None:
    class Broken(FakeClient):
        def _train(self, message: Message) -> Any:
            raise RuntimeError("the disk is full")

    world = ScriptedEdge([Broken("bad"), FakeClient("good")])
    average = world.run()
    assert average is not None
    assert average.tolist() == [11.0, 21.0, 31.0]
    [failure] = world.told[0].failures
    assert failure.startswith("bad: ")
    assert failure.endswith("RuntimeError: the disk is full")
    assert world.told[0].failed == {"error": 1}


def test_later_offers_do_not_hold_a_failed_client() -> None:
    bad = FakeClient("bad", (10, 0), weights=torch.full((3,), math.nan))
    good = FakeClient("good", (0, 10))
    world = ScriptedEdge([bad, good], plan(schedule={"edge_rounds": 2, "query_batch": 1}))
    world.run()
    [_, second] = good.asked
    assert second.offers[0].num_samples == 10.0
    assert second.offers[0].label_distribution == (0.0, 1.0)


def test_client_that_dies_between_the_rounds() -> None:
    good = FakeClient("good", step=1.0)

    class Mortal(FakeClient):
        def _train(self, message: Message) -> Any:
            if len(self.tasks) == 1:
                world.memory.nodes = {n: c for n, c in world.memory.nodes.items() if c is not self}
                raise ConnectionError("node unavailable")
            return super()._train(message)

    world = ScriptedEdge([Mortal("mortal", step=3.0), good], plan(schedule={"edge_rounds": 3}))
    average = world.run()
    assert average is not None
    # (1 + 3) / 2, then 1 and 1.
    assert average.tolist() == [14.0, 24.0, 34.0]
    assert [stats.clients for stats in world.told] == [["good", "mortal"], ["good"], ["good"]]
    assert list(world.roster.everyone) == ["good"]


def test_nobody_trains() -> None:
    world = ScriptedEdge([FakeClient("a", edge="edge-1")], plan(schedule={"edge_rounds": 2}))
    assert world.run() is None
    figures = [(stats.clients, stats.metrics.loss.value, stats.mean_steps) for stats in world.told]
    assert figures == [([], None, 0.0)] * 2
    assert world.strategy.offer.num_samples == 0.0


def test_no_clients_at_all() -> None:
    world = ScriptedEdge([])
    assert world.run() is None
    assert len(world.told) == 1


def test_replies_are_used_one_by_one() -> None:
    world = ScriptedEdge([FakeClient("a"), FakeClient("b", step=3.0)])
    arrays = weights_record(START.clone())
    messages = world.strategy.configure_train(1, arrays, ConfigRecord(), world.grid)
    pending = world.grid.send_and_receive(messages, timeout=3.0)

    def replies() -> Iterable[Message]:
        first = next(iter(pending))
        yield first
        assert world.told == []
        # The first one is in the sum already: what happens to its memory changes nothing.
        first.content.array_records.clear()
        yield from pending

    average, _ = world.strategy.aggregate_train(1, replies())
    assert average is not None
    assert read_array(next(iter(average.values()))).tolist() == [12.0, 22.0, 32.0]


def test_average_does_not_overwrite_what_came() -> None:
    world = ScriptedEdge([FakeClient("a"), FakeClient("b")])
    given = weights_record(START)
    [came] = given.values()
    # bytes() of bytes is no copy.
    before = bytearray(came.data)
    world.strategy.start(world.grid, given, num_rounds=1, timeout=3.0)
    assert came.data == before


class Patient(FakeClient):
    """A client that waits for other edges' offers as long as it may, in vain."""

    def _choose(self, message: Message) -> Any:
        time.sleep(read_payload(message, Choose).offer_wait_s)
        return super()._choose(message)


def test_edge_that_is_behind_is_waited_for_once_in_a_round() -> None:
    config = plan(
        schedule={"edge_rounds": 2, "query_batch": 1}, waits={"offer_s": 0.05, "query_s": 20.0}
    )
    world = ScriptedEdge([Patient(name) for name in "abc"], config)
    world.run()
    first, second = (
        [choose.offer_wait_s for client in world.clients.values() for choose in client.asked
         if choose.edge_round == number]
        for number in (1, 2)
    )  # fmt: skip
    assert sorted(first) == sorted(second) == [0.0, 0.0, 0.05]


class Hung(FakeClient):
    """A client that never answers when it is asked."""

    def __call__(self, message: Message) -> Message | None:
        if message.metadata.message_type != CHOOSE:
            return super().__call__(message)
        self.asked.append(read_payload(message, Choose))
        time.sleep(0.06)
        return None


@pytest.mark.parametrize(("num_edges", "client"), [(1, Patient), (2, Hung)])
def test_a_client_that_is_slow_itself_is_no_silent_edge(
    num_edges: int, client: type[FakeClient]
) -> None:
    config = plan(schedule={"query_batch": 1}, waits={"offer_s": 0.05, "query_s": 0.2})
    world = ScriptedEdge(map(client, "abc"), config, num_edges=num_edges)
    world.run()
    assert [c.offer_wait_s for c in _questions(world)] == [0.05, 0.05, 0.05]


def _questions(world: ScriptedEdge) -> list[Choose]:
    return [choose for client in world.clients.values() for choose in client.asked]


def test_edges_in_step_are_waited_for_every_time() -> None:
    world = ScriptedEdge([FakeClient(n) for n in "abc"], plan(schedule={"query_batch": 1}))
    world.run()
    assert [c.asked[0].offer_wait_s for c in world.clients.values()] == [5.0, 5.0, 5.0]
