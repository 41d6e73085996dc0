"""No edges: the clients are the cloud's own, as real processes and simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.processes import Processes, connections
from support.same import assert_same, run
from support.site import Site

CLIENTS = ("client-0", "client-1", "client-2")
RUN: dict[str, Any] = {
    "topology": "flat",
    "schedule.intervals": 2,
    "schedule.edge_rounds": 1,
    "schedule.min_clients": len(CLIENTS),
    "pruning.sparse_rounds": 1,
}


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


@pytest.mark.slow
def test_simulation_equals_processes_to_the_bit(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        real, simulated = (run(processes, name, name, **RUN) for name in ("local", "simulate"))
    assert not list(tmp_path.glob("*/state/edge-*"))
    assert len(real.rounds) == 2
    assert_same(simulated, real)
