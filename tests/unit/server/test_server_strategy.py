"""The cloud's part: shares of edges, the EMA, when pruning happens, replies that are left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message
from support.memory import FakeTime, MemoryGrid, streaming

from fedphd.common.layout import TensorLayout
from fedphd.common.messages import HELLO, HelloReply, IntervalReply, IntervalTask, Network, Traffic
from fedphd.common.model import build_unet
from fedphd.common.parts import PARTS, Part, Selection
from fedphd.common.records import (
    read_payload,
    read_variate,
    read_weights,
    to_records,
    weights_record,
)
from fedphd.common.roster import Roster
from fedphd.common.settings import FederationConfig
from fedphd.server.pruning import PruneReport
from fedphd.server.strategy import FedPhD, IntervalStats


def run_config(**sections: Any) -> FederationConfig:
    """A run over two classes with a U-Net that trains in no time."""
    values: dict[str, Any] = {
        "num_classes": 2,
        "model": {
            "block_out_channels": (8, 16), "attention_levels": (1,), "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        "schedule": {"intervals": 1, "edge_rounds": 2, "num_edges": 1, "min_clients": 1},
        "pruning": {"mode": "none"},
        "aggregation": {"factor": 2.0},
    }  # fmt: skip
    for name, section in sections.items():
        nested = isinstance(section, dict) and name in values
        values[name] = {**values[name], **section} if nested else section
    return FederationConfig.model_validate(values)


@dataclass
class FakeEdge:
    """An edge whose interval adds ``step`` to every weight."""

    name: str
    step: float = 1.0
    clients: dict[str, int] = field(default_factory=lambda: {"a": 10})
    shares: tuple[float, ...] = (0.5, 0.5)
    samples: float = 10.0
    client_rounds: int = 2
    reply: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[torch.Tensor], torch.Tensor] | None = None
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    silent: bool = False
    tasks: list[IntervalTask] = field(default_factory=list)
    given: list[torch.Tensor] = field(default_factory=list)
    variates: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, message: Message) -> Message | None:
        """Answer as a node."""
        if message.metadata.message_type == HELLO:
            hello = HelloReply(kind="edge", name=self.name, clients=self.clients)
            return Message(to_records(hello), reply_to=message)
        if self.silent:
            return None
        task = read_payload(message, IntervalTask)
        given = read_weights(message)
        self.tasks.append(task)
        self.given.append(given.clone())
        change = None
        if self.change:
            self.variates.append(read_variate(message).clone())
            change = self.change(self.variates[-1])
        values: dict[str, Any] = {
            "edge_id": self.name, "interval": task.interval, "network": task.network,
            "samples_per_round": self.samples, "client_rounds": self.client_rounds,
            "label_distribution": self.shares, "loss": 0.5, "mean_steps": 4.0,
            "traffic": Traffic(sent_bytes=3, received_bytes=4), "seconds": 0.1,
            "clients": tuple(self.clients), "failures": (),
        }  # fmt: skip
        # Unchecked, so that a test can send what no honest edge could.
        reply = IntervalReply.model_construct(**(values | self.reply))
        weights = self.weights(given) if self.weights else given + self.step
        return Message(to_records(reply, weights, change), reply_to=message)


class Fixture:
    """The cloud's strategy with scripted edges."""

    def __init__(self, *edges: FakeEdge, config: FederationConfig | None = None) -> None:
        self.config = config or run_config()
        self.edges = {edge.name: edge for edge in edges}
        self.time = FakeTime()
        self.grid = streaming(MemoryGrid(dict(enumerate(edges, start=2))), time=self.time)
        self.roster = Roster(
            self.grid, asking="cloud", kind="edge", hello_s=1.0, retry_s=1e6, max_samples=1000,
            clock=self.time.clock,
        )  # fmt: skip
        self.pruned: list[tuple[int, PruneReport]] = []
        self.told: list[IntervalStats] = []
        unet = build_unet(self.config.model, seed=0)
        self.dense = TensorLayout.of(unet.state_dict()).pack(unet.state_dict())
        self.strategy = FedPhD(
            self.config,
            unet,
            self.roster,
            on_interval=self.told.append,
            on_pruned=lambda interval, report: self.pruned.append((interval, report)),
            gather=lambda: self.roster.refresh() and None,
        )

    def run(self) -> torch.Tensor:
        """All intervals; returns by how much the weights changed, (numel,)."""
        before = self.strategy.weights()
        self.strategy.start(
            self.grid,
            weights_record(before),
            num_rounds=self.config.schedule.intervals,
            timeout=5.0,
        )
        after = self.strategy.weights()
        return after - before if len(after) == len(before) else after


