"""Orders to train as an edge would send them, for networks that a test chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fedphd.client.trainer import ClientImages, Trainer, TrainResult
from fedphd.common.config.run import DiffusionConfig, ModelConfig
from fedphd.common.data.images import ImageSet
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_unet, unet_config
from fedphd.common.wire.messages import TrainTask, UNetSpec


def layout_of(model: ModelConfig) -> TensorLayout:
    """Names and shapes of the weights of a U-Net."""
    return TensorLayout.of(build_unet(model, seed=0).state_dict())


def flat_weights(model: ModelConfig, seed: int = 0) -> torch.Tensor:
    """The initial weights of a U-Net, (numel,)."""
    return layout_of(model).pack(build_unet(model, seed=seed).state_dict())


def train_task(model: ModelConfig, *, cut: Cut | None = None, **changes: Any) -> TrainTask:
    """The first edge round of a run with seed 7."""
    unet = unet_config(build_unet(model, seed=0))
    values: dict[str, Any] = {
        "edge_id": "edge-0", "interval": 1, "edge_round": 1, "seed": 7,
        "network": UNetSpec(unet=unet, layout=layout_of(model).to_json()),
        "diffusion": DiffusionConfig(), "sparsity_lambda": 0.0, "optimizer_moments": "prune",
        "cut": cut.to_json() if cut else None,
    }  # fmt: skip
    return TrainTask(**(values | changes))


def train(
    trainer: Trainer,
    model: ModelConfig,
    images: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    held_out: torch.Tensor | None = None,
    variate: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    **changes: Any,
) -> TrainResult:
    """One edge round, by default from the U-Net's initial weights; ``changes`` of the task.

    All images are of class 0, unless the training images have ``labels``.
    """
    received = flat_weights(model) if weights is None else weights
    task = train_task(model, **changes)
    data = of_one_class(images) if labels is None else ImageSet(images, labels)
    validated = None if held_out is None else of_one_class(held_out)
    result = trainer.train(task, received, ClientImages(data, validated), variate)
    # Of their own, for tests that go on with the same trainer.
    return replace(result, weights=result.weights.clone())


def of_one_class(images: torch.Tensor) -> ImageSet:
    """``images`` with the label 0."""
    return ImageSet(images, torch.zeros(len(images), dtype=torch.int64))
