"""The cloud's weights on their way down, in few bits a value: differences to what edges hold."""

from dataclasses import dataclass

from torch import Tensor

from fedphd.common.config.wire import CodecName
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.codecs import Codec, digest_of


@dataclass(frozen=True)
class Downlink:
    """One interval's weights.

    Attributes:
        whole: (numel,), float32, for edges that hold nothing.
        change: on top of the weights with the digest ``base``, as the codec packed it; None: there
            is nothing to build on.
        digest: of ``whole``; None where the codec is exact.
    """

    whole: Tensor
    change: Tensor | None = None
    base: str | None = None
    digest: str | None = None

    def for_edge(self, holds: str | None) -> tuple[Tensor, str | None]:
        """What an edge gets that ``holds`` weights of that digest, and the base it builds on."""
        if self.change is None or holds != self.base:
            return self.whole, None
        return self.change, self.base


class Broadcast:
    """What all edges hold, bit by bit, however it came to them.

    The cloud sends by how much its weights have moved away from that. Rounding on the way is part
    of what edges hold, so the next difference makes up for it: it is error feedback without a
    vector of its own.

    Attributes:
        held: (numel,), float32; None before the first interval, and where the codec is exact.
    """

    def __init__(self, held: Tensor | None = None) -> None:
        self.held = held
        self._digest = None if held is None else digest_of(held)

    def send(self, weights: Tensor, codec_name: CodecName, layout: TensorLayout) -> Downlink:
        """Let edges hold ``weights``, (layout.numel,), float32, as nearly as the codec can."""
        codec = Codec(codec_name, layout)
        if codec.is_exact:
            return Downlink(weights)
        base, change = self._digest, None
        if self.held is None:
            self.held = weights.clone()
        else:
            change = codec.encode(weights, self.held)
            self.held = codec.decode(change, self.held)
        self._digest = digest_of(self.held)
        return Downlink(self.held, change, base, self._digest)

    def cut(self, cut: Cut, layout: TensorLayout) -> None:
        """Cut what edges hold to ``layout``, as they will do; or forget it, if only parts travel.

        Its digest stays that of what they hold now.
        """
        if self.held is not None and self.held.numel() == cut.layout.numel:
            self.held = cut.apply_flat(self.held, layout)
        else:
            self.held = self._digest = None