def test_average_by_size_and_homogeneity() -> None:
    even = FakeEdge("even", step=1.0, samples=10.0, clients={"a": 10, "b": 20})
    skewed = FakeEdge("skewed", step=3.0, samples=30.0, shares=(1.0, 0.0), clients={"b": 20})
    world = Fixture(skewed, even)
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
    one = FakeEdge("one", samples=10.0, reply={"loss": 0.2, "mean_steps": 4.0})
    other = FakeEdge("two", samples=30.0, reply={"loss": 0.6, "mean_steps": 8.0})
    world = Fixture(one, other, config=run_config(aggregation={"factor": 0.0}))
    world.run()
    assert world.told[0].loss == pytest.approx(0.5)
    assert world.told[0].mean_steps == pytest.approx(0.25 * 4 + 0.75 * 8)


def test_edge_without_clients_has_no_weight() -> None:
    idle = FakeEdge("idle", step=100.0, samples=0.0, client_rounds=0, clients={})
    world = Fixture(idle, FakeEdge("busy", step=1.0))
    change = world.run()
    torch.testing.assert_close(change, torch.ones_like(change), rtol=0, atol=1e-6)
    assert world.told[0].edge_weights == {"busy": 1.0, "idle": 0.0}
    assert world.told[0].failures == []


def test_all_edges_without_clients_keep_the_model() -> None:
    idle = FakeEdge("idle", step=100.0, samples=0.0, client_rounds=0)
    world = Fixture(idle, config=run_config(schedule={"intervals": 2}))
    assert world.run().abs().max() == 0
    assert world.strategy.ema.steps == 0
    assert [stats.clients for stats in world.told] == [[], []]
    assert len(idle.tasks) == 2


def test_ema_moves_by_the_mean_steps_of_the_interval() -> None:
    world = Fixture(FakeEdge("e", reply={"mean_steps": 4.0}), config=run_config(
        schedule={"intervals": 2}, ema={"decay": 0.5},
    ))  # fmt: skip
    world.run()
    # Four steps at decay 0.5 after the first interval drop the initial weights (warm-up), the
    # second interval keeps 0.5 ** 4 at most: step n keeps min(0.5, n / (9 + n)).
    kept = math.prod(min(0.5, n / (9 + n)) for n in range(4, 8))
    ema = world.strategy.layout.pack(world.strategy.ema.state)
    expected = world.dense + kept * 1.0 + (1 - kept) * 2.0
    torch.testing.assert_close(ema, expected, rtol=0, atol=1e-5)
    assert world.strategy.ema.steps == 8.0


def scheduled(sparse_rounds: int = 4, intervals: int = 3) -> FederationConfig:
    return run_config(
        pruning={"mode": "scheduled", "ratio": 0.5, "sparse_rounds": sparse_rounds},
        schedule={"intervals": intervals},
    )


def test_pruning_comes_exactly_after_the_sparse_rounds() -> None:
    edge = FakeEdge("e")
    world = Fixture(edge, config=scheduled())
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
    world = Fixture(edge, config=scheduled(sparse_rounds=2, intervals=2))
    world.run()
    layout = edge.tasks[0].network.tensor_layout()
    averaged = layout.unpack(world.dense + 1.0)
    cut = world.strategy.cut
    assert cut is not None
    assert edge.tasks[1].cut == cut.to_json()
    kept = edge.tasks[1].network.tensor_layout().unpack(edge.given[1])
    for name, tensor in cut.apply(averaged).items():
        assert torch.equal(kept[name], tensor), name


def test_pruning_happens_also_when_nobody_trained() -> None:
    idle = FakeEdge("idle", samples=0.0, client_rounds=0)
    world = Fixture(idle, config=scheduled(sparse_rounds=2, intervals=2))
    world.run()
    assert [interval for interval, _ in world.pruned] == [1]
    assert len(idle.given[1]) < len(idle.given[0])


def test_one_shot_prunes_before_the_first_interval() -> None:
    edge = FakeEdge("e")
    config = run_config(
        pruning={"mode": "one_shot", "ratio": 0.5, "sparse_rounds": 2}, schedule={"intervals": 2}
    )
    world = Fixture(edge, config=config)
    assert [interval for interval, _ in world.pruned] == [0]
    world.run()
    assert len(world.pruned) == 1
    assert [task.sparse for task in edge.tasks] == [False, False]
    assert [task.network.unet["block_out_channels"] for task in edge.tasks] == [[4, 8]] * 2
    assert edge.tasks[0].cut is not None


def test_without_pruning_nothing_is_sparse_or_cut() -> None:
    edge = FakeEdge("e")
    world = Fixture(edge, config=run_config(schedule={"intervals": 3}))
    world.run()
    assert world.pruned == []
    assert [(task.sparse, task.cut) for task in edge.tasks] == [(False, None)] * 3


