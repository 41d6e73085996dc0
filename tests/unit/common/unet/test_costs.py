from __future__ import annotations

import pytest
import torch

from fedphd.client.steps import batches
from fedphd.common.config.run import TrainingConfig
from fedphd.common.rng import generator
from fedphd.common.unet.costs import Costs, images_of_steps, training_flops


def test_three_passes_of_two_operations_per_multiply_accumulate() -> None:
    costs = Costs(parameters=1, macs=1000, encoder_macs=300)
    assert training_flops(costs, 7) == 42_000
    # Two more passes of 300, at two operations each, for each of 7 images.
    assert training_flops(costs, 7, encoder_passes=2) == 42_000 + 8_400


@pytest.mark.parametrize(
    ("unit", "amount"), [("epochs", 1), ("epochs", 3), ("steps", 1), ("steps", 8)]
)
@pytest.mark.parametrize("num_images", [1, 10, 30, 64])
def test_images_of_steps_are_those_that_a_client_draws(
    unit: str, amount: int, num_images: int
) -> None:
    training = TrainingConfig.model_validate(
        {"batch_size": 10, "local_unit": unit, "local_amount": amount}
    )
    drawn = list(batches(num_images, training, generator("costs-test")))
    assert images_of_steps(num_images, len(drawn), 10) == len(torch.cat(drawn))


def test_a_pass_over_25_images_in_tens_has_a_last_batch_of_5() -> None:
    assert [images_of_steps(25, steps, 10) for steps in (0, 1, 2, 3, 4)] == [0, 10, 20, 25, 35]
