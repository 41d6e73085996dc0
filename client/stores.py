"""What Flower keeps of a node, as a store for a client that starts afresh for every message.

A resident client keeps its trainer in memory and writes the state to its folder after each round
(``common/stores.py: FileStore``). A stock ``flower-supernode`` and the simulation do not; what
Flower keeps of a node for them is its ``context.state``.
"""

import json
from typing import Any, Final, final

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedphd.common.stores import StateStore
from fedphd.common.wire.records import read_array

_SCALARS: Final = "fedphd-trainer"
_TENSORS: Final = "fedphd-kept"
_JSON: Final = "json"


@final
class ContextStore(StateStore):
    """The state is in the records that Flower keeps for a node: in a node's own process.

    There is no room for a second one, so a resumed run goes on from the last state.
    """

    def __init__(self, records: RecordDict) -> None:
        super().__init__()
        self._records = records

    def _read(self, whose: str) -> dict[str, Any] | None:
        if _SCALARS not in self._records:
            return None
        scalars = json.loads(str(self._records.config_records[_SCALARS][_JSON]))
        arrays = self._records.array_records[_TENSORS]
        return {**scalars, **{name: read_array(array) for name, array in arrays.items()}}

    def _read_former(self, whose: str) -> dict[str, Any] | None:
        return self._read(whose)

    def _write(
        self, whose: str, scalars: str, tensors: dict[str, torch.Tensor], *, former: bool
    ) -> None:
        arrays = {name: Array(tensor.numpy()) for name, tensor in tensors.items()}
        self._records[_SCALARS] = ConfigRecord({_JSON: scalars})
        self._records[_TENSORS] = ArrayRecord(arrays)
