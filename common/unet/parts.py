"""The parts of the U-Net that FedDiffuse (arXiv:2406.12575) exchanges or leaves at the clients.

Encoder: ``conv_in``, the embeddings of time and class, and the down blocks. Bottleneck: the middle
block. Decoder: the up blocks, ``conv_norm_out`` and ``conv_out``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import torch

from fedphd.common.errors import ReplyError
from fedphd.common.unet.layout import TensorLayout

Part = Literal["encoder", "bottleneck", "decoder"]
PARTS: Final[tuple[Part, ...]] = ("encoder", "bottleneck", "decoder")

_MODULES: Final[dict[Part, tuple[str, ...]]] = {
    "encoder": ("conv_in", "time_embedding", "class_embedding", "down_blocks"),
    "bottleneck": ("mid_block",),
    "decoder": ("up_blocks", "conv_norm_out", "conv_out"),
}
_PART_SETS: Final[dict[str, tuple[tuple[Part, ...], ...]]] = {
    "full": (PARTS,),
    "usplit": (("encoder",), ("bottleneck", "decoder")),
    "ulatdec": (("bottleneck", "decoder"),),
    "udec": (("decoder",),),
}


def part_sets(exchange: str) -> tuple[tuple[Part, ...], ...]:
    """The sets of parts that are averaged together, for ``exchange.parts``.

    All sets travel down. A client sends back one of them; where there are several, they are
    assigned in turn.
    """
    return _PART_SETS[exchange]


def joined(sets: Iterable[Iterable[Part]]) -> tuple[Part, ...]:
    """The parts of all ``sets``, in the order of the network."""
    named = {part for parts in sets for part in parts}
    return tuple(part for part in PARTS if part in named)


@dataclass(frozen=True)
class PartSubset:
    """The tensors of some parts within weights of ``layout``: a whole U-Net, or what travels of it.

    All three parts select every tensor, whatever its name.
    """

    layout: TensorLayout
    parts: tuple[Part, ...]

    @cached_property
    def chosen(self) -> TensorLayout:
        """The selected tensors, in ``layout``'s order; raises ReplyError if one is of no part."""
        pairs = zip(self.layout.names, self.layout.shapes, strict=True)
        return TensorLayout.of_pairs([pair for pair in pairs if self._holds(pair[0])])

    @property
    def is_whole(self) -> bool:
        """Whether every tensor is selected."""
        return self.chosen == self.layout

    def take(self, flat: torch.Tensor) -> torch.Tensor:
        """The selected values of ``flat``, (layout.numel,), as (chosen.numel,).

        ``flat`` itself where everything is selected, else a copy.
        """
        if self.is_whole:
            return flat
        tensors = self.layout.unpack(flat)
        return torch.cat([tensors[name].reshape(-1) for name in self.chosen.names])

    def put(self, flat: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """A copy of ``flat``, (layout.numel,), with ``values``, (chosen.numel,), in their places.

        ``values`` itself where everything is selected.
        """
        if self.is_whole:
            return values
        result = flat.clone()
        places = self.layout.unpack(result)
        for name, tensor in self.chosen.unpack(values).items():
            places[name].copy_(tensor)
        return result

    def _holds(self, name: str) -> bool:
        if self.parts == PARTS:
            return True
        module = name.partition(".")[0]
        if not any(module in modules for modules in _MODULES.values()):
            raise ReplyError(f"tensor {name} belongs to no part of a U-Net: {', '.join(PARTS)}")
        return any(module in _MODULES[part] for part in self.parts)
