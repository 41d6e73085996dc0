"""What a U-Net's passes are computed in: float32 or, by autocast, bfloat16."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

# Instructions that multiply bfloat16; without them it is worked out in float32, and slower.
_INSTRUCTIONS: Final = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


class Arithmetic:
    """Passes of one network on ``device`` in float32 or, by autocast, in bfloat16.

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


def has_bf16() -> bool:
    """Whether this machine's processor has instructions for bfloat16."""
    # torch before 2.9 does not tell.
    told: Callable[[], dict[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return any(told().get(name) for name in _INSTRUCTIONS)


def gpu_has_bf16(device: torch.device) -> bool:
    """Whether ``device`` is a GPU with instructions for bfloat16; older ones emulate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
