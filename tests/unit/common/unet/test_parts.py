"""Which tensors belong to which part of the U-Net, and what travels of it."""

from __future__ import annotations

import pytest
import torch

from fedphd.common.config.run import ModelConfig
from fedphd.common.errors import ReplyError
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_unet
from fedphd.common.unet.parts import PARTS, Part, PartSubset, joined, part_sets

LAYOUT = TensorLayout(
    ("conv_in.bias", "time_embedding.linear_1.bias", "up_blocks.0.bias", "mid_block.bias"),
    ((2,), (), (1, 2), ()),
)
FLAT = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


@pytest.mark.parametrize(
    ("parts", "values"),
    [
        (("encoder",), [1.0, 2.0, 3.0]),
        (("bottleneck",), [6.0]),
        (("decoder",), [4.0, 5.0]),
        (("bottleneck", "decoder"), [4.0, 5.0, 6.0]),
        (PARTS, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    ],
)
def test_take_and_put_by_hand(parts: tuple[Part, ...], values: list[float]) -> None:
    selection = PartSubset(LAYOUT, parts)
    assert selection.take(FLAT).tolist() == values
    put = selection.put(torch.zeros(6), torch.tensor(values))
    assert put.tolist() == [value if value in values else 0.0 for value in FLAT.tolist()]


def test_everything_is_taken_without_a_copy() -> None:
    assert PartSubset(LAYOUT, PARTS).take(FLAT) is FLAT
    # A layout of nothing but decoder, as it travels with udec.
    decoder = PartSubset(LAYOUT, ("decoder",)).chosen
    values = torch.zeros(decoder.numel)
    assert PartSubset(decoder, ("decoder",)).take(values) is values


def test_putting_leaves_the_given_alone() -> None:
    before = torch.zeros(6)
    PartSubset(LAYOUT, ("decoder",)).put(before, torch.ones(2))
    assert before.tolist() == [0.0] * 6


def test_every_tensor_of_a_unet_is_in_one_part() -> None:
    unet = build_unet(ModelConfig(), seed=0)
    layout = TensorLayout.of(unet.state_dict())
    names = [set(PartSubset(layout, (part,)).chosen.names) for part in PARTS]
    assert set.union(*names) == set(layout.names)
    assert sum(map(len, names)) == len(layout.names)
    encoder, bottleneck, decoder = names
    assert "time_embedding.linear_1.weight" in encoder
    assert bottleneck == {name for name in layout.names if name.startswith("mid_block.")}
    assert {"conv_out.bias", "conv_norm_out.weight"} <= decoder


def test_tensor_of_no_part_is_refused() -> None:
    other = TensorLayout(("head.weight",), ((1,),))
    with pytest.raises(ReplyError, match=r"tensor head\.weight belongs to no part of a U-Net"):
        _ = PartSubset(other, ("decoder",)).chosen
    assert PartSubset(other, PARTS).chosen == other


def test_what_travels_with_each_exchange() -> None:
    assert {name: joined(part_sets(name)) for name in ("full", "usplit", "ulatdec", "udec")} == {
        "full": PARTS,
        "usplit": PARTS,
        "ulatdec": ("bottleneck", "decoder"),
        "udec": ("decoder",),
    }
    assert part_sets("usplit") == (("encoder",), ("bottleneck", "decoder"))
