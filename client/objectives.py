"""What a client minimises locally, and what each federated method adds to it."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast, final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from torch.func import functional_call

from fedphd.client.flat_unet import FlatUNet
from fedphd.client.local_state import OWN_WEIGHTS, VARIATE, LocalState
from fedphd.common.config.run import ObjectiveConfig, TrainingConfig
from fedphd.common.errors import ReplyError
from fedphd.common.unet.model import PrunedUNet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Noised images of one optimiser step, on the device that trains.

    Attributes:
        noisy: images after t steps of the forward process, (B, C, H, W), float32.
        timesteps: t of each image, (B,), int64, in [0, T).
        noise: the Gaussian noise in them, (B, C, H, W), float32.
        labels: classes that a class-conditional network is told, (B,), int64; else None.
    """

    noisy: Tensor
    timesteps: Tensor
    noise: Tensor
    labels: Tensor | None = None


class Objective(ABC):
    """The local loss that every federated method starts from."""

    @abstractmethod
    def loss(self, unet: PrunedUNet, batch: Batch) -> Tensor:
        """The loss of one step: a differentiable float32 scalar, a mean over the batch."""


@final
class EpsilonObjective(Objective):
    """Mean squared error of the predicted noise (Eq. 14 of DDPM, arXiv:2006.11239)."""

    def loss(self, unet: PrunedUNet, batch: Batch) -> Tensor:
        predicted = unet(batch.noisy, batch.timesteps, batch.labels, return_dict=False)[0]
        return F.mse_loss(predicted.float(), batch.noise)


# The objective's loss, and a differentiable scalar that is added to it, if any.
Losses = tuple[Tensor, Tensor | None]


class LocalMethod(ABC):
    """A federated method's part in one round of a client.

    A round calls ``losses``, ``correct`` and ``observe`` once per step, then ``finish``.
    """

    @abstractmethod
    def losses(self, objective: Objective, unet: PrunedUNet, batch: Batch) -> Losses:
        """The objective's loss, and what the method adds to it before the backward pass."""

    @abstractmethod
    def correct(self, gradient: Tensor) -> Tensor | None:
        """Change ``gradient``, (numel,), in place, before it is clipped.

        Returns:
            What that adds to the loss, a scalar; None where it is not the gradient of a loss.
        """

    @abstractmethod
    def observe(self, gradient: Tensor) -> None:
        """See ``gradient``, (numel,), after clipping, as the optimiser gets it."""

    @abstractmethod
    def finish(self, state: LocalState) -> Tensor | None:
        """Put into ``state`` what the next round needs, once all steps have succeeded.

        Returns:
            What goes back beside the weights, (numel,), float32, on the CPU, if anything.
        """


@final
class FedAvg(LocalMethod):
    """FedAvg (arXiv:1602.05629): adds nothing."""

    def losses(self, objective: Objective, unet: PrunedUNet, batch: Batch) -> Losses:
        return objective.loss(unet, batch), None

    def correct(self, gradient: Tensor) -> None:
        pass

    def observe(self, gradient: Tensor) -> None:
        pass

    def finish(self, state: LocalState) -> None:
        pass


@final
class FedProx(LocalMethod):
    """FedProx (arXiv:1812.06127, Eq. 2): adds mu / 2 * ||w - w_received||^2 to the loss.

    ``network`` holds the received weights.
    """

    def __init__(self, network: FlatUNet, mu: float) -> None:
        self._weights = network.flat.detach()
        self._received = self._weights.clone()
        self._mu = mu

    def losses(self, objective: Objective, unet: PrunedUNet, batch: Batch) -> Losses:
        return objective.loss(unet, batch), None

    def correct(self, gradient: Tensor) -> Tensor:
        """Add mu * (w - w_received), the term's gradient; returns the term."""
        distance = self._weights - self._received
        gradient.add_(distance, alpha=self._mu)
        # Eq. 2: mu / 2 * ||w - w_received||^2
        return self._mu / 2 * distance.square().sum().double()

    def observe(self, gradient: Tensor) -> None:
        pass

    def finish(self, state: LocalState) -> None:
        pass


@final
class Moon(LocalMethod):
    """MOON (arXiv:2103.16257, Eq. 3) for a U-Net: z is the middle block's output.

    The representation of a batch under the trained weights is drawn to that under the received
    ones and pushed from that under the weights this client had after its last round, mu times
    ``contrastive_loss``. Only the trained weights get a gradient. The other two run without
    dropout. In a client's first round there is no previous model, and so no term.

    ``network`` holds the received weights; ``previous`` are this client's after its last round,
    (numel,), float32; None: none yet.
    """

    def __init__(
        self, network: FlatUNet, previous: Tensor | None, *, mu: float, temperature: float
    ) -> None:
        self._network = network
        self._received = network.flat.detach().clone()
        self._previous = previous
        self._mu = mu
        self._temperature = temperature

    def losses(self, objective: Objective, unet: PrunedUNet, batch: Batch) -> Losses:
        """The loss, and mu times the contrast of the same forward pass."""
        if self._previous is None:
            return objective.loss(unet, batch), None
        received = self._frozen(batch, self._received)
        previous = self._frozen(batch, self._previous)
        with output_of(middle_block(unet)) as caught:
            loss = objective.loss(unet, batch)
        [current] = caught
        contrast = contrastive_loss(
            current.flatten(1), received, previous, temperature=self._temperature
        )
        return loss, self._mu * contrast

    @torch.no_grad()
    def _frozen(self, batch: Batch, flat: Tensor) -> Tensor:
        """z of ``batch`` under the weights ``flat``, (B, D), without gradient or dropout."""
        weights = self._network.layout.unpack(flat)
        tensors = {f"unet.{name}": tensor for name, tensor in weights.items()}
        self._network.unet.eval()
        try:
            return cast(Tensor, functional_call(_Trunk(self._network.unet), tensors, (batch,)))
        finally:
            self._network.unet.train()

    def correct(self, gradient: Tensor) -> None:
        pass

    def observe(self, gradient: Tensor) -> None:
        pass

    def finish(self, state: LocalState) -> None:
        """Keep the trained weights as the next round's previous model."""
        state.vectors[OWN_WEIGHTS] = self._network.flat.detach().clone()


