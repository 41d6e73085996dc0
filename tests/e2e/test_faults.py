"""Faults of single processes, caused from outside while real ones train: the run survives them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.processes import Processes, Program
from support.site import CLIENTS, EDGES, Site

from fedphd.common.errors import FedPhDError

INTERVALS = 12
SETTINGS = {"schedule.intervals": INTERVALS, "schedule.min_clients": len(CLIENTS)}
FROZEN_S = 30.0
# What runs a server.
PARTS = ("flower-superlink", "flwr-serverapp")
# A tenth of the time at work.
STOPPED_S, GOING_S = 0.9, 0.1

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def site(processes: Processes) -> Site:
    """Two edges and three clients whose run has begun."""
    return Site(processes, SETTINGS).begin()


def started_by(pid: int, above: int) -> bool:
    """Whether process ``above`` is ``pid``, or started it, or who started it."""
    while pid > 1 and pid != above:
        status = Path(f"/proc/{pid}/status").read_text("ascii")
        pid = int(status.partition("PPid:\t")[2].partition("\n")[0])
    return pid == above


def part_of(site: Site, name: str, program: str) -> int:
    """The process that runs Flower's ``program`` for a participant."""
    launcher = site.programs[name].pid
    (found,) = [
        pid
        for pid, command in site.processes.commands().items()
        if any(Path(word).name == program for word in command) and started_by(pid, launcher)
    ]
    return found


@contextmanager
def frozen(program: Program) -> Iterator[None]:
    """Stop all processes of a participant, and let them go on."""
    os.killpg(program.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(program.pid, signal.SIGCONT)


@contextmanager
def slowed(program: Program) -> Iterator[None]:
    """Let a participant work for a tenth of the time only."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(GOING_S):
            with frozen(program):
                ended.wait(STOPPED_S)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["edge-1", "cloud"])
def test_a_part_of_a_server_is_killed(site: Site, name: str, part: str) -> None:
    os.kill(part_of(site, name, part), signal.SIGKILL)
    # Its launcher ends and says why, so that a supervisor starts the whole again.
    server = site.programs[name]
    assert server.wait_exit(within_s=120) == FedPhDError.exit_code, server.text
    site.start(name)
    site.check_end()
    assert site.events("interval")[-1]["edge_weights"].keys() == set(EDGES)


def test_a_client_freezes_and_goes_on(site: Site) -> None:
    with frozen(site.programs["client-0"]):
        time.sleep(FROZEN_S)
    site.check_end()
    first, *_, last = site.events("interval")
    assert any(failure.startswith("client-0: ") for failure in first["failures"])
    assert "client-0" in last["clients"]


@pytest.mark.parametrize("name", ["edge-1", "cloud"])
def test_a_server_freezes_and_goes_on(site: Site, name: str) -> None:
    with frozen(site.programs[name]):
        time.sleep(FROZEN_S)
    site.check_end()
    assert site.events("interval")[-1]["edge_weights"].keys() == set(EDGES)


def test_all_clients_die_and_come_back(site: Site) -> None:
    for name in CLIENTS:
        os.killpg(site.programs[name].pid, signal.SIGKILL)
    for name in CLIENTS:
        site.programs[name].wait_exit()
    time.sleep(FROZEN_S)
    for name in CLIENTS:
        site.start(name)
    site.check_end()
    assert site.events("interval")[-1]["clients"] == list(CLIENTS)


def test_a_straggler_is_not_waited_for(processes: Processes) -> None:
    quorum = {"schedule.num_edges": 1, "schedule.quorum": 0.6, "waits.straggler_s": 1.0}
    site = Site(processes, {**SETTINGS, **quorum}, edges=EDGES[:1]).begin()
    with slowed(site.programs["client-0"]):
        site.programs["cloud"].wait_line(r"interval +4 of")
    site.check_end()
    *_, last = site.events("interval")
    left_out = [why for event in site.events("interval") for why in event["failures"]]
    assert "client-0: no reply within 1 s after 2 of 3 had answered" in left_out
    assert "client-0 late: its answer (train) came" in site.programs["edge-0"].text
    assert last["clients"] == list(CLIENTS)
