"""How flat weights are written in fewer bytes than four a value, and read again.

``bf16`` keeps the upper half of each value. ``int8`` and ``int4`` are symmetric quantisation: of
each block of 256 values the largest magnitude, divided by 127 or by 7, is the block's step, and
values are rounded to whole steps. Blocks lie within one tensor; biases and the weights of norms,
which are few and unlike one another, stay float32.

Values are rounded to nearest, so that the same weights give the same bytes everywhere.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from fedphd.common.config.wire import CodecName
from fedphd.common.errors import ReplyError
from fedphd.common.unet.layout import TensorLayout

BLOCK: Final = 256
_STEPS: Final = {"int8": 127, "int4": 7}
_BITS: Final = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
_PLAIN: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Values that are worked on at a time, which fit into a processor's cache.
_CHUNK: Final = BLOCK * 2048
# Below it the reciprocal of a step would be infinite.
_LEAST_STEP: Final = 1e-37


@dataclass(frozen=True)
class Codec:
    """Writes weights of ``layout`` as bytes, and reads them."""

    name: CodecName
    layout: TensorLayout

    @property
    def is_exact(self) -> bool:
        """Whether what is read is what was written."""
        return self.name == "fp32"

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights together."""
        pairs = zip(self.layout.shapes, self.layout.sizes, strict=True)
        return sum(_num_bytes(self._name_of(shape), numel) for shape, numel in pairs)

    @property
    def dtype(self) -> Literal["float32", "uint8"]:
        """Of what ``pack`` gives."""
        return "float32" if self.is_exact else "uint8"

    def pack(self, flat: Tensor, base: Tensor | None = None) -> Tensor:
        """What travels for ``flat``, (layout.numel,), float32.

        That is ``flat`` itself where the codec is exact; else, encoded, its difference to
        ``base``, which the receiver has too, or ``flat`` if there is none.
        """
        if self.is_exact:
            return flat
        return self.encode(flat, base)

    def unpack(self, came: Tensor, base: Tensor | None = None, what: str = "weights") -> Tensor:
        """What ``pack`` made, as (layout.numel,), float32, on top of the receiver's ``base``.

        Raises:
            ReplyError: ``came`` has another length; names ``what`` it is.
        """
        if self.is_exact:
            return came
        return self.decode(came, base, what)

    def encode(self, flat: Tensor, base: Tensor | None = None) -> Tensor:
        """Write ``flat``, less ``base``, (layout.numel,), float32, as (num_bytes,), uint8."""
        encoded = torch.empty(self.num_bytes, dtype=torch.uint8)
        for name, steps, place, where in self._chunks(encoded):
            _encode(name, flat[where] if base is None else flat[where] - base[where], steps, place)
        return encoded

    def decode(self, encoded: Tensor, base: Tensor | None = None, what: str = "weights") -> Tensor:
        """Read what ``encode`` wrote, (num_bytes,), uint8, as (layout.numel,), float32.

        ``base`` is added to it.

        Raises:
            ReplyError: another number of bytes; names ``what`` it is.
        """
        if encoded.numel() != (expected := self.num_bytes):
            raise ReplyError(
                f"{what}: {self.layout.numel} values take {expected} bytes as {self.name}; "
                f"got {encoded.numel()}"
            )
        flat = torch.empty(self.layout.numel)
        for name, steps, place, where in self._chunks(encoded):
            _decode(name, steps, place, flat[where])
            if base is not None:
                flat[where].add_(base[where])
        return flat

    def _chunks(self, encoded: Tensor) -> Iterator[tuple[CodecName, Tensor, Tensor, slice]]:
        """Of some values of one tensor at a time, as many as fit into a processor's cache.

        How they are written, the places of their steps and of themselves in ``encoded``, and where
        they are in the flat weights.
        """
        begin = at = 0
        for shape, numel in zip(self.layout.shapes, self.layout.sizes, strict=True):
            name = self._name_of(shape)
            # The steps of a tensor come before its values.
            values_at = at + _step_bytes(name, numel)
            for first in range(0, numel, _CHUNK):
                last = min(first + _CHUNK, numel)
                yield (
                    name,
                    encoded[at + _step_bytes(name, first) : at + _step_bytes(name, last)],
                    encoded[values_at:][_value_bytes(name, first) : _value_bytes(name, last)],
                    slice(begin + first, begin + last),
                )
            begin, at = begin + numel, at + _num_bytes(name, numel)

    def _name_of(self, shape: tuple[int, ...]) -> CodecName:
        return "fp32" if self.name in _STEPS and len(shape) < 2 else self.name


def digest_of(flat: Tensor) -> str:
    """The SHA-256 of weights, (numel,), on the CPU: two processes hold the same ones, or do not."""
    return hashlib.sha256(flat.contiguous().numpy().data).hexdigest()


def _num_bytes(name: CodecName, numel: int) -> int:
    return _step_bytes(name, numel) + _value_bytes(name, numel)


def _step_bytes(name: CodecName, numel: int) -> int:
    return 4 * -(-numel // BLOCK) if name in _STEPS else 0


def _value_bytes(name: CodecName, numel: int) -> int:
    # An odd number of half bytes takes a whole one more.
    return -(-numel * _BITS[name] // 8)


def _encode(name: CodecName, values: Tensor, steps: Tensor, place: Tensor) -> None:
    if name not in _STEPS:
        place.copy_(values.to(_PLAIN[name]).view(torch.uint8))
        return
    blocks = _blocks(values)
    # What the maximum norm gives, in a tenth of its time.
    step = torch.maximum(blocks.amax(1), -blocks.amin(1)) / _STEPS[name]
    inverse = torch.where(step > _LEAST_STEP, 1 / step, 0.0)
    rounded = (blocks * inverse[:, None]).round_().to(torch.int8).view(-1)[: len(values)]
    steps.copy_(step.view(torch.uint8))
    place.copy_(rounded.view(torch.uint8) if name == "int8" else _pairs(rounded))


def _decode(name: CodecName, steps: Tensor, place: Tensor, values: Tensor) -> None:
    # Views of a wider type need an aligned beginning, which a copy has.
    if name not in _STEPS:
        values.copy_(place.clone().view(_PLAIN[name]))
        return
    rounded = place.view(torch.int8) if name == "int8" else _unpaired(place)[: len(values)]
    step = steps.clone().view(torch.float32)
    values.copy_((_blocks(rounded.float()) * step[:, None]).view(-1)[: len(values)])


def _blocks(values: Tensor) -> Tensor:
    """As rows of a block each, the last one filled up with zeros."""
    if missing := -len(values) % BLOCK:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.view(-1, BLOCK)


def _pairs(rounded: Tensor) -> Tensor:
    """Two values of -8 to 7 in a byte, the first one in its lower half."""
    if len(rounded) % 2:
        rounded = torch.nn.functional.pad(rounded, (0, 1))
    lower, upper = (rounded + 8).view(torch.uint8).view(-1, 2).unbind(1)
    return lower | (upper << 4)


def _unpaired(pairs: Tensor) -> Tensor:
    return (torch.stack((pairs & 15, pairs >> 4), dim=1).view(-1)).view(torch.int8) - 8
