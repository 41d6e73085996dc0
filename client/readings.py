"""What a round's steps measure, without making a GPU wait for each of them."""

import math

import torch
from torch import Tensor

from fedphd.common.config.run import TrainingConfig
from fedphd.common.errors import FedPhDError


class Readings:
    """The values of a round's steps, by the names of ``TrainMetrics``' fields.

    On a GPU they stay there until ``read``: asking for one waits for everything that the GPU was
    told to do, and leaves it idle until it is told more. On a CPU asking costs nothing, so a step
    whose loss is not finite ends the round before the optimiser takes it.

    ``name`` says whose round it is, for messages.
    """

    def __init__(self, name: str, training: TrainingConfig, device: torch.device) -> None:
        self._name, self._training = name, training
        self._at_once = device.type == "cpu"
        self._names: tuple[str, ...] = ()
        self._steps: list[Tensor] = []

    def add(self, **values: Tensor) -> None:
        """Take the next step's values, scalars; they have the same names in every step.

        Raises:
            FedPhDError: one is not finite, on a CPU; names round and step.
        """
        self._names = tuple(values)
        self._steps.append(torch.stack([value.detach().double() for value in values.values()]))
        if self._at_once:
            self._check(len(self._steps), self._steps[-1].tolist())

    def read(self) -> list[dict[str, float]]:
        """The values of all steps; raises as ``add``, on every device."""
        if not self._steps:
            return []
        rows = torch.stack(self._steps).tolist()
        for number, row in enumerate(rows, start=1):
            self._check(number, row)
        return [dict(zip(self._names, row, strict=True)) for row in rows]

    def _check(self, number: int, row: list[float]) -> None:
        if all(map(math.isfinite, row)):
            return
        of = dict(zip(self._names, row, strict=True))
        raise FedPhDError(
            f"{self._name}, step {number}: the loss is {of['loss']:g}, its gradient's norm "
            f"{of['gradient_norm']:g}; lower training.learning_rate (now "
            f"{self._training.learning_rate:g}) or raise training.warmup_steps (now "
            f"{self._training.warmup_steps})"
        ).for_peers()
