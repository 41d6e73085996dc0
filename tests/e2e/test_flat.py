"""No edges: the clients are the cloud's own, as real processes and simulated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Processes, connections
from support.site import Site
from support.tiny import CLASSES_PER_CLIENT, TINY, events, flags

from fedphd.common.unet.checkpoint import load_checkpoint
from fedphd.common.unet.layout import TensorLayout

CLIENTS = ("client-0", "client-1", "client-2")
RUN: dict[str, Any] = {
    "topology": "flat",
    "schedule.intervals": 2,
    "schedule.edge_rounds": 1,
    "schedule.min_clients": len(CLIENTS),
    "pruning.sparse_rounds": 1,
}


@dataclass
class Outcome:
    """What a run left."""

    weights: torch.Tensor
    rounds: list[tuple[int, list[str], float]]


def test_clients_train_with_the_cloud_alone(processes: Processes) -> None:
    site = Site(processes, RUN, edges=())
    cloud = site.start("cloud")
    clients = [site.start(name) for name in CLIENTS]
    cloud.wait_line(r"^cloud +interval +1 round 1")
    assert len(processes.groups()) == 1 + len(clients)
    for client in clients:
        assert connections(client.pid) == {site.ports["cloud"]}
    codes = {name: program.wait_exit() for name, program in site.programs.items()}
    assert set(codes.values()) == {0}, cloud.text
    processes.wait_gone()
    assert [event["clients"] for event in site.events("round")] == [list(CLIENTS)] * 2
    assert [event["failures"] for event in site.events("interval")] == [[], []]


def outcome(processes: Processes, command: str) -> Outcome:
    settings = {**TINY, **RUN, "reproducible": True}
    program = processes.start(
        command, "--clients", str(len(CLIENTS)), "--run-dir", command,
        "--classes-per-client", str(CLASSES_PER_CLIENT), *flags(settings),
    )  # fmt: skip
    assert program.wait_exit() == 0, program.text
    processes.wait_gone()
    folder = processes.folder / command
    assert not list(folder.glob("state/edge-*"))
    state = load_checkpoint(folder / "checkpoint")[0].state_dict()
    rounds = [e for e in events(folder / "metrics.jsonl") if e["event"] == "round"]
    return Outcome(
        TensorLayout.of(state).pack(state),
        [(event["round"], event["clients"], event["loss"]) for event in rounds],
    )


@pytest.mark.slow
def test_simulation_equals_processes_to_the_bit(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        real, simulated = outcome(processes, "local"), outcome(processes, "simulate")
    assert len(real.rounds) == 2
    assert simulated.rounds == real.rounds
    assert torch.equal(simulated.weights, real.weights)
