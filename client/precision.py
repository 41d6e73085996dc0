"""Which arithmetic a network is trained in: float32, or bfloat16 where that is faster."""

import json
import logging
import time
from typing import Final

import torch

from fedphd.client.flat_unet import FlatUNet
from fedphd.common.config.evaluation import Precision
from fedphd.common.unet.arithmetic import Arithmetic, gpu_has_bf16, has_bf16
from fedphd.common.unet.model import PrunedUNet

logger = logging.getLogger(__name__)

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


def arithmetic_for(network: FlatUNet, precision: Precision) -> Arithmetic:
    """What ``precision`` means for this network on its device; the log says it once.

    "auto" is bfloat16 on GPUs and CPUs that have instructions for it, on a CPU where the network is
    large enough and a step of a trial is faster; else float32. A process tries an architecture
    once; the trial leaves weights, gradient and random state as they are.
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
        multiplies = gpu_has_bf16(device)
        return multiplies, "on a GPU" if multiplies else "this GPU has no instructions for bf16"
    if not has_bf16():
        return False, "this processor has no instructions for bf16"
    if network.flat.numel() * network.unet_config["image_size"] ** 2 < _LEAST_WORK:
        return False, "so small a network gains little by bf16"
    plain, coarse = (_trial_s(network, Arithmetic(device, bf16=bf16)) for bf16 in (False, True))
    why = f"a step of {_TRIAL_IMAGES} images takes {plain:.3g} s in fp32, {coarse:.3g} s in bf16"
    return coarse < _WORTH * plain, why


def _trial_s(network: FlatUNet, arithmetic: Arithmetic) -> float:
    """Seconds of a step of the trial."""
    return trial_s(network, arithmetic, network.unet, _TRIAL_IMAGES, steps=2)


def trial_s(
    network: FlatUNet, arithmetic: Arithmetic, unet: PrunedUNet, num_images: int, steps: int
) -> float:
    """Seconds of the fastest of ``steps`` steps, without the optimiser.

    Weights, gradient and random state stay as they are.

    Args:
        unet: the network's, or one that computes the same with the same weights.
    """
    config, device, times = network.unet_config, network.flat.device, []
    size = config["image_size"]
    images = torch.zeros(num_images, config["channels"], size, size, device=device)
    timesteps = torch.zeros(num_images, dtype=torch.int64, device=device)
    # Not the timesteps again: what is compiled for one tensor in both places fits no other.
    labels = None if network.unet.no_label is None else torch.zeros_like(timesteps)
    network.unet.train()
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_cuda else []):
        for _ in range(steps):
            started_s = time.perf_counter()
            with arithmetic():
                predicted = unet(arithmetic.arranged(images), timesteps, labels, return_dict=False)
            predicted[0].float().square().mean().backward()
            if on_cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started_s)
    network.gradient.zero_()
    return min(times)
