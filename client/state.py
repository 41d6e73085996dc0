"""A trainer's lasting state in a Flower ``Context``, for processes that end after each message.

A resident client keeps its trainer in memory; a stock ``flower-supernode`` and the simulation
start afresh for every message and keep only ``context.state``.
"""

from __future__ import annotations

import json
from typing import Any, Final

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedphd.client.trainer import Trainer
from fedphd.common.messages import read_array

_SCALARS: Final = "fedphd-trainer"
_TENSORS: Final = "fedphd-kept"
_JSON: Final = "json"


def store(trainer: Trainer, records: RecordDict) -> None:
    """Put the trainer's counters and kept vectors into ``records``."""
    state = trainer.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    scalars = {key: value for key, value in state.items() if key not in tensors}
    records[_SCALARS] = ConfigRecord({_JSON: json.dumps(scalars)})
    records[_TENSORS] = ArrayRecord({key: Array(value.numpy()) for key, value in tensors.items()})


def restore(trainer: Trainer, records: RecordDict) -> None:
    """Bring the trainer to the state in ``records``; a new client has none and starts afresh.

    Raises:
        FedPhDError: the state is malformed.
    """
    if _SCALARS not in records:
        trainer.load_state_dict({"steps": 0})
        return
    state: dict[str, Any] = json.loads(str(records.config_records[_SCALARS][_JSON]))
    for key, array in records.array_records[_TENSORS].items():
        state[key] = read_array(array)
    trainer.load_state_dict(state)
