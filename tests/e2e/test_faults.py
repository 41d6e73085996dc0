"""Faults of single processes, caused from outside while real ones train: the run survives them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support.processes import Processes
from support.site import EDGES, Site

from fedphd.common.errors import StartError

INTERVALS = 12
CLIENTS = ("client-0", "client-1", "client-2")
FROZEN_S = 30.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def site(processes: Processes) -> Site:
    """Two edges and three clients whose run has begun."""
    made = Site(processes, {"schedule.intervals": INTERVALS, "schedule.min_clients": 3})
    for name in (*EDGES, *CLIENTS):
        made.start(name)
    made.start("cloud")
    made.programs["edge-1"].wait_line(r"interval +1 round 1")
    return made


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


def check_end(site: Site) -> None:
    """Everybody who runs ends with 0, and every interval is there once."""
    codes = {name: program.wait_exit() for name, program in site.programs.items()}
    assert codes == dict.fromkeys(codes, 0), site.programs["cloud"].text
    finished = [event["interval"] for event in site.events("interval")]
    assert finished == list(range(1, INTERVALS + 1))
    site.processes.wait_gone()


def test_an_edges_superlink_alone_is_killed(site: Site) -> None:
    os.kill(part_of(site, "edge-1", "flower-superlink"), signal.SIGKILL)
    # Its launcher ends and says why, so that a supervisor starts the whole again.
    edge = site.programs["edge-1"]
    assert edge.wait_exit(within_s=120) == StartError.exit_code
    assert "flower-superlink ended with code -9" in edge.text
    site.start("edge-1")
    check_end(site)
    assert site.events("interval")[-1]["edge_weights"].keys() == set(EDGES)


def test_a_client_freezes_and_goes_on(site: Site) -> None:
    group = site.programs["client-0"].pid
    os.killpg(group, signal.SIGSTOP)
    time.sleep(FROZEN_S)
    os.killpg(group, signal.SIGCONT)
    check_end(site)
    first, *_, last = site.events("interval")
    assert any(failure.startswith("client-0: ") for failure in first["failures"])
    assert "client-0" in last["clients"]
