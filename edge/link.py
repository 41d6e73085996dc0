"""What an edge keeps of its link to the cloud, so that few bits a value are enough there.

Downwards come differences to the weights that the edge holds already. The cloud knows what was
rounded in them, and its next difference makes up for it. Upwards goes what the clients changed;
what rounding takes from one interval's change is added to the next one's (error feedback,
arXiv:1901.09847), since an edge takes part in every interval.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from flwr.app import Array
from torch import Tensor

from fedphd.common.errors import FedPhDError, ReplyError
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.parts import PartSubset
from fedphd.common.wire import records
from fedphd.common.wire.codecs import Codec, digest_of
from fedphd.common.wire.messages import IntervalTask

WEIGHTS: Final = "weights"
VARIATE: Final = "variate"
_LAYOUT: Final = "layout"


class CloudLink:
    """One edge's side of it.

    Attributes:
        holds: the digest of the weights that the next difference may build on; None: it has none.
    """

    def __init__(self, edge_id: str) -> None:
        self.whose = f"edge {edge_id}"
        self.holds: str | None = None
        self._held: Tensor | None = None
        self._held_layout: TensorLayout | None = None
        # What rounding has taken from the changes so far, (numel,), of the weights of _layout.
        self._residuals: dict[str, Tensor] = {}
        self._layout: TensorLayout | None = None

    def receive(self, task: IntervalTask, came: Array) -> Tensor:
        """The weights that the interval begins with, (numel,), float32.

        Args:
            came: as the cloud's codec packed them, or whole, as float32; where the codec is exact
                they are used as they are, without a copy.

        Raises:
            ReplyError: they do not fit the task's own description of the network, build on others
                than this edge holds, or do not come to what the cloud says. Then nothing is held,
                so that the cloud sends them whole next time.
        """
        layout = task.network.tensor_layout()
        codec = Codec(task.plan.codecs.cloud_down, layout)
        held, held_layout, holds = self._held, self._held_layout, self.holds
        self._held = self._held_layout = self.holds = None
        if task.base is None:
            weights = records.read_array(came)
        elif held is None or held_layout is None or task.base != holds:
            raise ReplyError("the weights build on others that are not here; send them whole")
        else:
            if held_layout != layout:
                held = _cut(held, task, layout)
            weights = codec.unpack(records.read_array(came, codec.dtype), held)
        records.check_reply_weights(weights, task.network, layout)
        if task.digest is not None:
            if digest_of(weights) != task.digest:
                raise ReplyError("the weights do not come to those of the cloud; send them whole")
            self._held, self._held_layout, self.holds = weights, layout, task.digest
        if layout != self._layout:
            self._residuals.clear()
        self._layout = layout
        return weights

    def pack(
        self, name: str, codec: Codec, sent: PartSubset, change: Tensor, *, counts: bool = True
    ) -> Tensor:
        """Write a change of some parts, (sent.chosen.numel,), float32, for the cloud.

        Args:
            name: ``WEIGHTS`` or ``VARIATE``: what rounding takes is kept under it.
            counts: whether the cloud will take it; if not, what was left before stays here.
        """
        if codec.is_exact or not counts:
            return codec.pack(change)
        before = self._residuals.get(name)
        if before is None:
            before = torch.zeros(sent.layout.numel)
        whole = change + sent.take(before)
        packed = codec.encode(whole)
        self._residuals[name] = sent.put(before, whole.sub_(codec.decode(packed)))
        return packed

    def state_dict(self) -> dict[str, Any]:
        """What is to be added to the next changes: ``layout`` (JSON text) and vectors, (numel,)."""
        if self._layout is None or not self._residuals:
            return {}
        return {_LAYOUT: self._layout.to_json(), **self._residuals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; raises FedPhDError if it is malformed."""
        self._residuals.clear()
        self._layout = None
        if _LAYOUT not in state:
            return
        try:
            layout = TensorLayout.from_json(state[_LAYOUT])
            residuals = {name: state[name] for name in (WEIGHTS, VARIATE) if name in state}
            for name, residual in residuals.items():
                if residual.dtype != torch.float32 or residual.shape != (layout.numel,):
                    raise ValueError(f"{name} is not of {layout.numel} float32")
        except (ValueError, AttributeError, TypeError) as error:
            raise FedPhDError(
                f"the stored state of {self.whose} is malformed ({error}); remove it to start "
                "afresh"
            ) from error
        self._layout, self._residuals = layout, residuals


def _cut(held: Tensor, task: IntervalTask, layout: TensorLayout) -> Tensor:
    """The weights of the network before it was pruned, as the cloud cuts them too."""
    if task.cut is None:
        raise ReplyError("the network changed, and the task does not say how; send it whole")
    try:
        return Cut.from_json(task.cut).apply_flat(held, layout)
    except FedPhDError as error:
        raise ReplyError(str(error)) from error
