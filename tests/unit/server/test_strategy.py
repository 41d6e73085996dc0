"""The cloud's part: shares of edges, the EMA, when pruning happens, replies that are left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from support.edges import Cloud, FakeEdge, run_config, scheduled
from support.metrics import metrics

from fedphd.common.wire.messages import UNetSpec
from fedphd.common.wire.records import (
    weights_record,
)
from fedphd.common.wire.traffic import Traffic
from fedphd.server.stats import NobodyTrained


def test_average_by_size_and_homogeneity() -> None:
    even = FakeEdge("even", step=1.0, samples=10.0, clients={"a": 10, "b": 20})
    skewed = FakeEdge("skewed", step=3.0, samples=30.0, shares=(1.0, 0.0), clients={"b": 20})
    world = Cloud(skewed, even)
    change = world.run()
    # Mean samples per client (10 + 20) / 2 = 15, so a = 2 * 15 = 30; scores 2 and 2 - sqrt(1/2).
    w_even, w_skewed = 10 + 30 * 2, 30 + 30 * (2 - math.sqrt(0.5))
    share = w_even / (w_even + w_skewed)
    torch.testing.assert_close(
        change, torch.full_like(change, share * 1 + (1 - share) * 3), rtol=0, atol=2e-6
    )
    [stats] = world.told
    assert stats.edge_weights == pytest.approx({"even": share, "skewed": 1 - share})
    assert stats.edge_homogeneity == pytest.approx({"even": 2.0, "skewed": 2 - math.sqrt(0.5)})
    assert list(stats.edge_weights) == ["even", "skewed"]
    assert stats.num_samples == 40.0
    assert stats.client_edge == Traffic(sent_bytes=6, received_bytes=8)
    assert stats.clients == ["a", "b"]
    assert stats.client_rounds == 4


def test_loss_is_by_samples_and_steps_by_shares() -> None:
    small = {"metrics": metrics(10, loss=0.2), "mean_steps": 4.0}
    large = {"metrics": metrics(30, loss=0.6), "mean_steps": 8.0}
    one = FakeEdge("one", samples=10.0, reply=small)
    other = FakeEdge("two", samples=30.0, reply=large)
    world = Cloud(one, other, config=run_config(aggregation={"factor": 0.0}))
    world.run()
    assert world.told[0].metrics.loss.value == pytest.approx(0.5)
    assert world.told[0].mean_steps == pytest.approx(0.25 * 4 + 0.75 * 8)


def test_global_weights_move_by_the_step_size_towards_the_average() -> None:
    config = run_config(aggregation={"factor": 0.0, "step_size": 0.25})
    world = Cloud(FakeEdge("one", step=1.0), FakeEdge("two", step=3.0), config=config)
    world.run()
    # Both edges count the same: the average is 2 away, and a fourth of that is gone.
    torch.testing.assert_close(world.strategy.weights(), world.dense + 0.5, rtol=0, atol=1e-6)


def test_validation_is_by_samples_of_those_that_validated() -> None:
    one = FakeEdge("one", reply={"metrics": metrics(10, validation_loss=0.5)})
    other = FakeEdge("two", reply={"metrics": metrics(30, validation_loss=0.1)})
    world = Cloud(one, other, FakeEdge("none"))
    world.run()
    assert world.told[0].metrics.validation_loss.value == pytest.approx((10 * 0.5 + 30 * 0.1) / 40)
    world = Cloud(FakeEdge("none"))
    world.run()
    assert world.told[0].metrics.validation_loss.value is None


def test_edge_without_clients_has_no_weight() -> None:
    idle = FakeEdge("idle", step=100.0, samples=0.0, client_rounds=0, clients={})
    world = Cloud(idle, FakeEdge("busy", step=1.0))
    change = world.run()
    torch.testing.assert_close(change, torch.ones_like(change), rtol=0, atol=1e-6)
    assert world.told[0].edge_weights == {"busy": 1.0, "idle": 0.0}
    assert world.told[0].failures == []


def test_an_interval_in_which_nobody_trained_is_none_and_can_be_repeated() -> None:
    edge = FakeEdge("e", step=1.0, samples=0.0, client_rounds=0)
    world = Cloud(edge, config=scheduled(sparse_rounds=2, intervals=2))
    with pytest.raises(NobodyTrained, match="no client trained in interval 1") as caught:
        world.run()
    assert caught.value.stats.client_edge == Traffic(sent_bytes=3, received_bytes=4)
    assert torch.equal(world.strategy.weights(), world.dense)
    assert (world.strategy.ema.steps, world.told, world.pruned) == (0, [], [])
    edge.samples, edge.client_rounds = 10.0, 2
    world.strategy.repeat(1)
    world.run()
    assert [(task.interval, task.attempt) for task in edge.tasks] == [(1, 0), (1, 1), (2, 1)]
    assert [interval for interval, _ in world.pruned] == [1]
    # What went over the links in vain counts too.
    told, _ = world.told
    assert told.client_edge == Traffic(sent_bytes=6, received_bytes=8)
    assert told.edge_weights == {"e": 1.0}


def test_ema_moves_by_the_mean_steps_of_the_interval() -> None:
    world = Cloud(FakeEdge("e", reply={"mean_steps": 4.0}), config=run_config(
        schedule={"intervals": 2}, ema={"decay": 0.5},
    ))  # fmt: skip
    world.run()
    # Four steps at decay 0.5 after the first interval drop the initial weights (warm-up), the
    # second interval keeps 0.5 ** 4 at most: step n keeps min(0.5, (1 + n) / (10 + n)).
    kept = math.prod(min(0.5, (1 + n) / (10 + n)) for n in range(4, 8))
    ema = world.strategy.layout.pack(world.strategy.ema.state)
    expected = world.dense + kept * 1.0 + (1 - kept) * 2.0
    torch.testing.assert_close(ema, expected, rtol=0, atol=1e-5)
    assert world.strategy.ema.steps == 8.0
    # The latest step, n = 7, has decay 8 / 17.
    assert [told.ema_steps for told in world.told] == [4, 8]
    assert world.told[1].ema_span == pytest.approx(17 / 9)


def test_pruning_comes_exactly_after_the_sparse_rounds() -> None:
    edge = FakeEdge("e")
    world = Cloud(edge, config=scheduled())
    world.run()
    [(interval, report)] = world.pruned
    # 4 sparse rounds at 2 per interval.
    assert interval == 2
    assert (report.widths_before, report.widths_after) == ((8, 16), (4, 8))
    assert [task.sparse for task in edge.tasks] == [True, True, False]
    assert [task.cut is not None for task in edge.tasks] == [False, False, True]
    assert [len(weights) for weights in edge.given] == [
        task.network.tensor_layout().numel for task in edge.tasks
    ]
    assert len(edge.given[2]) < len(edge.given[1]) == len(edge.given[0])
    assert edge.tasks[2].network.unet["block_out_channels"] == [4, 8]
    assert {name: t.shape for name, t in world.strategy.ema.state.items()} == {
        name: t.shape for name, t in world.strategy.unet.state_dict().items()
    }


def test_pruned_weights_are_cut_from_the_averaged_ones() -> None:
    edge = FakeEdge("e", step=1.0)
    world = Cloud(edge, config=scheduled(sparse_rounds=2, intervals=2))
    world.run()
    layout = edge.tasks[0].network.tensor_layout()
    averaged = layout.unpack(world.dense + 1.0)
    cut = world.strategy.cut
    assert cut is not None
    assert edge.tasks[1].cut == cut.to_json()
    kept = edge.tasks[1].network.tensor_layout().unpack(edge.given[1])
    for name, tensor in cut.apply(averaged).items():
        assert torch.equal(kept[name], tensor), name


def test_one_shot_prunes_before_the_first_interval() -> None:
    edge = FakeEdge("e")
    config = run_config(
        pruning={"mode": "one_shot", "ratio": 0.5, "sparse_rounds": 2}, schedule={"intervals": 2}
    )
    world = Cloud(edge, config=config)
    assert [interval for interval, _ in world.pruned] == [0]
    world.run()
    assert len(world.pruned) == 1
    assert [task.sparse for task in edge.tasks] == [False, False]
    assert [task.network.unet["block_out_channels"] for task in edge.tasks] == [[4, 8]] * 2
    assert edge.tasks[0].cut is not None


def test_without_pruning_nothing_is_sparse_or_cut() -> None:
    edge = FakeEdge("e")
    world = Cloud(edge, config=run_config(schedule={"intervals": 3}))
    world.run()
    assert world.pruned == []
    assert [(task.sparse, task.cut) for task in edge.tasks] == [(False, None)] * 3


def test_task_carries_the_whole_plan() -> None:
    edge = FakeEdge("e")
    world = Cloud(edge, config=run_config(seed=5, training={"batch_size": 3}))
    world.run()
    [task] = edge.tasks
    assert task.plan == world.config
    assert task.interval == 1
    assert torch.equal(edge.given[0], world.dense)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"silent": True}, "no reply within 5 s"),
    ({"weights": lambda given: given * math.nan}, "tensor conv_in.weight holds nan"),
    ({"weights": lambda given: given[:-1]}, "values; the network has"),
    ({"weights": lambda given: given.double()}, "expected a flat float32 array"),
    ({"reply": {"network": UNetSpec(unet={}, layout="[]")}}, "tensor conv_in.weight is missing"),
    ({"reply": {"edge_id": "good"}}, "answers as good for interval 1; expected bad for interval 1"),
    ({"reply": {"interval": 2}}, "answers as bad for interval 2; expected bad for interval 1"),
    ({"reply": {"label_distribution": (1.0,)}}, "expected 2 shares >= 0"),
    ({"reply": {"label_distribution": (1.5, -0.5)}}, "expected 2 shares >= 0"),
    ({"reply": {"label_distribution": (50.0, 50.0)}}, "expected 2 shares >= 0"),
    ({"samples": 1e18}, "claims 1e+18 samples; at most 10000000 fit"),
    ({"samples": math.nan}, "malformed IntervalReply: samples_per_round"),
    ({"samples": 0.0}, "claims 2 client rounds without a sample"),
    ({"client_rounds": 10**300}, "client rounds; at most 2 fit for each of its 1 clients"),
    ({"reply": {"mean_steps": 1e300}}, "malformed IntervalReply: mean_steps"),
    ({"reply": {"metrics": metrics(1e-9, loss=1e20)}}, "claims a loss of 1e+20; at most 1e+12"),
    ({"reply": {"metrics": metrics(loss=1e300)}}, "malformed IntervalReply: metrics.loss.total"),
    (
        {"reply": {"metrics": metrics(10.0**8, validation_loss=0.5)}},
        "claims a validation_loss of 1e+08 samples; at most 10000000 fit",
    ),
]


@pytest.mark.parametrize(("badly", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_bad_edge_is_left_out(badly: dict[str, Any], reason: str) -> None:
    world = Cloud(
        FakeEdge("bad", **badly), FakeEdge("good", step=1.0),
        config=run_config(schedule={"intervals": 2}),
    )  # fmt: skip
    change = world.run()
    torch.testing.assert_close(change, torch.full_like(change, 2.0), rtol=0, atol=1e-6)
    first, second = world.told
    [failure] = first.failures
    assert failure.startswith("bad: ")
    assert reason in failure
    assert first.failed == {"late" if "silent" in badly else "malformed": 1}
    assert first.edge_weights == {"good": 1.0}
    assert second.failures == [], "an edge that failed is left alone for a while"
    assert list(world.roster.everyone) == ["bad", "good"]


def test_failures_of_clients_are_passed_on() -> None:
    world = Cloud(FakeEdge("e", reply={"failures": ("client-1: gone",)}))
    world.run()
    assert world.told[0].failures == ["client-1: gone"]


def test_order_of_replies_does_not_change_the_sum() -> None:
    results = []
    for step in (1, -1):
        edges = [FakeEdge(f"edge-{n}", step=0.1 * 3**n, samples=7.0 + n) for n in range(3)]
        world = Cloud(*edges)
        weights = weights_record(world.strategy.weights())
        messages = world.strategy.configure_train(1, weights, ConfigRecord(), world.grid)
        replies = list(world.grid.send_and_receive(messages))[::step]
        world.strategy.aggregate_train(1, replies)
        results.append(world.strategy.weights())
    assert torch.equal(*results)
