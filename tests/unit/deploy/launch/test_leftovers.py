"""What a killed launcher left running is ended by the next one, and nothing else is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedphd.common.errors import StartError
from fedphd.deploy.launch.leftovers import PROCESSES, Process, Processes, claimed

# Says that it is ready, then sleeps, deaf to SIGTERM.
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def deaf() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that must be killed, and its child."""
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        of_child = Process.of(child)
        yield process, child
        process.kill()
    # Most tests leave it alone, and nobody else would end it.
    if of_child and of_child.runs:
        os.kill(child, signal.SIGKILL)


def record(folder: Path, launcher: Process | None, *started: Process | None) -> None:
    processes = [process.model_dump() for process in started if process]
    content = {"launcher": launcher and launcher.model_dump(), "started": processes}
    (folder / PROCESSES).write_text(json.dumps(content), encoding="utf-8")


def test_what_a_dead_launcher_left_is_ended_with_its_children(
    tmp_path: Path, deaf: tuple[subprocess.Popen[str], int]
) -> None:
    process, child = deaf
    dead = Process(pid=process.pid, started=1)
    assert not dead.runs
    of_child = Process.of(child)
    assert of_child is not None
    record(tmp_path, dead, Process.of(process.pid))
    Processes(tmp_path)
    assert process.wait(5) == -9
    deadline_s = time.monotonic() + 10
    while of_child.runs:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_number_that_another_process_has_by_now_is_left_alone(
    tmp_path: Path, deaf: tuple[subprocess.Popen[str], int]
) -> None:
    process, _ = deaf
    record(tmp_path, None, Process(pid=process.pid, started=1))
    Processes(tmp_path)
    assert process.poll() is None


def test_a_folder_that_a_living_launcher_uses_is_refused(
    tmp_path: Path, deaf: tuple[subprocess.Popen[str], int]
) -> None:
    process, child = deaf
    record(tmp_path, Process.of(process.pid), Process.of(child))
    with pytest.raises(StartError, match=f"state_dir = .*: process {process.pid} uses it; stop"):
        Processes(tmp_path)
    assert Process.of(child) is not None


def test_a_claimed_folder_is_refused_to_others_by_its_name_and_free_again_afterwards(
    tmp_path: Path, deaf: tuple[subprocess.Popen[str], int]
) -> None:
    process, _ = deaf
    record(tmp_path, Process.of(process.pid))
    text = f"a folder = .*: process {process.pid} uses it; stop"
    with pytest.raises(StartError, match=text), claimed(tmp_path, name="a folder"):
        pass
    assert (tmp_path / PROCESSES).exists()
    own = tmp_path / "own"
    with claimed(own, name="a folder"):
        written = json.loads((own / PROCESSES).read_text("utf-8"))
        assert written["launcher"]["pid"] == os.getpid()
        # What it starts itself may use the folder too.
        Processes(own)
    assert not (own / PROCESSES).exists()


def test_a_folder_that_cannot_be_written_to_cannot_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    folder, text = tmp_path / "file" / "x", r"a folder = .*file/x: cannot be written to: Not a dir"
    with pytest.raises(StartError, match=text), claimed(folder, name="a folder"):
        pass


@pytest.mark.parametrize("text", ["", "{", '{"launcher": 3}'])
def test_a_damaged_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / PROCESSES).write_text(text, encoding="utf-8")
    Processes(tmp_path).add(os.getpid())
    content = json.loads((tmp_path / PROCESSES).read_text("utf-8"))
    assert content["launcher"]["pid"] == os.getpid()


def test_after_an_orderly_end_nothing_is_recorded(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    processes.add(os.getpid())
    assert len(json.loads((tmp_path / PROCESSES).read_text("utf-8"))["started"]) == 1
    processes.close()
    assert not (tmp_path / PROCESSES).exists()