def contrastive_loss(
    z: Tensor, received: Tensor, previous: Tensor, *, temperature: float
) -> Tensor:
    """MOON's model-contrastive loss (Eq. 3 of arXiv:2103.16257), a mean over the batch.

    ``-log(exp(s_r / T) / (exp(s_r / T) + exp(s_p / T)))`` with cosine similarities s_r of z and
    ``received`` and s_p of z and ``previous``, all (B, D), and T the ``temperature``; written as
    softplus((s_p - s_r) / T), which does not overflow.
    """
    near = F.cosine_similarity(z.float(), received.float(), dim=1)
    far = F.cosine_similarity(z.float(), previous.float(), dim=1)
    return F.softplus((far - near) / temperature).mean()


class _Trunk(nn.Module):
    """The U-Net up to its middle block: batch -> z, (B, D)."""

    def __init__(self, unet: PrunedUNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, batch: Batch) -> Tensor:
        unet = self.unet
        embedded = unet.time_embedding(unet.time_proj(batch.timesteps).to(batch.noisy.dtype))
        if batch.labels is not None:
            embedded = embedded + unet.class_embedding(batch.labels)
        hidden = unet.conv_in(batch.noisy)
        for block in unet.down_blocks:
            hidden, _ = block(hidden_states=hidden, temb=embedded)
        return cast(Tensor, middle_block(unet)(hidden, embedded)).flatten(1)


def middle_block(unet: PrunedUNet) -> nn.Module:
    """The block between encoder and decoder; diffusers' type allows for none, ours has one."""
    return cast(nn.Module, unet.mid_block)


@contextmanager
def output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of ``module`` while the block runs."""
    caught: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


@final
class Scaffold(LocalMethod):
    """SCAFFOLD (arXiv:1910.06378, Alg. 1, option II) with one control variate c_i per client.

    Each step's gradient g becomes g - c_i + c before it is clipped. After the round
    c_i+ = c_i - c + m, with m the mean of the corrected gradients as the optimiser got them.
    Under SGD at a constant learning rate lr, without weight decay, the K steps moved the weights
    by x - y = K * lr * m: this is option II's c_i - c + (x - y) / (K * lr). Under Adam or a
    changing rate (x - y) / (K * lr) would be no gradient any more; m still is, so the variates
    keep their meaning (c_i: the client's mean gradient; c: that of all clients). But the
    correction then passes through Adam's moments, for which the paper proves nothing.

    If the reply is lost on its way, c_i has moved and c has not.

    ``own`` is c_i, on the network's device, and ``server`` is c, both (numel,), float32.
    """

    def __init__(self, network: FlatUNet, own: Tensor, server: Tensor) -> None:
        self._correction = server.to(network.flat.device) - own
        self._own = own
        self._sum = torch.zeros_like(own)
        self._steps = 0

    def losses(self, objective: Objective, unet: PrunedUNet, batch: Batch) -> Losses:
        return objective.loss(unet, batch), None

    def correct(self, gradient: Tensor) -> None:
        """Add c - c_i, which is not the gradient of any loss."""
        gradient.add_(self._correction)

    def observe(self, gradient: Tensor) -> None:
        """Add up what the optimiser gets."""
        self._sum.add_(gradient)
        self._steps += 1

    def finish(self, state: LocalState) -> Tensor:
        """Keep c_i+; returns c_i+ - c_i."""
        # c_i+ = c_i - c + m
        change = self._sum / self._steps - self._correction - self._own
        state.vectors[VARIATE] = self._own + change
        return change.to("cpu", copy=True)


def local_method(
    config: ObjectiveConfig,
    training: TrainingConfig,
    network: FlatUNet,
    state: LocalState,
    *,
    variate: Tensor | None,
    client_id: str,
) -> LocalMethod:
    """The method of ``config`` for one round, in which ``network`` holds the received weights.

    ``variate`` is SCAFFOLD's server variate c, (numel,), float32; without one, that method raises
    ReplyError.
    """
    match config.method:
        case "fedavg":
            return FedAvg()
        case "fedprox":
            return FedProx(network, config.proximal_mu)
        case "moon":
            previous = state.vectors.get(OWN_WEIGHTS)
            if previous is None:
                logger.info(
                    "client %s has no previous local model yet, so MOON's term is 0 in this round",
                    client_id,
                )
            return Moon(network, previous, mu=config.moon_mu, temperature=config.moon_temperature)
        case "scaffold":
            if variate is None:
                raise ReplyError("carries no control variate")
            if VARIATE not in state.vectors and training.optimizer != "sgd":
                logger.info(
                    "client %s: SCAFFOLD is derived for sgd; with %s its variates are mean "
                    "gradients, and correct the gradient before the optimiser's moments",
                    client_id, training.optimizer,
                )  # fmt: skip
            return Scaffold(network, state.vector(VARIATE, network.flat.detach()), variate)
