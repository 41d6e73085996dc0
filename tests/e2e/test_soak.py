"""An hour of a federation with TLS and keys, in which anything is killed at any moment.

``FEDPHD_SOAK_INTERVALS`` makes it shorter, ``FEDPHD_SOAK_REPORT`` names a file for its tables.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import Processes
from support.site import CLIENTS, Site
from support.soak import Soak, report

# About an hour on two cores.
INTERVALS = int(os.environ.get("FEDPHD_SOAK_INTERVALS", "300"))
# The last ones are left in peace, so that all are there at the end.
CALM = 10
# What a process may hold more at the end than after its warm-up.
MORE_MEMORY, MORE_MB, MORE_DESCRIPTORS, MORE_THREADS = 1.1, 15.0, 8, 8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]


def test_nothing_grows_and_nothing_is_left(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, temporary = processes.folder, processes.folder / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    command = [sys.executable, "-m", "fedphd.deploy.cli", "keys", "dev", "--edges", "2"]
    subprocess.run([*command, "--clients", str(len(CLIENTS))], cwd=folder, check=True)
    settings = {"schedule.intervals": INTERVALS, "schedule.min_clients": len(CLIENTS)}
    site = Site(processes, settings, keys=folder / "keys").begin()

    def calm() -> bool:
        return last_interval(site) > INTERVALS - CALM

    soak = Soak(site, calm)
    seconds = soak.run()
    processes.wait_gone()
    losses = [event["loss"] for event in site.events("interval")]
    if path := os.environ.get("FEDPHD_SOAK_REPORT"):
        lines = report(soak, seconds, len(losses), losses[-1])
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    assert len(soak.kills) > 1
    finished = [event["interval"] for event in site.events("interval")]
    assert finished == list(range(1, INTERVALS + 1))
    assert all(math.isfinite(loss) for loss in losses if loss is not None)
    assert losses[-1] < losses[0]
    for part in ("unet", "unet_ema"):
        (weights,) = (site.run_dir / "checkpoint" / part).glob("*.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in load_file(weights).values())
    judged = [(life, pair) for life in soak.lives if (pair := life.early_and_late())]
    assert judged, "no process lived long enough to be judged: raise FEDPHD_SOAK_INTERVALS"
    assert [one for one in judged if grows(*one[1])] == []
    left = [path for path in temporary.rglob("*") if path.is_file()]
    left += [path for path in folder.rglob(".*.[0-9]*") if path.is_file()]
    assert left == []


def grows(early: tuple[float, int, int], late: tuple[float, int, int]) -> bool:
    """Whether a process holds clearly more than it did."""
    return (
        late[0] > MORE_MEMORY * early[0] + MORE_MB
        or late[1] > early[1] + MORE_DESCRIPTORS
        or late[2] > early[2] + MORE_THREADS
    )


def last_interval(site: Site) -> int:
    """The last finished interval, while the file may be written or be cut back."""
    text = (site.run_dir / "metrics.jsonl").read_text("utf-8")
    return text.count('"event": "interval"')
