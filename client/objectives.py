"""What a client minimises locally."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from fedphd.common.model import PrunedUNet


@dataclass(frozen=True)
class Batch:
    """Noised images of one optimiser step, on the device that trains.

    Attributes:
        noisy: images after t steps of the forward process, (B, C, H, W), float32.
        timesteps: t of each image, (B,), int64, in [0, T).
        noise: the Gaussian noise in them, (B, C, H, W), float32.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor


class Objective(ABC):
    """A local loss; another federated method is another class with this one method."""

    @abstractmethod
    def loss(self, unet: PrunedUNet, batch: Batch) -> torch.Tensor:
        """The loss of one step: a differentiable float32 scalar, a mean over the batch."""


class EpsilonObjective(Objective):
    """Mean squared error of the predicted noise (Eq. 14 of DDPM, arXiv:2006.11239)."""

    def loss(self, unet: PrunedUNet, batch: Batch) -> torch.Tensor:
        predicted = unet(batch.noisy, batch.timesteps, return_dict=False)[0]
        return F.mse_loss(predicted.float(), batch.noise)
