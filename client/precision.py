"""Which arithmetic a network is trained in: float32, or bfloat16 where that is faster."""

import json
import logging
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from fedphd.client.flat_unet import FlatUNet
from fedphd.common.config.run import Precision

logger = logging.getLogger(__name__)

# Instructions that multiply bfloat16; without them it is worked out in float32, and slower.
_INSTRUCTIONS: Final = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
# Images in a step of the trial: enough to be of use, few enough for the largest networks.
_TRIAL_IMAGES: Final = 8
# The share of float32's time below which bfloat16 is worth its coarser sums.
_WORTH: Final = 0.9
# Weights times pixels of an image, about the multiplications of a forward pass. Networks of less,
# as for the digits, gain little (tests/benchmarks/step.py), and a trial takes 20 MB of kernels.
_LEAST_WORK: Final = 1e8
# Whether bfloat16 won, by what was asked for and the network's description; a process may play
# many clients.
_chosen: dict[str, bool] = {}


class Arithmetic:
    """Forward and backward passes of one network in float32 or, by autocast, in bfloat16.

    Weights, gradients and the optimiser stay float32.
    """

    def __init__(self, device: torch.device, *, bf16: bool) -> None:
        self.bf16 = bf16
        self._device = device

    def __call__(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def arranged(self, images: Tensor) -> Tensor:
        """``images``, (B, C, H, W), as they lie best in memory."""
        if self.bf16 and self._device.type == "cpu":
            # What bfloat16's convolutions on CPUs are written for.
            return images.contiguous(memory_format=torch.channels_last)
        return images


def arithmetic_for(network: FlatUNet, precision: Precision) -> Arithmetic:
    """What ``precision`` means for this network on its device; the log says it once.

    "auto" is bfloat16 on CUDA; on a CPU that has instructions for it, where the network is large
    enough and a step of a trial is faster; else float32. A process tries an architecture once; the
    trial leaves weights, gradient and random state as they are.
    """
    device = network.flat.device
    key = json.dumps([precision, device.type, network.unet_config], sort_keys=True)
    if key not in _chosen:
        _chosen[key], why = _choice(network, precision)
        logger.info("training in %s: %s", "bf16" if _chosen[key] else "fp32", why)
    return Arithmetic(device, bf16=_chosen[key])


def _choice(network: FlatUNet, precision: Precision) -> tuple[bool, str]:
    """Whether to train in bfloat16, and why."""
    device = network.flat.device
    if precision != "auto":
        return precision == "bf16", "as the run asks"
    if device.type == "cuda":
        return True, "on a GPU"
    if not has_bf16():
        return False, "this processor has no instructions for bf16"
    if network.flat.numel() * network.unet_config["image_size"] ** 2 < _LEAST_WORK:
        return False, "so small a network gains little by bf16"
    plain, coarse = (_trial_s(network, Arithmetic(device, bf16=bf16)) for bf16 in (False, True))
    why = f"a step of {_TRIAL_IMAGES} images takes {plain:.3g} s in fp32, {coarse:.3g} s in bf16"
    return coarse < _WORTH * plain, why


def has_bf16() -> bool:
    """Whether this machine's processor has instructions for bfloat16."""
    # torch before 2.9 does not tell.
    told: Callable[[], dict[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return any(told().get(name) for name in _INSTRUCTIONS)


def _trial_s(network: FlatUNet, arithmetic: Arithmetic) -> float:
    """Seconds of the faster of two steps, without the optimiser."""
    config, times = network.unet_config, []
    size = config["image_size"]
    images = torch.zeros(_TRIAL_IMAGES, config["channels"], size, size)
    timesteps = torch.zeros(_TRIAL_IMAGES, dtype=torch.int64)
    network.unet.train()
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            started_s = time.perf_counter()
            with arithmetic():
                predicted = network.unet(arithmetic.arranged(images), timesteps, return_dict=False)
            predicted[0].float().square().mean().backward()
            times.append(time.perf_counter() - started_s)
    network.gradient.zero_()
    return min(times)
