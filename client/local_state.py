"""What a client remembers between rounds: flat vectors that are pruned with the network."""

import logging
from collections.abc import Mapping
from typing import Any, Final, Self

import torch

from fedphd.common.errors import FedPhDError
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout

logger = logging.getLogger(__name__)

# Adam's first and second moments.
MOMENTS: Final = ("exp_avg", "exp_avg_sq")
# This client's weights at the end of its last round: MOON's previous model, FedDiffuse's own parts.
OWN_WEIGHTS: Final = "own_weights"
# SCAFFOLD's control variate of this client, c_i.
VARIATE: Final = "variate"

_KINDS: Final = {
    "optimiser moments": MOMENTS,
    "own weights": (OWN_WEIGHTS,),
    "control variate": (VARIATE,),
}
# How each follows a weight that the cut scales, as the power of its factor.
_POWERS: Final = {"exp_avg": -1, "exp_avg_sq": -2, OWN_WEIGHTS: 1, VARIATE: -1}


class LocalState:
    """Flat vectors by name, all for weights of one layout, and Adam's step counter.

    Attributes:
        vectors: each (numel,), float32, on the device.
        moment_steps: optimiser steps that the moments have seen, scalar, float32.
    """

    def __init__(self, client_id: str, device: torch.device) -> None:
        self.vectors: dict[str, torch.Tensor] = {}
        self.moment_steps = torch.zeros((), dtype=torch.float32, device=device)
        self._client_id = client_id
        self._device = device
        self._layout: TensorLayout | None = None

    def fit(self, layout: TensorLayout, cut: Cut | None, *, prune_moments: bool) -> None:
        """Bring everything to the trained network's ``layout``: cut where possible, else dropped.

        ``cut`` is how the network was pruned since this client's last round, if it was; without
        ``prune_moments`` the moments are dropped.
        """
        before, self._layout = self._layout, layout
        if before is None or before == layout:
            return
        for kind, names in _KINDS.items():
            held = [name for name in names if name in self.vectors]
            if held:
                usable = cut if prune_moments or names != MOMENTS else None
                outcome = self._follow(held, layout, usable)
                logger.info(
                    "client %s: the network changed from %d to %d weights; %s %s",
                    self._client_id, before.numel, layout.numel, kind, outcome,
                )  # fmt: skip

    def _follow(self, names: list[str], layout: TensorLayout, cut: Cut | None) -> str:
        """Cut the vectors, or drop them where that is impossible; returns what was done."""
        if cut is None:
            self.drop(*names)
            return "reset (no cut to follow)"
        try:
            self.vectors |= {
                name: cut.apply_flat(self.vectors[name], layout, power=_POWERS[name])
                for name in names
            }
        except (FedPhDError, ValueError) as error:
            self.drop(*names)
            return f"reset ({error})"
        return "cut"

    def drop(self, *names: str) -> None:
        """Forget vectors; with the moments also the steps that they have seen."""
        for name in names:
            self.vectors.pop(name, None)
        if not set(MOMENTS) & set(self.vectors):
            self.moment_steps = torch.zeros_like(self.moment_steps)

    def vector(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The vector of that name; zeros of the shape of ``like``, (numel,), if there is none."""
        if name not in self.vectors:
            self.vectors[name] = torch.zeros_like(like)
        return self.vectors[name]

    def state_dict(self) -> dict[str, torch.Tensor | int | str]:
        """``layout`` (JSON text) and each vector, on the CPU; ``moment_steps`` with the moments."""
        if not self.vectors or self._layout is None:
            return {}
        state: dict[str, torch.Tensor | int | str] = {"layout": self._layout.to_json()}
        if set(MOMENTS) <= set(self.vectors):
            state["moment_steps"] = int(self.moment_steps)
        return state | {name: vector.to("cpu", copy=True) for name, vector in self.vectors.items()}

    @classmethod
    def from_state(cls, client_id: str, device: torch.device, state: Mapping[str, Any]) -> Self:
        """Read ``state_dict()``; raises KeyError, TypeError or ValueError if it is malformed."""
        local = cls(client_id, device)
        if "layout" not in state:
            return local
        local._layout = TensorLayout.from_json(state["layout"])
        needed = MOMENTS if "moment_steps" in state else ()
        for name in (name for names in _KINDS.values() for name in names):
            if name in state or name in needed:
                local.vectors[name] = local._read(name, state[name])
        if set(MOMENTS) & set(local.vectors):
            steps = float(state["moment_steps"])
            local.moment_steps = torch.tensor(steps, dtype=torch.float32, device=device)
        return local

    def _read(self, name: str, value: Any) -> torch.Tensor:
        assert self._layout is not None
        flat, numel = torch.as_tensor(value), self._layout.numel
        if flat.dtype != torch.float32 or flat.shape != (numel,):
            raise ValueError(
                f"{name} is {flat.dtype} of shape {tuple(flat.shape)}; expected torch.float32 "
                f"of shape ({numel},)"
            )
        return flat.to(self._device, copy=True)
