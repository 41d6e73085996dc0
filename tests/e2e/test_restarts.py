"""Processes that are killed with SIGKILL, by whichever of their parts, and started again."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from support.processes import Processes
from support.site import EDGES, Site

INTERVALS = 4
RUN = {"schedule.intervals": INTERVALS, "schedule.min_clients": 2}


@pytest.mark.parametrize("pause_s", [0.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_an_edge_that_is_killed_and_started_again_goes_on(
    processes: Processes, pause_s: float
) -> None:
    site = Site(processes, RUN)
    edges = {name: site.start(name) for name in EDGES}
    for name in ("client-0", "client-2"):
        site.start(name)
    cloud = site.start("cloud")
    edges["edge-1"].wait_line(r"interval +1 round 1")
    # The launcher alone: its SuperLink and its ServerApp must not disturb the next one.
    os.kill(edges["edge-1"].pid, signal.SIGKILL)
    edges["edge-1"].wait_exit()
    time.sleep(pause_s)
    again = site.start("edge-1")
    again.wait_line("listening on")
    codes = {name: program.wait_exit() for name, program in site.programs.items()}
    assert codes == dict.fromkeys(codes, 0), f"{cloud.text}\n\n{again.text}"
    verdict = json.loads((processes.folder / "edge-1/verdict.json").read_text("utf-8"))
    assert verdict["exit_code"] == 0
    assert "stopped" not in again.text
    last = site.events("interval")[-1]
    assert set(last["edge_weights"]) == set(EDGES), last
