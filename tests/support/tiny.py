"""Settings of a federation of real processes that is small enough to start for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "model.block_out_channels": [16, 32],
    "model.norm_num_groups": 4,
    "model.attention_head_dim": 4,
    "training.batch_size": 64,
    "training.learning_rate": 3e-3,
    "schedule.edge_rounds": 2,
    "pruning.mode": "scheduled",
    "pruning.sparse_rounds": 2,
    "pruning.ratio": 0.5,
    "evaluation.num_samples": 16,
    "evaluation.sampling_steps": 2,
    "evaluation.every_intervals": 10,
    "evaluation.classifier_epochs": 1,
    "num_threads": 1,
}
WIDTHS, PRUNED_WIDTHS = [16, 32], [8, 16]
# Three clients, four of the ten classes each.
CLASSES_PER_CLIENT = 4


def flags(values: dict[str, Any]) -> list[str]:
    """``{"a.b": 3}`` as ``["--set", "a.b=3"]``."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={_text(value)}")]


def write_toml(path: Path, values: dict[str, Any]) -> Path:
    """Write dotted keys with strings, numbers, booleans or lists of such as TOML."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def events(path: Path) -> list[dict[str, Any]]:
    """The events of an event log."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
