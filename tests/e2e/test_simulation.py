"""Flower's simulation and real processes: the same settings give the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Processes
from support.tiny import CLASSES_PER_CLIENT, PRUNED_WIDTHS, TINY, events, flags

from fedphd.common.unet.checkpoint import load_checkpoint

SETTINGS = {
    **TINY,
    "schedule.intervals": 2,
    "reproducible": True,
    "data.validation_fraction": 0.1,
}
PEOPLE = ["--clients", "3", "--edges", "2", "--classes-per-client", str(CLASSES_PER_CLIENT)]


@dataclass
class Outcome:
    """What a run left."""

    weights: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    rounds: dict[tuple[str, int, int], dict[str, Any]]
    text: str


def run(processes: Processes, command: str, name: str) -> Outcome:
    """Run ``fedphd simulate`` or ``fedphd local`` to its end."""
    program = processes.start(command, *PEOPLE, "--run-dir", name, *flags(SETTINGS))
    assert program.wait_exit() == 0, program.text
    processes.wait_gone()
    folder = processes.folder / name
    unet, ema, _, _ = load_checkpoint(folder / "checkpoint")
    assert list(unet.config["block_out_channels"]) == PRUNED_WIDTHS
    logs = [folder / "metrics.jsonl", *folder.glob("state/edge-*/events.jsonl")]
    rounds = {
        (event["node"], event["interval"], event["edge_round"]): event
        for log in logs
        for event in events(log)
        if event["event"] == "round"
    }
    return Outcome(unet.state_dict(), ema.state_dict(), rounds, program.text)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("same")


@pytest.fixture(scope="module")
def simulated(folder: Path) -> Outcome:
    with Processes(folder) as processes:
        return run(processes, "simulate", "simulated")


def test_simulation_equals_processes_to_the_bit(simulated: Outcome, folder: Path) -> None:
    with Processes(folder) as processes:
        assert_same(simulated, run(processes, "local", "local"))


def test_simulation_names_the_flwr_command(simulated: Outcome) -> None:
    assert "running   flwr run " in simulated.text
    assert "--federation-config 'num-supernodes=3 " in simulated.text
    assert len(simulated.rounds) == 2 * 2 * 2


@pytest.mark.slow
def test_simulation_repeats_to_the_bit(simulated: Outcome, folder: Path) -> None:
    with Processes(folder) as processes:
        assert_same(simulated, run(processes, "simulate", "again"))


@pytest.mark.slow
def test_processes_repeat_to_the_bit(folder: Path) -> None:
    with Processes(folder) as processes:
        first = run(processes, "local", "first")
        assert_same(first, run(processes, "local", "second"))
