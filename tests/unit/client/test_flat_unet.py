"""The network that trainers of one process share."""

from __future__ import annotations

import torch

from fedphd.client.flat_unet import UNetCache
from fedphd.common.config.run import ModelConfig
from fedphd.common.unet.model import build_unet, unet_config

CPU = torch.device("cpu")


def description(width: int) -> dict[str, object]:
    config = ModelConfig(block_out_channels=(width, 16), attention_head_dim=4, norm_num_groups=4)
    return unet_config(build_unet(config, seed=0))


def test_one_network_serves_an_architecture_until_another_comes() -> None:
    networks = UNetCache()
    first = networks.get(description(8), CPU)
    assert networks.get(description(8), CPU) is first
    other = networks.get(description(12), CPU)
    assert other.layout != first.layout
    assert networks.get(description(8), CPU) is not first
