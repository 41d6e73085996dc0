"""What the cloud sends down in few bits: differences to what edges hold."""

from __future__ import annotations

import pytest
import torch
from support.edges import Cloud, FakeEdge, scheduled

from fedphd.common.config.wire import CodecName
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.codecs import Codec, digest_of
from fedphd.server.broadcast import Broadcast

LAYOUT = TensorLayout(("w",), ((2, 2),))


def test_the_first_weights_go_out_whole_and_the_next_ones_as_a_difference() -> None:
    broadcast = Broadcast()
    first = torch.tensor([1.0, 2.0, 3.0, 4.0])
    link = broadcast.send(first, "int4", LAYOUT)
    assert link.change is None
    whole, base = link.for_edge(None)
    assert (whole.tolist(), base, link.digest) == (first.tolist(), None, digest_of(first))
    # The step is 7 / 7 = 1: 0.4 is rounded away, and made up for in the difference after it.
    link = broadcast.send(first + torch.tensor([7.0, 0.4, 0.0, 0.0]), "int4", LAYOUT)
    change, base = link.for_edge(digest_of(first))
    assert base == digest_of(first)
    assert Codec("int4", LAYOUT).decode(change).tolist() == [7.0, 0.0, 0.0, 0.0]
    link = broadcast.send(first + torch.tensor([14.0, 0.8, 0.0, 0.0]), "int4", LAYOUT)
    assert link.change is not None
    assert Codec("int4", LAYOUT).decode(link.change).tolist() == [7.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_edges_that_were_away_hold_the_same_bits(codec: CodecName) -> None:
    torch.manual_seed(0)
    broadcast, layout = Broadcast(), TensorLayout(("w",), ((30, 30),))
    weights, held = torch.randn(900), torch.empty(0)
    for step in range(20):
        weights = weights + 0.1 * torch.randn(900)
        link = broadcast.send(weights, codec, layout)
        came, base = link.for_edge(digest_of(held) if step else None)
        held = came.clone() if base is None else Codec(codec, layout).decode(came).add_(held)
        assert (base is None) == (step == 0)
        # One that holds something else, or nothing, gets them whole.
        assert torch.equal(link.for_edge("0" * 64)[0], held)
        # Rounding does not add up: 20 differences are as close as one.
        assert (held - weights).abs().max() < {"bf16": 2e-3, "int8": 3e-3, "int4": 5e-2}[codec]


def test_an_exact_codec_needs_no_copy() -> None:
    weights = torch.ones(4)
    broadcast = Broadcast()
    link = broadcast.send(weights, "fp32", LAYOUT)
    assert link.for_edge(digest_of(weights)) == (weights, None)
    assert (broadcast.held, link.digest) == (None, None)


def test_it_goes_on_after_a_cut() -> None:
    broadcast, first = Broadcast(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    broadcast.send(first, "bf16", LAYOUT)
    smaller = TensorLayout(("w",), ((1, 2),))
    broadcast.cut(Cut(LAYOUT, (((1,), None),)), smaller)
    link = broadcast.send(torch.tensor([3.5, 4.0]), "bf16", smaller)
    change, base = link.for_edge(digest_of(first))
    assert base == digest_of(first)
    assert Codec("bf16", smaller).decode(change).tolist() == [0.5, 0.0]


def test_where_parts_travel_a_cut_starts_afresh() -> None:
    broadcast = Broadcast(torch.ones(2))
    broadcast.cut(Cut(LAYOUT, (((1,), None),)), TensorLayout(("w",), ((1, 2),)))
    assert broadcast.held is None
    link = broadcast.send(torch.ones(1), "bf16", TensorLayout(("w",), ((1,),)))
    assert link.change is None


def test_edges_build_each_interval_on_the_one_before() -> None:
    """The strategy with edges that hold what came: over the cut, and with one that forgets."""
    faithful, forgetful = FakeEdge("a"), FakeEdge("b", remembers=False)
    config = scheduled().model_copy(update={"wire": scheduled().wire.model_copy(
        update={"cloud_down": "int8", "cloud_up": "int8"},
    )})  # fmt: skip
    world = Cloud(faithful, forgetful, config=config)
    world.run()
    assert [task.base is None for task in faithful.tasks] == [True, False, False]
    assert [task.base is None for task in forgetful.tasks] == [True, True, True]
    for ours, theirs in zip(faithful.given, forgetful.given, strict=True):
        assert torch.equal(ours, theirs)
