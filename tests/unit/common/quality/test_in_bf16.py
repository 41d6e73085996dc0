"""Samples that a network predicts in bfloat16, and where that is done."""

from __future__ import annotations

import pytest
import torch

from fedphd.common.config.evaluation import EvaluationConfig
from fedphd.common.config.run import DiffusionConfig, FederationConfig, ModelConfig
from fedphd.common.quality.evaluation import Evaluator
from fedphd.common.quality.sampling import sample_images
from fedphd.common.unet.model import build_scheduler, build_unet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 0, 1])])
def test_samples_are_near_those_in_float32(labels: torch.Tensor | None) -> None:
    model = ModelConfig(
        block_out_channels=(8, 8), norm_num_groups=4, class_conditional=labels is not None,
        num_class_embeds=None if labels is None else 4,
    )  # fmt: skip
    unet = build_unet(model, seed=0)

    def drawn(*, bf16: bool) -> torch.Tensor:
        return sample_images(
            unet, build_scheduler(DiffusionConfig()), num=5, steps=5, batch_size=3, seed=7,
            device=CPU, labels=labels, guidance=2.0, bf16=bf16,
        )  # fmt: skip

    exact, coarse = drawn(bf16=False), drawn(bf16=True)
    assert coarse.dtype == torch.uint8
    difference = (coarse.int() - exact.int()).abs()
    # bfloat16 keeps 8 bits of a number; of 256 values of a pixel some are one or two off.
    assert 0 < difference.float().mean() < 2
    assert torch.equal(drawn(bf16=True), coarse)
    assert next(unet.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "device", "bf16"),
    [
        ("auto", CPU, False), ("auto", CUDA, True), ("bf16", CPU, True), ("fp32", CUDA, False),
    ],
)  # fmt: skip
def test_where_it_is_done_and_said(
    precision: str, device: torch.device, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    config = EvaluationConfig.model_validate({"precision": precision})
    evaluator = Evaluator(config, None, device)
    assert evaluator.bf16 is bf16
    assert evaluator.protocol().sampler.endswith("network in bf16") is bf16


def test_a_gpu_that_only_emulates_it_draws_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    assert not Evaluator(EvaluationConfig(), None, CUDA).bf16


def test_a_reproducible_run_leaves_nothing_to_the_device() -> None:
    assert FederationConfig(reproducible=True).measuring.precision == "fp32"
    assert FederationConfig().measuring.precision == "auto"
    asked = EvaluationConfig(precision="bf16")
    assert FederationConfig(reproducible=True, evaluation=asked).measuring.precision == "bf16"
