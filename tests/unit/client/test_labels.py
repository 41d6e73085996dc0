"""What a class-conditional network learns of the labels of a client's images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.training import flat_weights, layout_of
from support.training import train as training_round

from fedphd.client.steps import without_some
from fedphd.client.trainer import Trainer, TrainResult
from fedphd.common.config.run import ModelConfig, TrainingConfig
from fedphd.common.errors import ConfigError
from fedphd.common.rng import generator

IMAGES = torch.randint(0, 256, (10, 1, 4, 4), generator=generator("images")).to(torch.uint8)
TRAINING = TrainingConfig(batch_size=4, learning_rate=0.01)
CONDITIONAL = ModelConfig(
    image_size=4, block_out_channels=(16, 16), norm_num_groups=8, dropout=0.1,
    class_conditional=True, num_class_embeds=4,
)  # fmt: skip


def train(*, training: TrainingConfig = TRAINING, **changes: Any) -> TrainResult:
    trainer = Trainer(client_id="client-0", device="cpu")
    return training_round(trainer, CONDITIONAL, IMAGES, training=training, **changes)


def named(weights: torch.Tensor) -> dict[str, torch.Tensor]:
    return layout_of(CONDITIONAL).unpack(weights)


def test_a_class_conditional_network_learns_from_the_labels() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    training = TRAINING.model_copy(update={"label_dropout": 0.0})
    given: dict[str, Any] = {"training": training}
    told, again = (train(labels=labels, **given).weights for _ in range(2))
    assert torch.equal(told, again)
    assert not torch.equal(told, train(labels=labels.flip(0), **given).weights)
    before = named(flat_weights(CONDITIONAL))["class_embedding.weight"]
    after = named(told)["class_embedding.weight"]
    moved = (after != before).any(1)
    # Nobody was without a label.
    assert moved.tolist() == [True, True, True, False]
    without = train(labels=labels, **{**given, "training": training.model_copy(
        update={"label_dropout": 1.0})})  # fmt: skip
    after = named(without.weights)["class_embedding.weight"]
    assert (after != before).any(1).tolist() == [False, False, False, True]


def test_labels_are_left_out_as_often_as_configured() -> None:
    labels = torch.arange(10).repeat(1000)
    kept = without_some(labels, 0.1, 10, generator("drop"))
    assert 0.08 < float((kept == 10).double().mean()) < 0.12
    assert torch.equal(kept[kept != 10], labels[kept != 10])


def test_a_label_that_the_network_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="knows 3 classes, the images have labels up to 3"):
        train(labels=torch.full((10,), 3))
