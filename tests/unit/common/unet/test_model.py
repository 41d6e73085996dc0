"""The U-Net: built by seed, described in messages, stored and read back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from fedphd.common.config.roles import read_preset
from fedphd.common.config.run import DiffusionConfig, ModelConfig
from fedphd.common.errors import ReplyError
from fedphd.common.unet.model import (
    PrunedUNet,
    build_scheduler,
    build_unet,
    unet_config,
    unet_from_config,
)

DIGITS = {
    "image_size": 8,
    "channels": 1,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "attention_levels": [1],
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "dropout": 0.0,
    "class_conditional": False,
    "num_class_embeds": None,
    "time_feature_width": 32,
}
PRUNED = {**DIGITS, "block_out_channels": [24, 48], "attention_head_dim": 6}


def predict(unet: PrunedUNet) -> torch.Tensor:
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return unet.eval()(images, torch.tensor([3, 700]), return_dict=False)[0]


def test_digits_have_the_documented_number_of_parameters() -> None:
    assert sum(p.numel() for p in build_unet(ModelConfig(), seed=0).parameters()) == 701_345


def test_cifar10_has_the_papers_35_75_million_parameters() -> None:
    config = ModelConfig.model_validate_json(json.dumps(read_preset("cifar10")["model"]))
    with torch.device("meta"):
        unet = build_unet(config, seed=0)
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307


@pytest.fixture
def nothing_is_built() -> Iterator[None]:
    """The first parameter of any module that takes memory ends the test."""

    def refuse(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
        if parameter.is_meta:
            return
        pytest.fail(f"{type(module).__name__} gets its parameter {name}")

    handle = register_module_parameter_registration_hook(refuse)
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("widths", "layers", "attention", "channels"),
    [
        ((8,), 1, (0,), 1),
        ((32, 64), 1, (), 3),
        ((8, 16, 24, 24), 3, (0, 2, 3), 4),
        ((16, 8, 8), 2, (1,), 1),
    ],
)
def test_a_description_of_too_many_parameters_is_refused_and_just_enough_is_built(
    widths: tuple[int, ...], layers: int, attention: tuple[int, ...], channels: int
) -> None:
    config = {
        **DIGITS,
        "block_out_channels": list(widths),
        "layers_per_block": layers,
        "attention_levels": list(attention),
        "channels": channels,
        "time_feature_width": 10,
    }
    number = sum(p.numel() for p in unet_from_config(config).parameters())
    unet_from_config(config, max_parameters=number)
    with pytest.raises(ReplyError, match=f"make {number:,} parameters; at most {number - 1:,}"):
        unet_from_config(config, max_parameters=number - 1)


def test_weights_follow_from_the_seed_alone_and_leave_the_callers_random_state() -> None:
    before = torch.random.get_rng_state()
    first = build_unet(ModelConfig(), seed=7).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again = build_unet(ModelConfig(), seed=7).state_dict()
    other = build_unet(ModelConfig(), seed=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_attention_is_where_the_config_says() -> None:
    unet = build_unet(
        ModelConfig(block_out_channels=(8, 16, 16), attention_levels=(0, 2), image_size=8), seed=0
    )
    assert list(unet.config["down_block_types"]) == [
        "AttnDownBlock2D",
        "DownBlock2D",
        "AttnDownBlock2D",
    ]
    assert list(unet.config["up_block_types"]) == ["AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"]


def test_description_of_the_dense_unet() -> None:
    assert unet_config(build_unet(ModelConfig(), seed=0)) == DIGITS


def filled(unet: PrunedUNet) -> PrunedUNet:
    """``unet`` with weights: a network that was built from a description has none yet."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.1)
    return unet


def test_description_survives_json_and_gives_the_same_network() -> None:
    unet = filled(unet_from_config(json.loads(json.dumps(PRUNED))))
    assert unet_config(unet) == PRUNED
    assert unet.time_embedding.linear_1.in_features == 32
    assert unet.time_embedding.linear_1.out_features == 4 * 24
    twin = unet_from_config(unet_config(unet))
    twin.load_state_dict(unet.state_dict())
    assert torch.isfinite(predict(unet)).all()
    assert torch.equal(predict(twin), predict(unet))


def test_building_from_a_description_leaves_the_callers_random_state() -> None:
    before = torch.random.get_rng_state()
    unet_from_config(PRUNED)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dense_network_computes_what_the_stock_class_computes() -> None:
    from diffusers import UNet2DModel

    unet = build_unet(ModelConfig(), seed=3)
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    del config["time_feature_width"]
    stock = UNet2DModel(**config)
    stock.load_state_dict(unet.state_dict())
    assert torch.equal(predict(stock), predict(unet))


def test_pruned_network_is_stored_and_read_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unet = filled(unet_from_config(PRUNED))
    unet.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        back = PrunedUNet.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert type(back) is PrunedUNet
    assert unet_config(back) == PRUNED
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), back.parameters(), strict=True))
    assert not caplog.records


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": "evil.py"}, "auto_map: Extra inputs are not permitted"),
        ({"image_size": "8"}, "image_size: Input should be a valid integer"),
        ({"channels": 5}, "channels: Input should be less than or equal to 4"),
        ({"block_out_channels": [30, 64]}, "block_out_channels has width 30"),
        (
            {"block_out_channels": [8192 * 8]},
            r"block_out_channels\.0: .* less than or equal to 8192",
        ),
        (
            {"block_out_channels": [8] * 9, "image_size": 256},
            "block_out_channels: .* at most 8 items",
        ),
        # 18 billion parameters, 72 GB.
        ({"block_out_channels": [8192, 8192]}, r"block_out_channels = .* parameters; at most"),
        # As large as every single bound allows.
        (
            {"block_out_channels": [8192] * 8, "image_size": 1024, "layers_per_block": 16},
            r"block_out_channels = .* parameters; at most",
        ),
        ({"layers_per_block": 1000}, "layers_per_block: Input should be less than or equal to 16"),
        ({"time_feature_width": 31}, "time_feature_width: Input should be a multiple of 2"),
        ({"time_feature_width": 10**9}, "time_feature_width: Input should be less than"),
        ({"dropout": float("nan")}, "dropout"),
        ({"dropout": {1, 2}}, "more than plain values"),
    ],
)
def test_a_strange_description_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ReplyError, match=message):
        unet_from_config({**DIGITS, "attention_levels": [0], **change})


@pytest.mark.parametrize("key", sorted(DIGITS))
def test_every_key_of_a_description_is_required(key: str) -> None:
    with pytest.raises(ReplyError, match=rf"{key}(: Field required| is missing)"):
        unet_from_config({k: v for k, v in DIGITS.items() if k != key})


def test_scheduler_follows_the_config() -> None:
    scheduler = build_scheduler(
        DiffusionConfig(num_train_timesteps=10, beta_start=0.1, beta_end=0.2)
    )
    assert len(scheduler.betas) == 10
    torch.testing.assert_close(scheduler.betas[[0, -1]], torch.tensor([0.1, 0.2]))
    # One step of DDPM keeps sqrt(1 - beta) of the image and adds sqrt(beta) of noise.
    noised = scheduler.add_noise(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0]))
    torch.testing.assert_close(noised, torch.tensor([0.9**0.5]))
    assert scheduler.config.prediction_type == "epsilon"