def test_task_carries_the_whole_plan() -> None:
    edge = FakeEdge("e")
    world = Fixture(edge, config=run_config(seed=5, training={"batch_size": 3}))
    world.run()
    [task] = edge.tasks
    assert task.plan == world.config
    assert task.interval == 1
    assert torch.equal(edge.given[0], world.dense)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"silent": True}, "no reply within 5 s"),
    ({"weights": lambda given: given * math.nan}, "tensor conv_in.weight holds nan"),
    ({"weights": lambda given: given[:-1]}, "values; expected"),
    ({"weights": lambda given: given.double()}, "no flat float32 array"),
    ({"reply": {"network": Network(unet={}, layout="[]")}}, "tensor conv_in.weight is missing"),
    ({"reply": {"edge_id": "good"}}, "answers as good for interval 1; expected bad for interval 1"),
    ({"reply": {"interval": 2}}, "answers as bad for interval 2; expected bad for interval 1"),
    ({"reply": {"label_distribution": (1.0,)}}, "is none over 2 classes"),
    ({"reply": {"label_distribution": (1.5, -0.5)}}, "is none over 2 classes"),
    ({"reply": {"label_distribution": (50.0, 50.0)}}, "is none over 2 classes"),
    ({"samples": 1e18}, "claims 1e+18 samples; at most 10000000 fit"),
    ({"samples": math.nan}, "malformed IntervalReply: samples_per_round"),
    ({"samples": 0.0}, "claims 2 client rounds without a sample"),
    ({"client_rounds": 10**300}, "client rounds; at most 2 fit for each of its 1 clients"),
    ({"reply": {"mean_steps": 1e300}}, "malformed IntervalReply: mean_steps"),
    ({"reply": {"loss": 1e300}}, "malformed IntervalReply: loss"),
]


@pytest.mark.parametrize(("badly", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_bad_edge_is_left_out(badly: dict[str, Any], reason: str) -> None:
    world = Fixture(
        FakeEdge("bad", **badly), FakeEdge("good", step=1.0),
        config=run_config(schedule={"intervals": 2}),
    )  # fmt: skip
    change = world.run()
    torch.testing.assert_close(change, torch.full_like(change, 2.0), rtol=0, atol=1e-6)
    first, second = world.told
    [failure] = first.failures
    assert failure.startswith("bad: ")
    assert reason in failure
    assert first.edge_weights == {"good": 1.0}
    assert second.failures == [], "an edge that failed is left alone for a while"
    assert list(world.roster.everyone) == ["bad", "good"]


def test_failures_of_clients_are_passed_on() -> None:
    world = Fixture(FakeEdge("e", reply={"failures": ("client-1: error 5: gone",)}))
    world.run()
    assert world.told[0].failures == ["client-1: error 5: gone"]


def test_order_of_replies_does_not_change_the_sum() -> None:
    results = []
    for step in (1, -1):
        edges = [FakeEdge(f"edge-{n}", step=0.1 * 3**n, samples=7.0 + n) for n in range(3)]
        world = Fixture(*edges)
        weights = weights_record(world.strategy.weights())
        messages = world.strategy.configure_train(1, weights, ConfigRecord(), world.grid)
        replies = list(world.grid.send_and_receive(messages))[::step]
        world.strategy.aggregate_train(1, replies)
        results.append(world.strategy.weights())
    assert torch.equal(*results)


def test_changes_of_the_edges_add_up_whatever_their_weights() -> None:
    first = FakeEdge("a", samples=10.0, clients={"x": 10, "y": 10}, change=torch.ones_like)
    second = FakeEdge(
        "b", samples=90.0, clients={"y": 10, "z": 10}, change=lambda c: torch.full_like(c, 2.0)
    )
    world = Fixture(
        first, second,
        config=run_config(objective={"method": "scaffold"}, schedule={"intervals": 2}),
    )  # fmt: skip
    world.run()
    for edge in (first, second):
        assert [variate.unique().tolist() for variate in edge.variates] == [[0.0], [3.0]]
        assert [task.num_clients for task in edge.tasks] == [3, 3], "x, y and z"
    assert world.strategy.variate is not None
    assert world.strategy.variate.unique().tolist() == [6.0]


def test_other_methods_carry_no_variate() -> None:
    world = Fixture(FakeEdge("e"))
    assert world.strategy.variate is None
    arrays = weights_record(world.strategy.weights())
    [message] = world.strategy.configure_train(1, arrays, ConfigRecord(), world.grid)
    [arrays] = message.content.array_records.values()
    assert len(arrays) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "bad: carries no control variate"),
        (lambda c: c[1:], "bad: control variate: it has"),
        (lambda c: c + math.nan, "bad: control variate: tensor conv_in.weight holds nan"),
    ],
)
def test_edge_with_a_bad_change_is_left_out(change: Any, reason: str) -> None:
    world = Fixture(
        FakeEdge("bad", change=change), FakeEdge("good", change=torch.ones_like),
        config=run_config(objective={"method": "scaffold"}),
    )  # fmt: skip
    world.run()
    assert world.told[0].failures[0].startswith(reason)
    assert world.strategy.variate is not None
    assert world.strategy.variate.unique().tolist() == [1.0]


