"""Where a trainer's lasting state is between messages, for processes that end after each one.

A resident client keeps its trainer in memory. A stock ``flower-supernode`` and the simulation
start afresh for every message; what Flower keeps of a node for them is its ``context.state``.
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final, final

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedphd.client.trainer import Trainer
from fedphd.common.errors import FedPhDError
from fedphd.common.files import replaced
from fedphd.common.wire.records import read_array

_SCALARS: Final = "fedphd-trainer"
_TENSORS: Final = "fedphd-kept"
_FILE: Final = "fedphd-kept-in"
_JSON: Final = "json"
_PATH: Final = "path"


class StateStore(ABC):
    """A place that outlives the process."""

    def restore(self, trainer: Trainer) -> None:
        """Bring the trainer to the stored state; a new client has none and starts afresh.

        Raises FedPhDError if the state is malformed or gone.
        """
        trainer.load_state_dict(self._read(trainer.client_id) or {"steps": 0})

    def store(self, trainer: Trainer) -> None:
        """Store the trainer's counters and vectors; raises FedPhDError if that is impossible."""
        state = trainer.state_dict()
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        scalars = {key: value for key, value in state.items() if key not in tensors}
        self._write(trainer.client_id, json.dumps(scalars), tensors)

    @abstractmethod
    def _read(self, client_id: str) -> dict[str, Any] | None:
        """What was written last, scalars and tensors by name; None if there is nothing."""

    @abstractmethod
    def _write(self, client_id: str, scalars: str, tensors: dict[str, torch.Tensor]) -> None:
        """Replace what was written before; ``scalars`` are JSON text."""


@final
class ContextStore(StateStore):
    """The state is in the records that Flower keeps for a node: in a node's own process."""

    def __init__(self, records: RecordDict) -> None:
        self._records = records

    def _read(self, client_id: str) -> dict[str, Any] | None:
        if _SCALARS not in self._records:
            return None
        scalars = json.loads(str(self._records.config_records[_SCALARS][_JSON]))
        arrays = self._records.array_records[_TENSORS]
        return {**scalars, **{name: read_array(array) for name, array in arrays.items()}}

    def _write(self, client_id: str, scalars: str, tensors: dict[str, torch.Tensor]) -> None:
        arrays = {name: Array(tensor.numpy()) for name, tensor in tensors.items()}
        self._records[_SCALARS] = ConfigRecord({_JSON: scalars})
        self._records[_TENSORS] = ArrayRecord(arrays)


@final
class FileStore(StateStore):
    """The state is in a file; the records that Flower keeps only say that there is one.

    Flower holds the records (``context.state``) of all simulated nodes in one process, which many
    clients' moments would fill. The file at ``path`` is of this run and node alone.
    """

    def __init__(self, records: RecordDict, path: Path) -> None:
        self._records = records
        self._path = path

    def _read(self, client_id: str) -> dict[str, Any] | None:
        if _FILE not in self._records:
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                scalars = json.loads(file.metadata()[_JSON])
                # A copy: a tensor that maps the file would change with it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                return {**scalars, **tensors}
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise FedPhDError(
                f"the stored training state of client {client_id} cannot be read from "
                f"{self._path}: {error}; it must stay there until the run ends"
            ) from error

    def _write(self, client_id: str, scalars: str, tensors: dict[str, torch.Tensor]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A process that is killed here leaves the old state or the new one, whole.
            with replaced(self._path) as beside:
                save_file(tensors, beside, metadata={_JSON: scalars})
        except (OSError, SafetensorError) as error:
            raise FedPhDError(
                f"the training state of client {client_id} cannot be written to {self._path}: "
                f"{error}; make room there, or set FLWR_HOME to a larger disk"
            ) from error
        self._records[_FILE] = ConfigRecord({_PATH: str(self._path)})
