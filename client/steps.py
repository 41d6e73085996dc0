"""The optimiser steps of one edge round, and the loss on images that are held out of them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from fedphd.client.compiled import CompiledPasses
from fedphd.client.flat_unet import FlatUNet
from fedphd.client.objectives import Batch, EpsilonObjective, LocalMethod, Objective
from fedphd.client.readings import Readings
from fedphd.common.config.run import TrainingConfig
from fedphd.common.data.images import ImageSet, to_model_range
from fedphd.common.unet.arithmetic import Arithmetic
from fedphd.common.unet.groups import GroupPenalty

# Without gradients about so many times as many images fit as in a training step, and no more than
# that many are faster by any more.
_VALIDATION_BATCHES = 4
_VALIDATION_MOST = 256


@dataclass(frozen=True)
class LocalRound:
    """What stays the same over the steps of an edge round."""

    network: FlatUNet
    scheduler: DDPMScheduler
    optimizer: torch.optim.Optimizer
    objective: Objective
    method: LocalMethod
    training: TrainingConfig
    penalty: GroupPenalty | None
    sparsity_lambda: float
    arithmetic: Arithmetic
    compiled: CompiledPasses | None
    rng: torch.Generator
    readings: Readings

    def step(self, data: ImageSet, steps_before: int) -> None:
        """One optimiser step on B images.

        ``steps_before`` counts the steps of this client in all its rounds. Nothing in here asks
        the device for a value, which on a GPU would wait for it.
        """
        batch = self._draw(data)
        self.network.gradient.zero_()
        unet = self.network.unet
        if self.compiled is not None:
            unet = self.compiled.chosen(unet, len(batch.noisy))
        with self.arithmetic():
            loss, term = self.method.losses(self.objective, unet, batch)
        total, nothing = loss if term is None else loss + term, loss.new_zeros(())
        penalty = nothing
        if self.penalty is not None:
            penalty = self.penalty()
            total = total + self.sparsity_lambda * penalty
        # torch leaves backward() untyped.
        total.backward()  # type: ignore[no-untyped-call]
        added = self.method.correct(self.network.gradient)
        norm = torch.nn.utils.clip_grad_norm_([self.network.flat], self.training.max_grad_norm)
        self.readings.add(
            loss=loss,
            objective_term=sum((t.double() for t in (added, term) if t is not None), nothing),
            sparsity_penalty=penalty,
            gradient_norm=norm,
        )
        self.method.observe(self.network.gradient)
        self.optimizer.param_groups[0]["lr"] = warmed_up(self.training, steps_before)
        self.optimizer.step()

    def _draw(self, data: ImageSet) -> Batch:
        clean, labels = to_model_range(data.images), None
        if self.training.horizontal_flip:
            clean = flipped(clean, self.rng)
        if (no_label := self.network.unet.no_label) is not None:
            labels = without_some(data.labels, self.training.label_dropout, no_label, self.rng)
        batch = noised(clean, self.scheduler, self.rng, self.network.flat.device, labels)
        return replace(batch, noisy=self.arithmetic.arranged(batch.noisy))


def warmed_up(training: TrainingConfig, steps_before: int) -> float:
    """Learning rate after ``steps_before`` steps: linear up to step ``warmup_steps``."""
    if steps_before + 1 >= training.warmup_steps:
        return training.learning_rate
    return training.learning_rate * (steps_before + 1) / training.warmup_steps


def batches(
    num_images: int, training: TrainingConfig, rng: torch.Generator
) -> Iterator[torch.Tensor]:
    """Indices of each step's images, (B,), int64: a new permutation per pass over the data.

    The last batch of a pass may be smaller. With ``local_unit = "steps"`` there are passes until
    ``local_amount`` batches are drawn.
    """

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield from torch.split(torch.randperm(num_images, generator=rng), training.batch_size)

    per_pass = 1 if training.local_unit == "steps" else -(-num_images // training.batch_size)
    return itertools.islice(endless(), training.local_amount * per_pass)


def flipped(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mirror each of ``images``, (B, C, H, W), left to right with probability 1/2."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def without_some(
    labels: torch.Tensor, share: float, no_label: int, rng: torch.Generator
) -> torch.Tensor:
    """``labels``, (B,), int64, each replaced by ``no_label`` with probability ``share``.

    So one network learns both terms of classifier-free guidance (Alg. 1 of arXiv:2207.12598).
    """
    return torch.where(torch.rand(len(labels), generator=rng) < share, no_label, labels)


def noised(
    clean: torch.Tensor,
    scheduler: DDPMScheduler,
    rng: torch.Generator,
    device: torch.device,
    labels: torch.Tensor | None = None,
) -> Batch:
    """Draw noise and timesteps and apply the forward process.

    ``clean`` is (B, C, H, W), float32, in [-1, 1], on the CPU, and so is ``rng``: the draws are the
    same for every device. ``labels``, (B,), int64, are what the network is told.
    """
    noise = sent(torch.randn(clean.shape, generator=rng), device)
    num_timesteps: int = scheduler.config["num_train_timesteps"]
    timesteps = sent(torch.randint(num_timesteps, (len(clean),), generator=rng), device)
    # diffusers asks for int32 and means any whole numbers.
    noisy = scheduler.add_noise(sent(clean, device), noise, timesteps)  # type: ignore[arg-type]
    told = None if labels is None else sent(labels, device)
    return Batch(noisy=noisy, timesteps=timesteps, noise=noise, labels=told)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which is on the CPU, on ``device``; does not wait for what a GPU is doing."""
    if device.type == "cpu":
        return tensor
    # Out of other memory a copy first waits for all that the GPU was told.
    return tensor.pin_memory().to(device, non_blocking=True)


@torch.no_grad()
def validation_loss(
    network: FlatUNet,
    data: ImageSet,
    scheduler: DDPMScheduler,
    rng: torch.Generator,
    arithmetic: Arithmetic,
    *,
    batch_size: int,
) -> float:
    """Mean epsilon loss (arXiv:2006.11239, Eq. 14) of the network over the M images of ``data``.

    A class-conditional network is told all their classes. It is left in evaluation mode. Losses
    under generators of one seed can be compared: ``rng`` draws noise and timesteps.
    """
    objective, device = EpsilonObjective(), network.flat.device
    size = min(_VALIDATION_MOST, _VALIDATION_BATCHES * batch_size)
    network.unet.eval()
    total = 0.0
    for indices in torch.split(torch.arange(len(data)), size):
        part = data.subset(indices)
        labels = None if network.unet.no_label is None else part.labels
        batch = noised(to_model_range(part.images), scheduler, rng, device, labels)
        with arithmetic():
            total += float(objective.loss(network.unet, batch)) * len(part)
    return total / len(data)
