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
        return sum(_num_bytes(self._name_of(shape), _numel(shape)) for shape in self.layout.shapes)

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
        return self.encode(flat if base is None else flat - base)

    def unpack(self, came: Tensor, base: Tensor | None = None, what: str = "weights") -> Tensor:
        """What ``pack`` made, as (layout.numel,), float32, on top of the receiver's ``base``.

        Raises:
            ReplyError: ``came`` has another length; names ``what`` it is.
        """
        if self.is_exact:
            return came
        decoded = self.decode(came, what)
        return decoded if base is None else decoded.add_(base)

    def encode(self, flat: Tensor) -> Tensor:
        """Write ``flat``, (layout.numel,), float32, as (num_bytes,), uint8."""
        encoded = torch.empty(self.num_bytes, dtype=torch.uint8)
        for name, place, values in self._tensors(encoded, flat):
            _encode(name, values, place)
        return encoded

    def decode(self, encoded: Tensor, what: str = "weights") -> Tensor:
        """Read what ``encode`` wrote, (num_bytes,), uint8, as (layout.numel,), float32.

        Raises:
            ReplyError: another number of bytes; names ``what`` it is.
        """
        if encoded.numel() != (expected := self.num_bytes):
            raise ReplyError(
                f"{what}: {self.layout.numel} values take {expected} bytes as {self.name}; "
                f"got {encoded.numel()}"
            )
        flat = torch.empty(self.layout.numel)
        for name, place, values in self._tensors(encoded, flat):
            _decode(name, place, values)
        return flat

    def _tensors(self, encoded: Tensor, flat: Tensor) -> Iterator[tuple[CodecName, Tensor, Tensor]]:
        """Of each tensor: how it is written, its place in ``encoded``, its values in ``flat``."""
        begin = at = 0
        for shape in self.layout.shapes:
            name, numel = self._name_of(shape), _numel(shape)
            size = _num_bytes(name, numel)
            yield name, encoded[at : at + size], flat[begin : begin + numel]
            begin, at = begin + numel, at + size

    def _name_of(self, shape: tuple[int, ...]) -> CodecName:
        return "fp32" if self.name in _STEPS and len(shape) < 2 else self.name


def digest_of(flat: Tensor) -> str:
    """The SHA-256 of weights, (numel,), on the CPU: two processes hold the same ones, or do not."""
    return hashlib.sha256(flat.contiguous().numpy().data).hexdigest()


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _num_bytes(name: CodecName, numel: int) -> int:
    if name in _STEPS:
        # The steps come first. An odd number of half bytes takes a whole one more.
        return 4 * _num_blocks(numel) + (numel if name == "int8" else -(-numel // 2))
    return numel * {"fp32": 4, "bf16": 2}[name]


def _num_blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _encode(name: CodecName, values: Tensor, place: Tensor) -> None:
    if name not in _STEPS:
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        place.copy_(values.to(dtype).view(torch.uint8))
        return
    num_steps = 4 * _num_blocks(len(values))
    steps, whole = place[:num_steps], place[num_steps:]
    for begin in range(0, len(values), _CHUNK):
        part = values[begin : begin + _CHUNK]
        blocks = _blocks(part)
        step = torch.linalg.vector_norm(blocks, float("inf"), dim=1) / _STEPS[name]
        inverse = torch.where(step > _LEAST_STEP, 1 / step, 0.0)
        rounded = (blocks * inverse[:, None]).round_().to(torch.int8).view(-1)[: len(part)]
        at = 4 * (begin // BLOCK)
        steps[at : at + 4 * len(step)] = step.view(torch.uint8)
        if name == "int8":
            whole[begin : begin + len(part)] = rounded.view(torch.uint8)
        else:
            pairs = _pairs(rounded)
            whole[begin // 2 : begin // 2 + len(pairs)] = pairs


def _decode(name: CodecName, place: Tensor, values: Tensor) -> None:
    if name not in _STEPS:
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        # Views of a wider type need an aligned beginning.
        values.copy_(place.clone().view(dtype))
        return
    num_steps = 4 * _num_blocks(len(values))
    steps, whole = place[:num_steps].clone().view(torch.float32), place[num_steps:]
    for begin in range(0, len(values), _CHUNK):
        part = values[begin : begin + _CHUNK]
        if name == "int8":
            rounded = whole[begin : begin + len(part)].view(torch.int8)
        else:
            rounded = _unpaired(whole[begin // 2 : -(-(begin + len(part)) // 2)])[: len(part)]
        step = steps[begin // BLOCK : _num_blocks(begin + len(part))]
        part.copy_((_blocks(rounded.float()) * step[:, None]).view(-1)[: len(part)])


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
