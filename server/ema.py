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
    if it had stood there since the interval's first step. The decay of step n = 1, 2, ... is
    ``min(decay, (1 + n) / (warmup + n))``, that of the first step, n = 0, is 0: the schedule of
    diffusers' ``EMAModel``, where ``warmup`` is always 10. So the first update drops the random
    initial weights, and as long as the warm-up lasts the average spans about the last
    1 / (warmup - 1) of the training. From then on an update decays by exactly
    ``decay ** mean_steps``.

    Args:
        weights: initial weights, float32; copied. Until the first update they are the average.
        decay: per client optimiser step, in [0, 1).
        warmup: of the decay, >= 1; with 1 there is none.
        steps: optimiser steps that the average has seen already.

    Attributes:
        state: the averaged weights by name, float32, in the average's own memory.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        decay: float,
        warmup: int = 10,
        steps: float = 0.0,
    ) -> None:
        self.decay = decay
        self.warmup = warmup
        self.steps = steps
        self.state = {name: tensor.detach().clone() for name, tensor in weights.items()}

    @property
    def warmup_ends(self) -> float:
        """Steps after which ``decay`` acts."""
        return max(0.0, (self.warmup * self.decay - 1) / (1 - self.decay))

    @property
    def span(self) -> float:
        """Steps that the average effectively covers, 1 / (1 - decay of the latest step)."""
        if self.steps <= 1:
            return self.steps
        latest = self.steps - 1
        return 1 / (1 - min(self.decay, (1 + latest) / (self.warmup + latest)))

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
        if self.steps == 0:
            return 0.0
        start, end = self.steps, self.steps + mean_steps
        warm_end = min(max(math.ceil(self.warmup_ends), start), end)
        # The product of (1 + n) / (warmup + n) over the steps telescopes, also for parts of a step.
        factors = ((start + j) / (warm_end + j) for j in range(1, self.warmup))
        return float(math.prod(factors) * self.decay ** (end - warm_end))

    def cut(self, cut: Cut) -> None:
        """Remove the channels that pruning removed from the weights."""
        self.state = cut.apply(self.state)
