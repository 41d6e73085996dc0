"""Local training of the U-Net on one client's images."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from fedphd.client.flat_unet import FlatUNet, UNetCache
from fedphd.client.local_state import MOMENTS, OWN_WEIGHTS, LocalState
from fedphd.client.objectives import EpsilonObjective, Objective, local_method
from fedphd.client.steps import LocalRound, batches, validation_loss
from fedphd.common.config.run import DiffusionConfig, ObjectiveConfig, TrainingConfig
from fedphd.common.errors import ConfigError, FedPhDError, ReplyError
from fedphd.common.rng import derive_seed, generator
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_scheduler, resolve_device
from fedphd.common.unet.parts import PARTS, Part, PartSubset
from fedphd.common.wire.metrics import TrainMetrics


@dataclass(frozen=True)
class TrainResult:
    """One edge round of a client.

    Attributes:
        weights: trained weights of the whole U-Net, (numel,), float32, on the CPU.
        layout: their names and shapes.
        metrics: of this client alone.
        steps: optimiser steps taken.
        variate_change: change of SCAFFOLD's control variate of this client, (numel,), float32,
            on the CPU; None for other methods.
        seconds: wall time.
    """

    weights: torch.Tensor
    layout: TensorLayout
    metrics: TrainMetrics
    steps: int
    seconds: float
    variate_change: torch.Tensor | None


class Trainer:
    """One client's trainer; keeps the network between rounds, and its ``LocalState``.

    Args:
        client_id: stable name of the client; part of every seed.
        device: "auto", "cpu" or "cuda", resolved here.
        networks: shared with other trainers of this thread; None: of its own.

    Raises:
        ConfigError: no such device.
    """

    def __init__(
        self, *, client_id: str, device: str = "auto", networks: UNetCache | None = None
    ) -> None:
        self.client_id = client_id
        self.device = resolve_device(device)
        self._networks = networks or UNetCache()
        self._state = LocalState(client_id, self.device)
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
        held_out: torch.Tensor | None = None,
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
            held_out: (M, C, H, W), uint8, M >= 1, that the weights are validated on before.

        Raises:
            ConfigError: the images do not fit the U-Net.
            ReplyError: the weights do not fit the U-Net, or its config is malformed; scaffold
                without ``variate``, or parts are missing without ``initial``.
            FedPhDError: the loss or its gradient is not finite; names client, round and step.
        """
        start_s = time.perf_counter()
        network = self._networks.get(unet_config, self.device)
        check_images(images, network)
        self._state.fit(network.layout, cut, prune_moments=prune_moments)
        network.load(self._completed(network, weights, parts, initial))
        scheduler = build_scheduler(diffusion)
        validated = self._validated(network, held_out, scheduler, run_seed)
        local = local_method(
            method or ObjectiveConfig(),
            training,
            network,
            self._state,
            variate=variate,
            client_id=self.client_id,
        )
        round_ = LocalRound(
            network=network,
            scheduler=scheduler,
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
        change = local.finish(self._state)
        self._keep(network, parts, training)
        return TrainResult(
            weights=network.flat.detach().to("cpu", copy=True),
            layout=network.layout,
            metrics=TrainMetrics.of_steps(steps, validation_loss=validated),
            steps=len(steps),
            seconds=time.perf_counter() - start_s,
            variate_change=change,
        )

    def _validated(
        self,
        network: FlatUNet,
        held_out: torch.Tensor | None,
        scheduler: DDPMScheduler,
        run_seed: int,
    ) -> float | None:
        """The loaded weights' loss on ``held_out``; with the same draws in every round."""
        if held_out is None:
            return None
        check_images(held_out, network)
        rng = generator("validate", run_seed, self.client_id)
        return validation_loss(network, held_out, scheduler, rng)

    def _keep(self, network: FlatUNet, parts: tuple[Part, ...], training: TrainingConfig) -> None:
        """Remember what the next round starts from, and forget what it starts afresh."""
        if parts != PARTS:
            self._state.vectors[OWN_WEIGHTS] = network.flat.detach().clone()
        if training.optimizer_state == "fresh":
            self._state.drop(*MOMENTS)

    def _run(self, round_: LocalRound, images: torch.Tensor) -> list[dict[str, float]]:
        """All steps of a round."""
        steps: list[dict[str, float]] = []
        round_.network.unet.train()
        for indices in batches(len(images), round_.training, round_.rng):
            steps.append(round_.step(images[indices], len(steps) + 1, self._steps))
            self._steps += 1
        return steps

    def state_dict(self) -> dict[str, torch.Tensor | int | str]:
        """What lasts between rounds, for a process that ends after each.

        Returns:
            ``steps``, and what ``LocalState.state_dict`` gives: JSON scalars, and vectors,
            (numel,), float32, on the CPU.
        """
        return {"steps": self._steps, **self._state.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; raises FedPhDError if that is malformed."""
        try:
            steps = int(state["steps"])
            local = LocalState.from_state(self.client_id, self.device, state)
        except (KeyError, TypeError, ValueError) as error:
            raise FedPhDError(
                f"the stored training state of client {self.client_id} is malformed ({error}); "
                "remove it to start afresh"
            ) from error
        self._steps, self._state = steps, local

    def _completed(
        self,
        network: FlatUNet,
        weights: torch.Tensor,
        parts: tuple[Part, ...],
        initial: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        """The received ``weights`` with this client's own parts, (numel,)."""
        if parts == PARTS:
            return weights
        own = self._state.vectors.get(OWN_WEIGHTS)
        if own is None:
            if initial is None:
                raise ReplyError(
                    f"only {', '.join(parts)} came, and nothing to start the rest from"
                )
            own = initial()
        return PartSubset(network.layout, parts).put(own, weights)

    def _optimizer(self, network: FlatUNet, training: TrainingConfig) -> torch.optim.Optimizer:
        rate, decay = training.learning_rate, training.weight_decay
        if training.optimizer == "sgd":
            return torch.optim.SGD([network.flat], lr=rate, weight_decay=decay)
        if training.optimizer_state == "fresh":
            self._state.drop(*MOMENTS)
        kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
        betas = (training.beta1, training.beta2)
        optimizer = kind([network.flat], lr=rate, betas=betas, weight_decay=decay, fused=True)
        moments = {name: self._state.vector(name, network.flat.detach()) for name in MOMENTS}
        optimizer.state[network.flat] = {"step": self._state.moment_steps, **moments}
        return optimizer


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators (dropout knows no other) and give them back as they were."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.manual_seed(seed)
        yield


def check_images(images: torch.Tensor, network: FlatUNet) -> None:
    """Raise ConfigError unless ``images`` are uint8 and of the U-Net's shape."""
    size = network.unet_config["image_size"]
    expected = (network.unet_config["channels"], size, size)
    if images.dtype != torch.uint8 or images.shape[1:] != expected or len(images) == 0:
        raise ConfigError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; the U-Net takes "
            f"torch.uint8 of shape (N, {', '.join(map(str, expected))}) with N >= 1: make "
            "model.image_size and model.channels fit the data"
        )
