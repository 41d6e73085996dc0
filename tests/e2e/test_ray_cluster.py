"""A simulation on a Ray cluster of three nodes, of which one is killed."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import Processes, Program, command_of, free_port
from support.tiny import CLASSES_PER_CLIENT, TINY, events, flags
from support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

INTERVALS, CLIENTS, NODES = 7, 6, 3
# What Ray calls the process of a simulated client, at work or not.
ACTOR = "ray::ClientAppActor"


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie in there, and the path of a socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def start_ray(processes: Processes, *arguments: str) -> Program:
    """A node with one core, in the foreground."""
    return processes.start_command(
        [
            str(Path(sys.executable).parent / "ray"), "start", *arguments, "--num-cpus=1",
            "--block", "--disable-usage-stats", "--object-store-memory=100000000",
        ],
        {**os.environ, "RAY_worker_niceness": "0"},
    )  # fmt: skip


def parent(pid: int) -> int:
    """The process that started another one."""
    return int(Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[1])


def actors(processes: Processes) -> dict[int, list[int]]:
    """The processes of clients, by the node (the id of its raylet) that they belong to."""
    found: dict[int, list[int]] = {}
    for pid in processes.running():
        words = command_of(pid)
        if words and words[0].startswith(ACTOR):
            found.setdefault(parent(pid), []).append(pid)
    return found


def cpu_s(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_clients_train_on_all_nodes_and_one_may_die(
    processes: Processes, short_folder: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    head = start_ray(
        processes, "--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false",
        f"--temp-dir={short_folder}",
    )  # fmt: skip
    head.wait_line("Ray runtime started")
    for _ in range(NODES - 1):
        start_ray(processes, f"--address={address}").wait_line("Ray runtime started")

    run = processes.start(
        "simulate", "--ray-address", address, "--clients", str(CLIENTS), "--edges", "2",
        "--run-dir", "run", "--classes-per-client", str(CLASSES_PER_CLIENT),
        *flags({**TINY, "schedule.intervals": INTERVALS}),
    )  # fmt: skip
    run.wait_line(rf"cluster +Ray at {address}: {NODES} nodes, {NODES} cores")
    run.wait_line(r"interval +2 of")
    at_work = actors(processes)
    assert len(at_work) == NODES
    # They have imported PyTorch, which only a message to a client makes them do.
    assert all(min(map(cpu_s, pids)) > 1.0 for pids in at_work.values())

    victim = next(raylet for raylet in at_work if parent(raylet) != head.pid)
    os.kill(victim, signal.SIGKILL)
    assert run.wait_exit(within_s=600) == 0, run.text
    ended = [e for e in events(processes.folder / "run/metrics.jsonl") if e["event"] == "interval"]
    assert [e["interval"] for e in ended] == list(range(1, INTERVALS + 1))
    # Whoever was on the lost node failed there, once; in the end everybody trains again.
    rounds = int(TINY["schedule.edge_rounds"])
    trained = [e["client_rounds"] for e in ended]
    assert trained[-1] == rounds * CLIENTS, trained
    assert sum(trained) >= (INTERVALS - 1) * rounds * CLIENTS, trained
    wait_until(lambda: ACTOR not in str(processes.commands()))
