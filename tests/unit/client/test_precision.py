"""Which arithmetic a client trains in, and that a trial leaves no trace."""

from __future__ import annotations

import logging

import pytest
import torch
from support.training import flat_weights, train

from fedphd.client import precision
from fedphd.client.flat_unet import FlatUNet
from fedphd.client.precision import arithmetic_for
from fedphd.client.trainer import Trainer
from fedphd.common.config.run import FederationConfig, ModelConfig, TrainingConfig
from fedphd.common.rng import generator
from fedphd.common.unet.model import build_unet, unet_config

MODEL = ModelConfig(image_size=4, block_out_channels=(16, 16), norm_num_groups=8, dropout=0.1)
IMAGES = torch.randint(0, 256, (8, 1, 4, 4), generator=generator("images")).to(torch.uint8)


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_chosen", {})
    # Else no network that a test can afford would be tried.
    monkeypatch.setattr(precision, "_LEAST_WORK", 0.0)


@pytest.fixture
def network() -> FlatUNet:
    made = FlatUNet(unet_config(build_unet(MODEL, seed=0)), torch.device("cpu"))
    # Until then its weights are whatever was in memory, NaN now and then.
    made.load(flat_weights(MODEL))
    return made


def test_bf16_is_near_fp32_and_not_the_same() -> None:
    def trained(name: str) -> torch.Tensor:
        training = TrainingConfig.model_validate({"precision": name, "optimizer": "sgd"})
        return train(Trainer(client_id="one"), MODEL, IMAGES, training=training).weights

    exact, coarse = trained("fp32"), trained("bf16")
    moved = (exact - flat_weights(MODEL)).norm()
    assert 0 < (coarse - exact).norm() < 0.1 * moved
    assert coarse.dtype == torch.float32


def test_a_processor_without_instructions_is_not_tried(
    network: FlatUNet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    monkeypatch.setattr(precision, "_trial_s", None)
    with caplog.at_level(logging.INFO):
        assert not arithmetic_for(network, "auto").bf16
    assert caplog.messages == ["training in fp32: this processor has no instructions for bf16"]


def test_a_small_network_is_not_tried(
    network: FlatUNet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "_trial_s", None)
    monkeypatch.setattr(precision, "_LEAST_WORK", 16 * network.flat.numel() + 1)
    with caplog.at_level(logging.INFO):
        assert not arithmetic_for(network, "auto").bf16
    assert caplog.messages == ["training in fp32: so small a network gains little by bf16"]
    monkeypatch.setattr(precision, "_trial_s", lambda network, tried: 1.0 - tried.bf16)
    monkeypatch.setattr(precision, "_chosen", {})
    monkeypatch.setattr(precision, "_LEAST_WORK", 16 * network.flat.numel())
    assert arithmetic_for(network, "auto").bf16


def test_what_a_run_asks_for_is_said_once(
    network: FlatUNet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert arithmetic_for(network, "bf16").bf16
        assert arithmetic_for(network, "bf16").bf16
        assert not arithmetic_for(network, "fp32").bf16
    assert caplog.messages == [
        "training in bf16: as the run asks",
        "training in fp32: as the run asks",
    ]


def test_a_trial_leaves_weights_gradient_and_random_state(
    network: FlatUNet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    weights, state = network.flat.detach().clone(), torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        first = arithmetic_for(network, "auto")
        again = arithmetic_for(network, "auto")
    assert torch.equal(network.flat, weights)
    assert not network.gradient.any()
    assert torch.equal(torch.get_rng_state(), state)
    assert first.bf16 == again.bf16
    [said] = [r.getMessage() for r in caplog.records if r.name.endswith("precision")]
    assert said.startswith(f"training in {'bf16' if first.bf16 else 'fp32'}: a step of 8 images")


@pytest.mark.parametrize(("coarse_s", "chosen"), [(0.5, True), (0.95, False), (2.0, False)])
def test_bf16_must_be_clearly_faster(
    network: FlatUNet, monkeypatch: pytest.MonkeyPatch, coarse_s: float, chosen: bool
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    monkeypatch.setattr(
        precision, "_trial_s", lambda network, tried: coarse_s if tried.bf16 else 1.0
    )
    assert arithmetic_for(network, "auto").bf16 is chosen


def test_a_reproducible_run_leaves_nothing_to_a_trial() -> None:
    assert FederationConfig(reproducible=True).local_training.precision == "fp32"
    assert FederationConfig().local_training.precision == "auto"
    training = TrainingConfig(precision="bf16")
    chosen = FederationConfig(reproducible=True, training=training)
    assert chosen.local_training.precision == "bf16"


def test_images_lie_as_bf16_wants_them_on_a_cpu(network: FlatUNet) -> None:
    images = torch.zeros(2, 3, 4, 4)
    for name, last in (("bf16", True), ("fp32", False)):
        lies = arithmetic_for(network, name).arranged(images)  # type: ignore[arg-type]
        assert lies.is_contiguous(memory_format=torch.channels_last) is last
