"""One small federation, run in several ways that must all give the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.processes import Processes, Program
from support.tiny import CLASSES_PER_CLIENT, PRUNED_WIDTHS, TINY, events, flags

from fedphd.common.unet.checkpoint import load_checkpoint

SETTINGS: dict[str, Any] = {
    **TINY,
    "reproducible": True,
    "schedule.intervals": 2,
    # Two of the three clients take part in a round, and each draws its edge.
    "schedule.participation": 0.6,
    "selection.policy": "homogeneity",
    # Differences and what rounding leaves over travel alike.
    "wire.cloud_down": "int8",
    "wire.cloud_up": "int4",
    "wire.client_down": "bf16",
    "wire.client_up": "int8",
    # One full and one smaller batch per epoch, and no classifier: starting takes long enough.
    "training.batch_size": 256,
    "data.validation_fraction": 0.3,
    "evaluation.reference": None,
    "evaluation.num_samples": 2,
    "evaluation.sampling_steps": 1,
    "evaluation.grid_rows": 1,
}


@dataclass
class Outcome:
    """What a run left, and printed."""

    folder: Path
    weights: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    rounds: dict[tuple[str, int, int], dict[str, Any]]
    text: str


def start(processes: Processes, command: str, name: str, **settings: Any) -> Program:
    """Start ``fedphd simulate`` or ``fedphd local``; ``settings`` win over the usual ones."""
    return processes.start(
        command, "--clients", "3", "--edges", "2", "--run-dir", name,
        "--classes-per-client", str(CLASSES_PER_CLIENT), *flags({**SETTINGS, **settings}),
    )  # fmt: skip


def finish(processes: Processes, program: Program, name: str) -> Outcome:
    """Wait for the end of a run, and read what it left."""
    folder = processes.folder / name
    code = program.wait_exit()
    assert code == 0, f"{program.text}\n{tail(folder / 'state' / 'superlink.log')}"
    processes.wait_gone()
    unet, ema, _, _ = load_checkpoint(folder / "checkpoint")
    assert list(unet.config["block_out_channels"]) == PRUNED_WIDTHS
    logs = [folder / "metrics.jsonl", *folder.glob("state/edge-*/events.jsonl")]
    rounds = {
        (event["node"], event["interval"], event["edge_round"]): event
        for log in logs
        for event in events(log)
        if event["event"] == "round"
    }
    return Outcome(folder, unet.state_dict(), ema.state_dict(), rounds, program.text)


def tail(path: Path, lines: int = 40) -> str:
    """The end of a log, for whoever must find out from a test's output alone."""
    text = path.read_text("utf-8", "replace") if path.is_file() else f"no {path}"
    return "\n".join(text.splitlines()[-lines:])


def run(processes: Processes, command: str, name: str, **settings: Any) -> Outcome:
    """Run ``fedphd simulate`` or ``fedphd local`` to its end."""
    return finish(processes, start(processes, command, name, **settings), name)


def assert_same(one: Outcome, other: Outcome) -> None:
    """Same participation and choices, same losses, same weights, to the bit."""
    assert one.rounds.keys() == other.rounds.keys()
    for key, event in one.rounds.items():
        twin = other.rounds[key]
        for name in ("clients", "loss", "validation_loss"):
            assert event[name] == twin[name], (name, key)
        assert (event["validation_loss"] is None) == (event["clients"] == []), key
    for ours, theirs in ((one.weights, other.weights), (one.ema, other.ema)):
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert different == []
