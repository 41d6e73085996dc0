"""A participant's clock is set while it takes part: ahead, back, and right again."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from support import clock
from support.clock import Clock
from support.processes import Processes
from support.site import CLIENTS, Site

HOUR_S = 3600.0
# Between two jumps.
GOES_S = 20.0
INTERVALS = 14
SETTINGS = {
    "schedule.intervals": INTERVALS, "schedule.min_clients": len(CLIENTS), "waits.retry_s": 1.0,
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", ["cloud", "edge-1", "client-0"])
def test_a_clock_jumps(name: str, processes: Processes) -> None:
    if why := clock.missing():
        pytest.skip(why)
    command = [sys.executable, "-m", "fedphd.deploy.cli", "keys", "dev", "--edges", "2"]
    subprocess.run([*command, "--clients", "3"], cwd=processes.folder, check=True)
    site = Site(processes, SETTINGS, keys=processes.folder / "keys")
    hands = Clock(processes.folder)
    site.prefixes[name] = hands.prefix
    site.begin()
    for ahead_s in (HOUR_S, -HOUR_S, 0.0):
        hands.jump(ahead_s)
        supervise(site, name, time.monotonic() + GOES_S)
    supervise(site, name)
    site.check_end()
    # Nobody is lost for good.
    assert site.events("interval")[-1]["clients"] == list(CLIENTS)


def supervise(site: Site, name: str, until_s: float = float("inf")) -> None:
    """Start a participant again that Flower has ended, until a moment or the end of the run."""
    while time.monotonic() < until_s:
        code = site.programs[name].process.poll()
        if code == 0:
            return
        if code is not None:
            assert code == 1, site.programs[name].text
            assert "clock was set" in site.programs[name].text
            site.start(name)
        time.sleep(0.2)
