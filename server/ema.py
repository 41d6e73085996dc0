"""The exponential moving average of the global weights, kept at the cloud without extra traffic."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedphd.common.errors import FedPhDError
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout


class Ema:
    """Moving average of weights whose age counts in client optimiser steps.

    The clients' steps are not seen here, only their average at the end of an interval: it enters as
    if it had stood there since the interval's first step. The decay of step n = 0, 1, ... is
    ``min(decay, n / (9 + n))``, the warm-up of diffusers' ``EMAModel``. So the first update drops
    the random initial weights, and until step 9 decay / (1 - decay) (1,791 at 0.995) the average
    spans about the last ninth of the training. From then on an update decays by exactly
    ``decay ** mean_steps``.

    Args:
        weights: initial weights, float32; copied. Until the first update they are the average.
        decay: per client optimiser step, in [0, 1).
        steps: optimiser steps that the average has seen already.

    Attributes:
        state: the averaged weights by name, float32, in the average's own memory.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, decay: float, steps: float = 0.0) -> None:
        self.decay = decay
        self.steps = steps
        self.state = {name: tensor.detach().clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], *, mean_steps: float) -> None:
        """Move towards ``weights``, the average after ``mean_steps`` more steps of a client.

        Raises FedPhDError: they have other names or shapes; or ``mean_steps`` is negative or NaN.
        """
        problem = TensorLayout.of(self.state).mismatch(TensorLayout.of(weights))
        if problem:
            raise FedPhDError(f"weights for the moving average: {problem}")
        share = 1 - self.retained(mean_steps)
        for name, average in self.state.items():
            average.lerp_(weights[name], share)
        self.steps += mean_steps

    def retained(self, mean_steps: float) -> float:
        """The share of the present average that is left after ``mean_steps`` more steps."""
        if not 0 <= mean_steps < math.inf:
            raise FedPhDError(f"mean_steps = {mean_steps}; expected a number of steps >= 0")
        if mean_steps == 0:
            return 1.0
        start, end = self.steps, self.steps + mean_steps
        warm_end = min(max(math.ceil(9 * self.decay / (1 - self.decay)), start), end)
        # The product of n / (9 + n) over the steps telescopes, also for parts of a step.
        warm = math.prod((start + j) / (warm_end + j) for j in range(9)) if warm_end > start else 1
        return float(warm * self.decay ** (end - warm_end))

    def cut(self, cut: Cut) -> None:
        """Remove the channels that pruning removed from the weights."""
        self.state = cut.apply(self.state)
