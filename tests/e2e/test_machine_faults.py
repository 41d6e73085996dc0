"""Faults of machines and of the networks between them, made for real: lost packets, full disks.

They need root, for network namespaces and mounts, and are skipped by name without.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import links
from support.links import Link
from support.processes import Processes
from support.site import CLIENTS, EDGES, Site

from fedphd.common.unet.checkpoint import load_checkpoint

INTERVALS = 12
CUT_S = 60.0
SETTINGS = {"schedule.intervals": INTERVALS, "schedule.min_clients": len(CLIENTS)}
# 3 MB, which a link of 10 Mbit/s carries in 2.4 s.
WIDE = {"model.block_out_channels": [32, 64], "model.attention_head_dim": 8}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def link() -> Iterator[Link]:
    """A network of its own, which is linked to the rest of this machine."""
    if why := links.missing():
        pytest.skip(why)
    with links.linked() as made:
        yield made


def behind(link: Link, name: str, processes: Processes, **settings: object) -> Site:
    """A federation one of whose participants is on the other side of ``link``."""
    listens = {"cloud": link.inside} if name == "cloud" else dict.fromkeys(EDGES, link.outside)
    site = Site(processes, {**SETTINGS, **settings}, hosts=listens)
    site.prefixes[name] = link.prefix
    return site


@pytest.mark.parametrize("name", ["cloud", "client-0"])
def test_a_link_is_cut_for_a_minute(link: Link, name: str, processes: Processes) -> None:
    site = behind(link, name, processes).begin()
    link.cut()
    time.sleep(CUT_S)
    link.mend()
    site.check_end()
    last = site.events("interval")[-1]
    assert last["edge_weights"].keys() == set(EDGES)
    assert last["clients"] == list(CLIENTS)


@pytest.mark.parametrize("name", ["cloud", "client-0"])
def test_a_link_of_ten_megabits(link: Link, name: str, processes: Processes) -> None:
    link.slow(10)
    site = behind(link, name, processes, **WIDE).begin()
    site.check_end()
    assert not any(event["failures"] for event in site.events("interval"))


def test_a_client_is_killed_while_it_uploads(link: Link, processes: Processes) -> None:
    site = behind(link, "client-0", processes, **WIDE).begin()
    link.slow(0.5)
    # More than questions and heartbeats: the weights are under way.
    before = link.sent_bytes()
    while link.sent_bytes() < before + 200_000:
        time.sleep(0.05)
    os.killpg(site.programs["client-0"].pid, 9)
    site.programs["client-0"].wait_exit()
    link.mend()
    site.start("client-0")
    site.check_end()
    failures = [why for event in site.events("interval") for why in event["failures"]]
    assert any(why.startswith("client-0: ") for why in failures)
    assert site.events("interval")[-1]["clients"] == list(CLIENTS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free; returns the file whose removal makes room again."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 10, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError:
                continue
    return filler


@pytest.mark.parametrize("name", ["client-0", "edge-1"])
def test_the_disk_of_one_participant_is_full(
    name: str, small_disk: Path, processes: Processes
) -> None:
    site = Site(processes, SETTINGS)
    site.folders[name] = small_disk
    site.begin()
    filler = fill(small_disk)
    site.programs["cloud"].wait_line(rf"without {name}: .*No space left on device")
    filler.unlink()
    site.check_end()
    assert site.events("interval")[-1]["clients"] == list(CLIENTS)


def test_the_disk_of_the_cloud_is_full(small_disk: Path, processes: Processes) -> None:
    site = Site(processes, SETTINGS)
    site.folders |= {"run": small_disk / "run", "cloud": small_disk / "cloud"}
    site.begin()
    site.programs["cloud"].wait_line(r"interval +2 of")
    filler = fill(small_disk)
    # The others hear why; a supervisor starts all of them again.
    codes = {name: program.wait_exit() for name, program in site.programs.items()}
    assert codes == dict.fromkeys(codes, 1)
    for program in site.programs.values():
        assert "No space left on device" in program.text
    # What the last interval had saved is whole.
    load_checkpoint(site.run_dir / "checkpoint")
    filler.unlink()
    for name in list(site.programs):
        site.start(name)
    site.check_end()
