"""What travels at the cloud beside whole models: control variates, and parts of the U-Net."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from support.edges import Cloud, FakeEdge, run_config, scheduled

from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_unet
from fedphd.common.unet.parts import PARTS, Part, PartSubset
from fedphd.common.wire.messages import UNetSpec
from fedphd.common.wire.records import (
    weights_record,
)


def test_changes_of_the_edges_add_up_whatever_their_weights() -> None:
    first = FakeEdge("a", samples=10.0, clients={"x": 10, "y": 10}, change=torch.ones_like)
    second = FakeEdge(
        "b", samples=90.0, clients={"y": 10, "z": 10}, change=lambda c: torch.full_like(c, 2.0)
    )
    world = Cloud(
        first, second,
        config=run_config(objective={"method": "scaffold"}, schedule={"intervals": 2}),
    )  # fmt: skip
    world.run()
    for edge in (first, second):
        assert [variate.unique().tolist() for variate in edge.variates] == [[0.0], [3.0]]
        assert [task.num_clients for task in edge.tasks] == [3, 3], "x, y and z"
    assert world.strategy.variate is not None
    assert world.strategy.variate.unique().tolist() == [6.0]


def test_the_variate_goes_down_whole_in_16_bits_where_changes_have_4() -> None:
    sent = torch.linspace(-1.0, 1.0, 1000)
    edge = FakeEdge("a", change=lambda c: sent.repeat(len(c) // 1000 + 1)[: len(c)])
    codecs = {"cloud_down": "int4", "cloud_up": "int4"}
    plan = {"objective": {"method": "scaffold"}, "schedule": {"intervals": 2}, "wire": codecs}
    world = Cloud(edge, config=run_config(**plan))
    world.run()
    ours, theirs = world.strategy.variate, edge.variates[1]
    assert ours is not None
    # After the second interval there are two equal changes; what rounding to int4 takes is 0.07.
    torch.testing.assert_close(theirs, ours / 2, rtol=2**-8, atol=0)


def test_the_variate_stays_a_mean_over_all_clients_when_some_come_later() -> None:
    first = FakeEdge("a", clients={"x": 10, "y": 10}, change=lambda c: torch.full_like(c, 3.0))
    late = FakeEdge("b", clients={"z": 10}, change=torch.zeros_like, silent=True)
    config = run_config(objective={"method": "scaffold"}, schedule={"intervals": 2})
    world = Cloud(first, config=config)
    gather = world.strategy._gather

    def join() -> None:
        if world.told:
            world.nodes[9] = late
            late.silent = False
        gather()

    world.strategy._gather = join
    world.run()
    # A sum of 6 over two clients, then over three; the change of 3 is over three already.
    assert [variate.unique().tolist() for variate in first.variates] == [[0.0], [2.0]]
    assert [task.num_clients for task in first.tasks] == [2, 3]
    assert world.strategy.variate is not None
    assert world.strategy.variate.unique().tolist() == [5.0]


def test_other_methods_carry_no_variate() -> None:
    world = Cloud(FakeEdge("e"))
    assert world.strategy.variate is None
    arrays = weights_record(world.strategy.weights())
    [message] = world.strategy.configure_train(1, arrays, ConfigRecord(), world.grid)
    [arrays] = message.content.array_records.values()
    assert len(arrays) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "bad: carries no control variate"),
        (lambda c: c[1:], "bad: control variate: got"),
        (lambda c: c + math.nan, "bad: control variate: tensor conv_in.weight holds nan"),
    ],
)
def test_edge_with_a_bad_change_is_left_out(change: Any, reason: str) -> None:
    world = Cloud(
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
    world = Cloud(edge, config=config.model_copy(update={
        "objective": config.objective.model_copy(update={"method": "scaffold"}),
    }))  # fmt: skip
    world.run()
    before, after = (task.network.tensor_layout() for task in edge.tasks)
    assert world.strategy.cut is not None
    # The variate is a gradient: it grows where the weights are scaled down.
    kept = world.strategy.cut.apply(before.unpack(numbered(edge.variates[0])), power=-1)
    queries = "mid_block.attentions.0.to_q.bias"
    first = world.strategy.cut.kept[before.names.index(queries)][0][0]
    dense = before.unpack(numbered(edge.variates[0]))[queries][first]
    assert kept[queries][0] == dense / world.strategy.cut.scales[queries]
    assert torch.equal(edge.variates[1], after.pack(kept))


def sends(world_layout: TensorLayout, *parts: Part) -> dict[str, Any]:
    """What an edge says that sends only some parts."""
    layout = PartSubset(world_layout, parts).chosen
    return {"parts": parts, "network": UNetSpec(unet={}, layout=layout.to_json())}


def moved(world: Cloud, change: torch.Tensor) -> dict[str, float]:
    """By how much each part changed."""
    layout = world.strategy.layout
    values = {part: PartSubset(layout, (part,)).take(change) for part in PARTS}
    for value in values.values():
        torch.testing.assert_close(value, torch.full_like(value, value[0].item()))
    return {part: round(value[0].item(), 4) for part, value in values.items()}


def test_each_part_is_averaged_over_the_edges_that_sent_it() -> None:
    config = run_config(exchange={"parts": "usplit"}, aggregation={"factor": 0.0})
    layout = TensorLayout.of(build_unet(config.model, seed=0).state_dict())
    encoder = PartSubset(layout, ("encoder",))
    world = Cloud(
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
    rest = PartSubset(layout, ("bottleneck", "decoder"))
    edge = FakeEdge(
        "e", reply=sends(layout, "bottleneck", "decoder"),
        weights=lambda given: rest.take(given) + 2.0,
    )  # fmt: skip
    world = Cloud(edge, config=config)
    assert moved(world, world.run()) == {"encoder": 0.0, "bottleneck": 2.0, "decoder": 2.0}
    assert len(edge.given[0]) == layout.numel, "all parts go down"


def test_parts_that_do_not_travel_keep_their_initial_values() -> None:
    config = run_config(exchange={"parts": "ulatdec"}, schedule={"intervals": 2})
    layout = TensorLayout.of(build_unet(config.model, seed=0).state_dict())
    edge = FakeEdge("e", step=1.0, reply={"parts": ("bottleneck", "decoder")})
    world = Cloud(edge, config=config)
    assert moved(world, world.run()) == {"encoder": 0.0, "bottleneck": 2.0, "decoder": 2.0}
    travels = PartSubset(layout, ("bottleneck", "decoder"))
    assert [len(given) for given in edge.given] == [travels.chosen.numel] * 2
    ema = layout.pack(world.strategy.ema.state)
    encoder = PartSubset(layout, ("encoder",))
    assert torch.equal(encoder.take(ema), encoder.take(world.dense))


@pytest.mark.parametrize("parts", [(), ("decoder",), ("decoder", "encoder", "bottleneck")])
def test_edge_that_sends_other_parts_is_left_out(parts: tuple[Part, ...]) -> None:
    world = Cloud(
        FakeEdge("bad", reply={"parts": parts}), FakeEdge("good", step=1.0),
        config=run_config(exchange={"parts": "usplit"}),
    )  # fmt: skip
    assert moved(world, world.run()) == {"encoder": 1.0, "bottleneck": 1.0, "decoder": 1.0}
    [failure] = world.told[0].failures
    assert f"sends the parts {list(parts)}; expected whole part sets of [['encoder']" in failure
