"""Local training of the U-Net on one client's images."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from fedphd.client.kept import MOMENTS, OWN_WEIGHTS, Kept
from fedphd.client.network import Network, Networks
from fedphd.client.objectives import (
    Batch,
    EpsilonObjective,
    LocalMethod,
    Objective,
    local_method,
)
from fedphd.common.data import to_model_range
from fedphd.common.errors import ConfigError, FedPhDError, ReplyError
from fedphd.common.groups import Cut, GroupPenalty
from fedphd.common.layout import TensorLayout
from fedphd.common.model import build_scheduler, resolve_device
from fedphd.common.parts import PARTS, Part, Selection
from fedphd.common.rng import derive_seed, generator
from fedphd.common.settings import DiffusionConfig, ObjectiveConfig, TrainingConfig


@dataclass(frozen=True)
class TrainResult:
    """One edge round of a client.

    Attributes:
        weights: trained weights of the whole U-Net, (numel,), float32, on the CPU.
        layout: their names and shapes.
        loss: mean over the steps of the objective alone, without the method's term and the
            sparsity penalty.
        sparsity_penalty: mean over the steps of the group penalty before its factor lambda;
            0 where it was off.
        term: mean over the steps of what the method added to the loss (FedProx, MOON).
        variate_change: change of SCAFFOLD's control variate of this client, (numel,), float32,
            on the CPU; None for other methods.
        steps: optimiser steps taken.
        num_examples: images of the client.
        seconds: wall time.
    """

    weights: torch.Tensor
    layout: TensorLayout
    loss: float
    sparsity_penalty: float
    term: float
    steps: int
    num_examples: int
    seconds: float
    variate_change: torch.Tensor | None


@dataclass(frozen=True)
class EvaluationResult:
    """Mean epsilon loss over ``num_examples`` images."""

    loss: float
    num_examples: int


class Trainer:
    """One client's trainer; keeps between rounds the network, and what ``client/kept.py`` lists.

    Args:
        client_id: stable name of the client; part of every seed.
        device: "auto", "cpu" or "cuda", resolved here.
        networks: shared with other trainers of this thread; None: of its own.

    Raises:
        ConfigError: no such device.
    """

    def __init__(
        self, *, client_id: str, device: str = "auto", networks: Networks | None = None
    ) -> None:
        self.client_id = client_id
        self.device = resolve_device(device)
        self._networks = networks or Networks()
        self._kept = Kept(client_id, self.device)
        self._steps = 0

    def train(
        self,
        *,
        images: torch.Tensor,
        weights: torch.Tensor,
        unet_config: Mapping[str, Any],
        diffusion: DiffusionConfig,
        training: TrainingConfig,
        sparsity_lambda: float,
        cut: Cut | None,
        run_seed: int,
        interval: int,
        edge_round: int,
        prune_moments: bool = True,
        objective: Objective | None = None,
        method: ObjectiveConfig | None = None,
        variate: torch.Tensor | None = None,
        parts: tuple[Part, ...] = PARTS,
        initial: Callable[[], torch.Tensor] | None = None,
    ) -> TrainResult:
        """Train ``weights`` on ``images`` for one edge round.

        All draws follow from (run seed, client, interval, edge round), the caller's global
        generators stay as they are, and on a CPU the same call from the same ``state_dict``
        gives the same bits (for one number of threads).

        Args:
            images: (N, C, H, W), uint8, on the CPU.
            weights: (numel,), float32, the received ``parts`` in the order of the U-Net's state
                dict.
            unet_config: the U-Net, as ``common.model.unet_config`` gives it.
            diffusion: the forward process.
            training: optimiser and amount of work.
            sparsity_lambda: factor of the group penalty (arXiv:2507.06449); 0 = off.
            cut: how the network was pruned since this client's last round, if it was.
            run_seed: the run's seed.
            interval: number of the interval.
            edge_round: number of the edge round in the interval.
            prune_moments: cut the optimiser's moments with ``cut``; else they start afresh.
            objective: what is minimised; default EpsilonObjective.
            method: the federated method and its settings; default FedAvg.
            variate: SCAFFOLD's server variate c, (numel,), float32.
            parts: of the U-Net that were received; the rest are this client's own.
            initial: gives the whole U-Net's weights, (numel,), that own parts start from.

        Raises:
            ConfigError: the images do not fit the U-Net.
            ReplyError: the weights do not fit the U-Net, or its config is malformed; scaffold
                without ``variate``, or parts are missing without ``initial``.
            FedPhDError: the loss or its gradient is not finite; names client, round and step.
        """
        start_s = time.perf_counter()
        network = self._networks.get(unet_config, self.device)
        check_images(images, network)
        self._kept.fit(network.layout, cut, prune_moments=prune_moments)
        network.load(self._completed(network, weights, parts, initial))
        local = local_method(
            method or ObjectiveConfig(),
            training,
            network,
            self._kept,
            variate=variate,
            client_id=self.client_id,
        )
        round_ = _Round(
            network=network,
            scheduler=build_scheduler(diffusion),
            optimizer=self._optimizer(network, training),
            objective=objective or EpsilonObjective(),
            method=local,
            training=training,
            # Built before the steps, so that a first sparse round draws what a later one would.
            penalty=network.penalty if sparsity_lambda else None,
            sparsity_lambda=sparsity_lambda,
            rng=generator("train", run_seed, self.client_id, interval, edge_round),
            name=f"client {self.client_id}, interval {interval}, round {edge_round}",
        )
        dropout_seed = derive_seed("dropout", run_seed, self.client_id, interval, edge_round)
        with seeded(self.device, dropout_seed):
            steps = self._run(round_, images)
        change = local.finish(self._kept)
        if parts != PARTS:
            self._kept.vectors[OWN_WEIGHTS] = network.flat.detach().clone()
        if training.optimizer_state == "fresh":
            self._kept.drop(*MOMENTS)
        return TrainResult(
            weights=network.flat.detach().to("cpu", copy=True),
            layout=network.layout,
            loss=math.fsum(step.loss for step in steps) / len(steps),
            sparsity_penalty=math.fsum(step.penalty for step in steps) / len(steps),
            term=math.fsum(step.term for step in steps) / len(steps),
            steps=len(steps),
            num_examples=len(images),
            seconds=time.perf_counter() - start_s,
            variate_change=change,
        )

    def _run(self, round_: _Round, images: torch.Tensor) -> list[_Step]:
        """All steps of a round."""
        steps: list[_Step] = []
        round_.network.unet.train()
        for indices in batches(len(images), round_.training, round_.rng):
            steps.append(round_.step(images[indices], len(steps) + 1, self._steps))
            self._steps += 1
        return steps

    @torch.no_grad()
    def evaluate(
        self,
        *,
        images: torch.Tensor,
        weights: torch.Tensor,
        unet_config: Mapping[str, Any],
        diffusion: DiffusionConfig,
        run_seed: int,
        batch_size: int = 256,
    ) -> EvaluationResult:
        """Mean epsilon loss of ``weights`` on ``images``, (N, C, H, W), uint8.

        Noise and timesteps are the same in every round, so losses of rounds compare. The
        optimiser's moments and step counter stay as they are.

        Raises:
            ConfigError, ReplyError: as ``train``.
        """
        network = self._networks.get(unet_config, self.device)
        network.load(weights)
        check_images(images, network)
        scheduler, objective = build_scheduler(diffusion), EpsilonObjective()
        rng = generator("evaluate", run_seed, self.client_id)
        network.unet.eval()
        total = 0.0
        for part in torch.split(images, batch_size):
            batch = noised(to_model_range(part), scheduler, rng, self.device)
            with autocast(self.device):
                total += float(objective.loss(network.unet, batch)) * len(part)
        return EvaluationResult(loss=total / len(images), num_examples=len(images))

    def state_dict(self) -> dict[str, torch.Tensor | int | str]:
        """What lasts between rounds, for a process that ends after each.

        Returns:
            ``steps``, and what ``Kept.state_dict`` gives: JSON scalars, and vectors, (numel,),
            float32, on the CPU.
        """
        return {"steps": self._steps, **self._kept.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; raises FedPhDError if that is malformed."""
        try:
            steps = int(state["steps"])
            kept = Kept.from_state(self.client_id, self.device, state)
        except (KeyError, TypeError, ValueError) as error:
            raise FedPhDError(
                f"the kept training state of client {self.client_id} is malformed ({error}); "
                "remove it to start afresh"
            ) from error
        self._steps, self._kept = steps, kept

    def _completed(
        self,
        network: Network,
        weights: torch.Tensor,
        parts: tuple[Part, ...],
        initial: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        """The received ``weights`` with this client's own parts, (numel,)."""
        if parts == PARTS:
            return weights
        own = self._kept.vectors.get(OWN_WEIGHTS)
        if own is None:
            if initial is None:
                raise ReplyError(
                    f"only {', '.join(parts)} came, and nothing to start the rest from"
                )
            own = initial()
        return Selection(network.layout, parts).put(own, weights)

    def _optimizer(self, network: Network, training: TrainingConfig) -> torch.optim.Optimizer:
        rate, decay = training.learning_rate, training.weight_decay
        if training.optimizer == "sgd":
            return torch.optim.SGD([network.flat], lr=rate, weight_decay=decay)
        if training.optimizer_state == "fresh":
            self._kept.drop(*MOMENTS)
        kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
        betas = (training.beta1, training.beta2)
        optimizer = kind([network.flat], lr=rate, betas=betas, weight_decay=decay, fused=True)
        moments = {name: self._kept.vector(name, network.flat.detach()) for name in MOMENTS}
        optimizer.state[network.flat] = {"step": self._kept.moment_steps, **moments}
        return optimizer


class _Step(NamedTuple):
    """What an optimiser step came to; the penalty is before lambda."""

    loss: float
    term: float
    penalty: float


@dataclass(frozen=True)
class _Round:
    """What stays the same over the steps of an edge round."""

    network: Network
    scheduler: DDPMScheduler
    optimizer: torch.optim.Optimizer
    objective: Objective
    method: LocalMethod
    training: TrainingConfig
    penalty: GroupPenalty | None
    sparsity_lambda: float
    rng: torch.Generator
    name: str

    def step(self, images: torch.Tensor, number: int, steps_before: int) -> _Step:
        """One optimiser step on uint8 images.

        Args:
            images: (B, C, H, W), uint8, on the CPU.
            number: of this step in its round, from 1.
            steps_before: steps that this client has taken in all its rounds.
        """
        batch = self._draw(images)
        self.network.gradient.zero_()
        with autocast(batch.noisy.device):
            loss, term = self.method.losses(self.objective, self.network.unet, batch)
        total, penalty = loss if term is None else loss + term, 0.0
        if self.penalty is not None:
            group_norms = self.penalty()
            total, penalty = total + self.sparsity_lambda * group_norms, group_norms.item()
        # torch leaves backward() untyped.
        total.backward()  # type: ignore[no-untyped-call]
        added = self.method.correct(self.network.gradient)
        if term is not None:
            added += term.item()
        norm = torch.nn.utils.clip_grad_norm_([self.network.flat], self.training.max_grad_norm)
        self._check_finite(number, loss=loss.item(), gradient=norm.item())
        self.method.given(self.network.gradient)
        self.optimizer.param_groups[0]["lr"] = warmed_up(self.training, steps_before)
        self.optimizer.step()
        return _Step(loss.item(), added, penalty)

    def _draw(self, images: torch.Tensor) -> Batch:
        clean = to_model_range(images)
        if self.training.horizontal_flip:
            clean = flipped(clean, self.rng)
        return noised(clean, self.scheduler, self.rng, self.network.flat.device)

    def _check_finite(self, number: int, *, loss: float, gradient: float) -> None:
        if math.isfinite(loss) and math.isfinite(gradient):
            return
        raise FedPhDError(
            f"{self.name}, step {number}: the loss is {loss:g}, its gradient's norm {gradient:g}; "
            f"lower training.learning_rate (now {self.training.learning_rate:g}) or raise "
            f"training.warmup_steps (now {self.training.warmup_steps})"
        )


def warmed_up(training: TrainingConfig, steps_before: int) -> float:
    """Learning rate after ``steps_before`` steps: linear up to step ``warmup_steps``."""
    if steps_before + 1 >= training.warmup_steps:
        return training.learning_rate
    return training.learning_rate * (steps_before + 1) / training.warmup_steps


def batches(
    num_images: int, training: TrainingConfig, rng: torch.Generator
) -> Iterator[torch.Tensor]:
    """Indices of each step's images, (B,), int64: a new permutation per pass over the data.

    The last batch of a pass may be smaller. With ``local_unit = "steps"`` passes go on until
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


def noised(
    clean: torch.Tensor, scheduler: DDPMScheduler, rng: torch.Generator, device: torch.device
) -> Batch:
    """Draw noise and timesteps and apply the forward process.

    Args:
        clean: (B, C, H, W), float32, in [-1, 1], on the CPU.
        scheduler: the forward process.
        rng: a generator on the CPU, so that the draws are the same for every device.
        device: where the batch goes.
    """
    noise = torch.randn(clean.shape, generator=rng).to(device)
    num_timesteps: int = scheduler.config["num_train_timesteps"]
    timesteps = torch.randint(num_timesteps, (len(clean),), generator=rng).to(device)
    # diffusers asks for int32 and means any whole numbers.
    noisy = scheduler.add_noise(clean.to(device), noise, timesteps)  # type: ignore[arg-type]
    return Batch(noisy=noisy, timesteps=timesteps, noise=noise)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA; on CPUs small U-Nets lose by it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators (dropout knows no other) and give them back as they were."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.manual_seed(seed)
        yield


def check_images(images: torch.Tensor, network: Network) -> None:
    """Raise ConfigError unless ``images`` are uint8 and of the U-Net's shape."""
    size = network.unet_config["image_size"]
    expected = (network.unet_config["channels"], size, size)
    if images.dtype != torch.uint8 or images.shape[1:] != expected or len(images) == 0:
        raise ConfigError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; the U-Net takes "
            f"torch.uint8 of shape (N, {', '.join(map(str, expected))}) with N >= 1: make "
            "model.image_size and model.channels fit the data"
        )
