"""Modules whose first weights nobody draws."""

from __future__ import annotations

import threading

import torch
from support.waiting import HANG_S
from torch import nn

from fedphd.common.first_weights import WithoutFirstWeights


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Linear(4, 5), nn.Embedding(6, 7)
    )


def test_nothing_is_drawn_and_shapes_are_the_same() -> None:
    shapes = {name: value.shape for name, value in build().state_dict().items()}
    before = torch.get_rng_state()
    with WithoutFirstWeights():
        built = build()
        ones = torch.ones(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: value.shape for name, value in built.state_dict().items()} == shapes
    assert ones.tolist() == [1.0, 1.0]


def test_another_thread_draws_meanwhile() -> None:
    drawn = torch.full((1000,), 5.0)
    with WithoutFirstWeights():
        other = threading.Thread(target=nn.init.uniform_, args=(drawn,))
        other.start()
        other.join(HANG_S)
    assert 0.0 <= drawn.min() < drawn.max() <= 1.0


def test_a_tensor_that_is_filled_by_name_stays_as_it_is() -> None:
    weights = torch.full((3,), 2.0)
    with WithoutFirstWeights():
        same = nn.init.uniform_(tensor=weights)
    assert same is weights
    assert weights.tolist() == [2.0] * 3
    assert nn.init.uniform_(weights, 5.0, 6.0).min() >= 5.0, "afterwards they are drawn"