def test_variate_is_cut_with_the_network() -> None:
    def numbered(variate: torch.Tensor) -> torch.Tensor:
        return torch.arange(1.0, len(variate) + 1)

    edge = FakeEdge("e", change=numbered)
    config = scheduled(sparse_rounds=2, intervals=2)
    world = Fixture(edge, config=config.model_copy(update={
        "objective": config.objective.model_copy(update={"method": "scaffold"}),
    }))  # fmt: skip
    world.run()
    before, after = (task.network.tensor_layout() for task in edge.tasks)
    assert world.strategy.cut is not None
    kept = world.strategy.cut.apply(before.unpack(numbered(edge.variates[0])))
    assert torch.equal(edge.variates[1], after.pack(kept))


def sends(world_layout: TensorLayout, *parts: Part) -> dict[str, Any]:
    """What an edge says that sends only some parts."""
    layout = Selection(world_layout, parts).chosen
    return {"parts": parts, "network": Network(unet={}, layout=layout.to_json())}


def moved(world: Fixture, change: torch.Tensor) -> dict[str, float]:
    """By how much each part changed."""
    layout = world.strategy.layout
    values = {part: Selection(layout, (part,)).take(change) for part in PARTS}
    for value in values.values():
        torch.testing.assert_close(value, torch.full_like(value, value[0].item()))
    return {part: round(value[0].item(), 4) for part, value in values.items()}


def test_each_part_is_averaged_over_the_edges_that_sent_it() -> None:
    config = run_config(exchange={"parts": "usplit"}, aggregation={"factor": 0.0})
    layout = TensorLayout.of(build_unet(config.model, seed=0).state_dict())
    encoder = Selection(layout, ("encoder",))
    world = Fixture(
        FakeEdge("whole", step=1.0, samples=10.0),
        FakeEdge(
            "half", samples=30.0, reply=sends(layout, "encoder"),
            weights=lambda given: encoder.take(given) + 5.0,
        ),
        config=config,
    )  # fmt: skip
    # The encoder (10 * 1 + 30 * 5) / 40 = 4, the rest from the first edge alone.
    assert moved(world, world.run()) == {"encoder": 4.0, "bottleneck": 1.0, "decoder": 1.0}


def test_part_that_no_edge_sent_stays() -> None:
    config = run_config(exchange={"parts": "usplit"})
    layout = TensorLayout.of(build_unet(config.model, seed=0).state_dict())
    rest = Selection(layout, ("bottleneck", "decoder"))
    edge = FakeEdge(
        "e", reply=sends(layout, "bottleneck", "decoder"),
        weights=lambda given: rest.take(given) + 2.0,
    )  # fmt: skip
    world = Fixture(edge, config=config)
    assert moved(world, world.run()) == {"encoder": 0.0, "bottleneck": 2.0, "decoder": 2.0}
    assert len(edge.given[0]) == layout.numel, "all parts go down"


def test_parts_that_do_not_travel_keep_their_initial_values() -> None:
    config = run_config(exchange={"parts": "ulatdec"}, schedule={"intervals": 2})
    layout = TensorLayout.of(build_unet(config.model, seed=0).state_dict())
    edge = FakeEdge("e", step=1.0, reply={"parts": ("bottleneck", "decoder")})
    world = Fixture(edge, config=config)
    assert moved(world, world.run()) == {"encoder": 0.0, "bottleneck": 2.0, "decoder": 2.0}
    travels = Selection(layout, ("bottleneck", "decoder"))
    assert [len(given) for given in edge.given] == [travels.chosen.numel] * 2
    ema = layout.pack(world.strategy.ema.state)
    encoder = Selection(layout, ("encoder",))
    assert torch.equal(encoder.take(ema), encoder.take(world.dense))


@pytest.mark.parametrize("parts", [(), ("decoder",), ("decoder", "encoder", "bottleneck")])
def test_edge_that_sends_other_parts_is_left_out(parts: tuple[Part, ...]) -> None:
    world = Fixture(
        FakeEdge("bad", reply={"parts": parts}), FakeEdge("good", step=1.0),
        config=run_config(exchange={"parts": "usplit"}),
    )  # fmt: skip
    assert moved(world, world.run()) == {"encoder": 1.0, "bottleneck": 1.0, "decoder": 1.0}
    [failure] = world.told[0].failures
    assert f"sends the parts {list(parts)}; expected whole groups of [['encoder']" in failure
