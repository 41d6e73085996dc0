"""Looking at processes of others, and ending them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from support.waiting import HANG_S

from fedphd.deploy.launch.processes import alive, descendants, end


@pytest.fixture
def family() -> Iterator[subprocess.Popen[str]]:
    """A shell with a child and a grandchild, which prints both ids."""
    script = "sh -c 'sleep 600 & echo $!; wait' & echo $!; wait"
    command = ["sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            end([process.pid, *descendants(process.pid)], within_s=0)


def test_alive_means_running_and_no_zombie() -> None:
    assert alive(os.getpid())
    process = subprocess.Popen(["sleep", "600"])
    assert alive(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not alive(process.pid)
    process.wait()
    assert not alive(process.pid)


def test_descendants_are_children_and_their_children(family: subprocess.Popen[str]) -> None:
    assert family.stdout is not None
    below = {int(family.stdout.readline()) for _ in range(2)}
    assert descendants(family.pid) == below
    assert below < descendants(os.getpid())
    assert all(descendants(pid) <= below for pid in below)


def test_what_ends_by_itself_is_not_killed() -> None:
    process = subprocess.Popen(["sh", "-c", "sleep 0.2; exit 7"])
    end([process.pid], within_s=HANG_S)
    assert process.wait(0) == 7


def test_what_stays_is_killed() -> None:
    process = subprocess.Popen(["sleep", "600"])
    end([process.pid], within_s=0.1)
    assert process.wait(HANG_S) == -signal.SIGKILL
    end([process.pid], within_s=0)
