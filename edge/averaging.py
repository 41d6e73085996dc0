"""What an edge adds up over the replies of a round, one reply at a time."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fedphd.common.robust import can_trim, trimmed_mean
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.parts import Part, PartSubset


class Average(Protocol):
    """What replies are put into, one at a time."""

    def add(self, weights: torch.Tensor, weight: float) -> None:
        """Take ``weights``, shape (numel,), float32, of ``weight`` images."""

    def mean(self) -> torch.Tensor | None:
        """The average, shape (numel,); None if nothing was added. Asked once."""


class WeightedSum:
    """A running weighted mean of flat weights, in the memory of one model."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._weight = 0.0

    def add(self, weights: torch.Tensor, weight: float) -> None:
        """Add ``weights``, shape (numel,), float32, ``weight`` times."""
        if self._sum is None:
            self._sum = torch.zeros_like(weights)
        self._sum.add_(weights, alpha=weight)
        self._weight += weight

    def mean(self) -> torch.Tensor | None:
        """The weighted mean, shape (numel,); None if nothing was added. The next sum begins."""
        total, weight = self._sum, self._weight
        self._sum, self._weight = None, 0.0
        # In the sum's own memory: a network may be large.
        return None if total is None else total.div_(weight)


class TrimmedMean:
    """``trimmed_mean`` of flat weights; keeps all of them in memory until ``mean``.

    Where too few came for anything to be left, it is the mean by images, as a ``WeightedSum``.
    """

    def __init__(self, trim: float) -> None:
        self._trim = trim
        self._came: list[tuple[torch.Tensor, float]] = []

    def add(self, weights: torch.Tensor, weight: float) -> None:
        """Keep ``weights``, shape (numel,), float32."""
        self._came.append((weights, weight))

    def mean(self) -> torch.Tensor | None:
        """The trimmed mean, shape (numel,); None if nothing was added."""
        if can_trim(len(self._came), self._trim):
            return trimmed_mean([weights for weights, _ in self._came], self._trim)
        total = WeightedSum()
        for weights, weight in self._came:
            total.add(weights, weight)
        return total.mean()


class PartAverage:
    """The average of each part set over those who sent it.

    ``layout`` is that of the weights that the ``part_sets`` make up together; ``average`` makes
    what takes the replies of one of them. By default that is a mean by images, in the memory of
    one model.
    """

    def __init__(
        self,
        layout: TensorLayout,
        part_sets: Sequence[tuple[Part, ...]],
        average: Callable[[], Average] = WeightedSum,
    ) -> None:
        self.selections = [PartSubset(layout, parts) for parts in part_sets]
        self._sums = [average() for _ in part_sets]

    def add(self, part_set: int, weights: torch.Tensor, weight: float) -> None:
        """Add a reply's ``weights`` of one part set, float32, ``weight`` times."""
        self._sums[part_set].add(weights, weight)

    def applied_to(self, weights: torch.Tensor) -> tuple[torch.Tensor, set[int]]:
        """The means in their places in ``weights``, (layout.numel,), float32.

        A part set that nobody sent stays as it is; the others' numbers are returned, too. Asked
        once, at the end.
        """
        means = [sum_.mean() for sum_ in self._sums]
        for selection, mean in zip(self.selections, means, strict=True):
            weights = weights if mean is None else selection.put(weights, mean)
        return weights, {number for number, mean in enumerate(means) if mean is not None}


class ServerVariate:
    """SCAFFOLD's server variate c at an edge (arXiv:1910.06378, Alg. 1, line 17).

    Each edge round adds (1 / N) * sum of (c_i+ - c_i) over its clients, N (``num_clients``) being
    all clients of the federation. The cloud starts all edges with its c, ``start``, (numel,),
    float32, and adds their total changes.
    """

    def __init__(self, start: torch.Tensor, num_clients: int) -> None:
        self.change = torch.zeros_like(start)
        self._start = start
        self._num_clients = num_clients

    @property
    def current(self) -> torch.Tensor:
        """c with all changes so far, (numel,), float32."""
        return self._start + self.change

    def add(self, change: torch.Tensor) -> None:
        """Count a client's c_i+ - c_i, (numel,), float32, from the next edge round on."""
        self.change.add_(change, alpha=1 / self._num_clients)
