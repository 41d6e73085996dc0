"""Names and shapes of a state dict, and its form as one flat float32 vector.

Weights travel as one vector: one array per message instead of hundreds, and averages of networks
are sums of vectors. The layout travels beside them, so that nothing is unpickled.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from fedphd.common.errors import FedPhDError

_PAIRS = TypeAdapter(list[tuple[str, tuple[NonNegativeInt, ...]]])


@dataclass(frozen=True)
class TensorLayout:
    """The tensors of a flat weight vector, in the order of the state dict."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Self:
        """The layout of ``state``; raises FedPhDError for a tensor that is not float32."""
        for name, tensor in state.items():
            if tensor.dtype != torch.float32:
                raise FedPhDError(f"tensor {name} is {tensor.dtype}; weights travel as float32")
        return cls(tuple(state), tuple(tuple(tensor.shape) for tensor in state.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values per tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def numel(self) -> int:
        """Values of all tensors together."""
        return sum(self.sizes)

    def pack(self, state: Mapping[str, Tensor]) -> Tensor:
        """Copy ``state`` to one vector, (numel,), float32; raises FedPhDError if it differs."""
        if problem := self.mismatch(TensorLayout.of(state)):
            raise FedPhDError(problem)
        with torch.no_grad():
            return torch.cat([state[name].detach().reshape(-1) for name in self.names])

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of ``flat``, (numel,), by name; raises FedPhDError if the size differs."""
        if flat.shape != (self.numel,):
            raise FedPhDError(f"weights have shape {tuple(flat.shape)}; expected ({self.numel},)")
        parts = zip(self.names, torch.split(flat, list(self.sizes)), self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def mismatch(self, other: "TensorLayout") -> str | None:
        """Name the first tensor in which ``other`` differs: expected and got; None if it fits."""
        if self == other:
            return None
        got = dict(zip(other.names, other.shapes, strict=True))
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in got:
                return f"tensor {name} is missing; expected shape {shape}"
            if got[name] != shape:
                return f"tensor {name} has shape {got[name]}; expected {shape}"
        extra = [name for name in other.names if name not in self.names]
        return f"tensor {extra[0]} is unexpected" if extra else "tensors are in another order"

    def first_non_finite(self, flat: Tensor) -> str | None:
        """Name the first tensor of ``flat``, (numel,), with NaN or infinity; None if none has."""
        # A sum is finite only if all values are, or if they overflow; only then look closer.
        if torch.isfinite(flat.sum()):
            return None
        bad = torch.nonzero(~torch.isfinite(flat))
        if not len(bad):
            return None
        position = int(bad[0])
        ends = zip(self.names, accumulate(self.sizes), strict=True)
        name = next(name for name, end in ends if position < end)
        return f"tensor {name} holds {flat[position].item()}"

    def to_json(self) -> str:
        """As JSON text: a list of [name, shape]."""
        pairs = list(zip(self.names, self.shapes, strict=True))
        return json.dumps(pairs, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read ``to_json``'s text; raises ValueError if it is malformed."""
        try:
            pairs = _PAIRS.validate_json(text, strict=True)
        except ValidationError as error:
            raise ValueError("expected a list of [name, [size, ...]]") from error
        return cls.of_pairs(pairs)

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[str, tuple[int, ...]]]) -> Self:
        """The layout of tensors by name and shape; raises ValueError if a name comes twice."""
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a tensor is named twice")
        return cls(tuple(name for name, _ in pairs), tuple(shape for _, shape in pairs))
