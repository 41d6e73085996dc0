"""Local training of the U-Net on one client's images."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from fedphd.client.compiled import compiled_passes
from fedphd.client.flat_unet import FlatUNet, UNetCache
from fedphd.client.local_state import MOMENTS, OWN_WEIGHTS, VARIATE, LocalState
from fedphd.client.objectives import EpsilonObjective, Objective, local_method
from fedphd.client.precision import arithmetic_for
from fedphd.client.readings import Readings
from fedphd.client.steps import LocalRound, batches, validation_loss
from fedphd.common.config.run import TrainingConfig
from fedphd.common.data.images import ImageSet
from fedphd.common.errors import ConfigError, FedPhDError, ReplyError
from fedphd.common.rng import derive_seed, generator
from fedphd.common.unet.arithmetic import Arithmetic
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import (
    build_scheduler,
    build_unet,
    layout_of_dense,
    resolve_device,
)
from fedphd.common.unet.parts import PARTS, PartSubset
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.messages import TrainTask
from fedphd.common.wire.metrics import TrainMetrics


@dataclass(frozen=True)
class TrainResult:
    """One edge round of a client.

    Attributes:
        weights: trained weights of the whole U-Net, (numel,), float32, on the CPU; where it trains
            there they are the network's own, until a trainer that shares it trains again.
        layout: their names and shapes.
        steps: optimiser steps taken.
        variate_change: of this client's control variate, as ``task.reply_codec`` packed it; None
            without SCAFFOLD.
    """

    weights: Tensor
    layout: TensorLayout
    metrics: TrainMetrics
    steps: int
    variate_change: Tensor | None


@dataclass(frozen=True)
class ClientImages:
    """One client's images, of the U-Net's size, on the CPU.

    Attributes:
        train: N images.
        held_out: M >= 1 images, which the received weights are validated on.
    """

    train: ImageSet
    held_out: ImageSet | None = None


class Trainer:
    """One client's trainer; the network and its ``LocalState`` last from round to round.

    Args:
        client_id: stable name of the client; part of every seed.
        device: "auto", "cpu" or "cuda"; raises ConfigError if it does not exist.
        networks: shared with other trainers of this thread; None: of its own.
    """

    def __init__(
        self,
        *,
        client_id: str,
        device: str = "auto",
        networks: UNetCache | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.client_id = client_id
        self.device = resolve_device(device)
        self._networks = networks or UNetCache()
        self._objective = objective or EpsilonObjective()
        self._state = LocalState(client_id, self.device)
        self._steps = 0

    def train(
        self, task: TrainTask, weights: Tensor, data: ClientImages, variate: Tensor | None = None
    ) -> TrainResult:
        """Train ``weights`` for one edge round.

        All draws follow from (run seed, client, interval, edge round), the caller's global
        generators stay as they are, and on a CPU the same call from the same ``state_dict``
        gives the same bits (for one number of threads).

        Args:
            weights: (numel,), float32, the received ``task.parts`` in the order of the U-Net's
                state dict; the other parts are this client's own.
            variate: SCAFFOLD's server variate c, (numel,), float32.

        Raises:
            ConfigError: the images do not fit the U-Net.
            ReplyError: the weights do not fit the U-Net, or its config is malformed; scaffold
                without ``variate``; parts are missing, and the task does not say what they were.
            FedPhDError: the loss or its gradient is not finite; names client, round and step.
        """
        network = self._networks.get(task.network.unet, self.device)
        check_images(data.train, network)
        cut = Cut.from_json(task.cut) if task.cut else None
        self._state.fit(network.layout, cut, prune_moments=task.optimizer_moments == "prune")
        network.load(self._completed(network, task, weights))
        scheduler = build_scheduler(task.diffusion)
        arithmetic = arithmetic_for(network, task.training.precision)
        validated = self._validated(network, data.held_out, scheduler, task, arithmetic)
        round_ = self._round(task, network, scheduler, variate, arithmetic)
        if round_.compiled is not None:
            round_.compiled.compile_if_due(network, len(data.train))
        with seeded(self.device, derive_seed("dropout", *self._draws(task))):
            steps = self._run(round_, data.train)
        change = self._packed_change(round_.method.finish(self._state), network.layout, task)
        self._remember(network, task)
        return TrainResult(
            weights=network.flat.detach().cpu(),
            layout=network.layout,
            metrics=TrainMetrics.of_steps(steps, validation_loss=validated),
            steps=len(steps),
            variate_change=change,
        )

    def _draws(self, task: TrainTask) -> tuple[int | str, ...]:
        """What the draws of a round follow from."""
        return task.seed, self.client_id, task.interval, task.edge_round

    def _round(
        self,
        task: TrainTask,
        network: FlatUNet,
        scheduler: DDPMScheduler,
        variate: Tensor | None,
        arithmetic: Arithmetic,
    ) -> LocalRound:
        """What stays the same over the round's steps; ``network`` holds the received weights."""
        whose = f"{self.whose}, interval {task.interval}, round {task.edge_round}"
        return LocalRound(
            network=network,
            scheduler=scheduler,
            optimizer=self._optimizer(network, task.training),
            objective=self._objective,
            method=local_method(
                task.objective, task.training, network, self._state,
                variate=variate, client_id=self.client_id,
            ),
            training=task.training,
            # Built before the steps, so that a first sparse round draws what a later one would.
            penalty=network.penalty if task.sparsity_lambda else None,
            sparsity_lambda=task.sparsity_lambda,
            arithmetic=arithmetic,
            compiled=compiled_passes(network, arithmetic, task),
            rng=generator("train", *self._draws(task)),
            readings=Readings(whose, task.training, self.device),
        )  # fmt: skip

    def _packed_change(
        self, change: Tensor | None, layout: TensorLayout, task: TrainTask
    ) -> Tensor | None:
        """SCAFFOLD's change as it travels; this client's variate moves by what the server reads."""
        if change is None:
            return None
        codec = Codec(task.reply_codec, layout)
        packed = codec.pack(change)
        if not codec.is_exact:
            lost = codec.unpack(packed).sub_(change)
            self._state.vectors[VARIATE].add_(lost.to(self.device))
        return packed

    def _validated(
        self,
        network: FlatUNet,
        data: ImageSet | None,
        scheduler: DDPMScheduler,
        task: TrainTask,
        arithmetic: Arithmetic,
    ) -> float | None:
        """The loaded weights' loss on held out images; with the same draws in every round."""
        if data is None:
            return None
        check_images(data, network)
        rng, batch_size = generator("validate", task.seed, self.client_id), task.training.batch_size
        return validation_loss(network, data, scheduler, rng, arithmetic, batch_size=batch_size)

    def _remember(self, network: FlatUNet, task: TrainTask) -> None:
        """Store what the next round starts from, and forget what it starts afresh."""
        if task.parts != PARTS:
            self._state.vectors[OWN_WEIGHTS] = network.flat.detach().clone()
        if task.training.optimizer_state == "fresh":
            self._state.drop(*MOMENTS)

    def _run(self, round_: LocalRound, data: ImageSet) -> list[dict[str, float]]:
        """All steps of a round; their values by name."""
        round_.network.unet.train()
        compiled, whole, started_s = round_.compiled, 0, time.perf_counter()
        try:
            with contextlib.nullcontext() if compiled is None else compiled.running():
                for indices in batches(len(data), round_.training, round_.rng):
                    round_.step(data.subset(indices), self._steps)
                    self._steps += 1
                    whole += len(indices) == round_.training.batch_size
            read = round_.readings.read()
            if compiled is not None:
                # Not before they are read, which waits for what a GPU still has to do.
                compiled.trained((time.perf_counter() - started_s) * whole / len(read))
            return read
        except FedPhDError:
            # The moments have seen what is not finite, or half of a round.
            self._state.drop(*MOMENTS)
            raise

    @property
    def whose(self) -> str:
        """Whose state it is, for messages."""
        return f"client {self.client_id}"

    def state_dict(self) -> dict[str, Tensor | int | str]:
        """``steps`` and ``LocalState.state_dict``, for a process that ends after each round.

        These are JSON scalars, and vectors, (numel,), float32, on the CPU.
        """
        return {"steps": self._steps, **self._state.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``, or afresh if ``state`` is empty.

        Raises FedPhDError if it is malformed.
        """
        try:
            steps = int(state["steps"]) if state else 0
            local = LocalState.from_state(self.client_id, self.device, state)
        except (KeyError, TypeError, ValueError) as error:
            raise FedPhDError(
                f"the stored training state of client {self.client_id} is malformed ({error}); "
                "remove it to start afresh"
            ) from error
        self._steps, self._state = steps, local

    def _completed(self, network: FlatUNet, task: TrainTask, weights: Tensor) -> Tensor:
        """The received ``weights`` with this client's own parts, (numel,)."""
        if task.parts == PARTS:
            return weights
        own = self._state.vectors.get(OWN_WEIGHTS)
        if own is None:
            own = initial_weights(task, network.layout)
        return PartSubset(network.layout, task.parts).put(own, weights)

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


def initial_weights(task: TrainTask, layout: TensorLayout) -> Tensor:
    """The run's seeded initial weights, cut down to the network of ``layout``, (layout.numel,).

    Raises:
        ReplyError: the task does not say what the U-Net was, or the cut does not lead to it.
    """
    if task.initial is None:
        raise ReplyError(
            f"brings only the parts {', '.join(task.parts)}, and no initial U-Net for the others"
        )
    cut = Cut.from_json(task.cut) if task.cut else None
    # Before it is built: what it leads to has the size of what came.
    dense = layout_of_dense(task.initial)
    if problem := (cut.layout if cut else layout).mismatch(dense):
        raise ReplyError(f"its initial U-Net is another one: {problem}")
    initial = build_unet(task.initial, seed=task.seed).state_dict()
    weights = dense.pack(initial)
    return cut.apply_flat(weights, layout) if cut else weights


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators, which dropout draws from, and restore them afterwards."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.manual_seed(seed)
        yield


def check_images(data: ImageSet, network: FlatUNet) -> None:
    """Raise ConfigError unless the images are uint8 and of the U-Net's shape, and it knows theirs.

    That is, their classes, where it is class-conditional.
    """
    images, size = data.images, network.unet_config["image_size"]
    expected = (network.unet_config["channels"], size, size)
    if images.dtype != torch.uint8 or images.shape[1:] != expected or len(images) == 0:
        raise ConfigError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; the U-Net takes "
            f"torch.uint8 of shape (N, {', '.join(map(str, expected))}) with N >= 1: make "
            "model.image_size and model.channels fit the data"
        ).for_peers()
    no_label = network.unet.no_label
    if no_label is not None and int(data.labels.max()) >= no_label:
        raise ConfigError(
            f"the class-conditional U-Net knows {no_label} classes, the images have labels up to "
            f"{int(data.labels.max())}; set num_classes to at least {int(data.labels.max()) + 1}"
        ).for_peers()
