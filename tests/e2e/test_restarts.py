"""Processes that are killed with SIGKILL, and started again as a supervisor does it."""

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


def test_an_edge_and_the_cloud_are_killed_and_go_on(processes: Processes) -> None:
    site = Site(processes, {**RUN, "checkpoint.keep": 2})
    for name in (*EDGES, "client-0", "client-2"):
        site.start(name)
    cloud = site.start("cloud")
    site.programs["edge-1"].wait_line(r"interval +1 round 1")
    # The launcher alone: its SuperLink and its ServerApp must not disturb the next one.
    os.kill(site.programs["edge-1"].pid, signal.SIGKILL)
    site.programs["edge-1"].wait_exit()
    edge = site.start("edge-1")
    edge.wait_line("listening on")
    site.programs["edge-0"].wait_line(r"interval +2 round 1")
    os.killpg(cloud.pid, signal.SIGKILL)
    cloud.wait_exit()
    again = site.start("cloud")
    again.wait_line(r"resuming .* after interval 1 of 4")
    codes = {name: program.wait_exit() for name, program in site.programs.items()}
    assert codes == dict.fromkeys(codes, 0), f"{again.text}\n\n{edge.text}"
    assert "stopped" not in edge.text
    verdict = json.loads((processes.folder / "edge-1/verdict.json").read_text("utf-8"))
    assert verdict["exit_code"] == 0
    # No gap, and nothing twice.
    assert [event["interval"] for event in site.events("interval")] == [1, 2, 3, 4]
    assert [event["interval"] for event in site.events("evaluated")] == [0, 4]
    assert [path.name for path in (site.run_dir / "checkpoints").iterdir()] == ["interval-0003"]
    # A supervisor that starts it once more learns that there is nothing to do.
    assert site.start("cloud").wait_exit() == 0
    assert "has finished already" in site.programs["cloud"].text


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("pause_s", [0.0, 3.0, 30.0])
def test_an_edge_that_is_started_again_trains_again(processes: Processes, pause_s: float) -> None:
    # Long enough for the killed one's heartbeat to be missed: till then the name is its own.
    intervals = 30
    site = Site(processes, {**RUN, "schedule.intervals": intervals})
    for name in (*EDGES, "client-0", "client-2"):
        site.start(name)
    site.start("cloud")
    site.programs["edge-1"].wait_line(r"interval +1 round 1")
    os.kill(site.programs["edge-1"].pid, signal.SIGKILL)
    site.programs["edge-1"].wait_exit()
    time.sleep(pause_s)
    edge = site.start("edge-1")
    edge.wait_line(r"interval +\d+ round 1")
    codes = {name: program.wait_exit() for name, program in site.programs.items()}
    assert codes == dict.fromkeys(codes, 0), edge.text
    last = site.events("interval")[-1]
    assert set(last["edge_weights"]) == set(EDGES), last


def test_a_changed_configuration_is_refused_by_name(processes: Processes) -> None:
    site = Site(processes, RUN)
    first = site.start("cloud", **{"waits.start_s": 1.0})
    assert first.wait_exit() == 4, first.text
    changed = site.start("cloud", **{"training.learning_rate": 0.5})
    assert changed.wait_exit() == 2
    assert "other settings: training.learning_rate = 0.003, now 0.5; set them" in changed.text
