"""What a person sees on a terminal: a federation that is refreshed in place."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from support.happened import append, half_a_run, interval, over, peer, write_run
from support.processes import MARK, SLOW_S, Processes, command_of
from support.terminal import Terminal
from support.tiny import CLASSES_PER_CLIENT, TINY, flags

FEDPHD = (sys.executable, "-m", "fedphd.deploy.cli")
NARROW, WIDE = (80, 24), (200, 50)


def is_whole(text: str, columns: int, rows: int) -> bool:
    """Whether one picture, and nothing but it, fills the screen from its first line on."""
    lines = text.split("\n")
    heads = [line for line in lines if "interval 1 of 3 | " in line]
    feet = [line for line in lines if line.startswith("Ctrl-C")]
    return len(heads) == len(feet) == 1 and len(lines) == rows and max(map(len, lines)) <= columns


def test_top_follows_a_run_through_resizes_to_its_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", half_a_run())
    with Terminal([*FEDPHD, "top", str(run)], *NARROW) as terminal:
        text = terminal.wait_for(lambda text: "client-5" in text)
        assert is_whole(text, *NARROW)
        assert terminal.is_alternate
        assert not terminal.has_cursor
        for size in (WIDE, (60, 15), NARROW):
            terminal.resize(*size)
            terminal.wait_for(lambda text, size=size: is_whole(text, *size))  # type: ignore[misc]
        append(run / "metrics.jsonl", [peer(13, "edge-1", "client-1", "failed", "no heartbeat")])
        text = terminal.wait_for(lambda text: "no heartbeat" in text)
        assert text.startswith("! edge-1    client-1 failed: no heartbeat")
        append(run / "metrics.jsonl", [interval(20, 1), over(21)])
        assert terminal.wait_exit() == 0
        assert not terminal.is_alternate
        assert terminal.has_cursor
        assert "edge-1    client-1 failed: no heartbeat" in terminal.text
        assert "interval 1 of 3 done | 21 s | finished" in terminal.text


def test_an_interrupt_leaves_top_and_a_clean_terminal(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", half_a_run())
    with Terminal([*FEDPHD, "top", str(run)], *NARROW) as terminal:
        terminal.wait_for(lambda text: "client-5" in text)
        # The first picture is there before the command has done all that it begins with.
        time.sleep(1.0)
        terminal.type("\x03")
        assert terminal.wait_exit() == 0
        assert (terminal.is_alternate, terminal.has_cursor) == (False, True)
        assert "Traceback" not in terminal.text


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", ["local", "simulate"])
def test_a_run_shows_itself_and_its_trouble_and_keeps_every_line(
    tmp_path: Path, command: str
) -> None:
    values = {**TINY, "schedule.intervals": 40, "device": "cpu"}
    run = tmp_path / "run"
    start = [*FEDPHD, command, "--run-dir", str(run), "--edges", "2", "--clients", "3"]
    classes = ["--classes-per-client", str(CLASSES_PER_CLIENT)]
    with (
        Processes(tmp_path) as processes,
        Terminal([*start, *classes, *flags(values)], *NARROW, {MARK: processes.mark}) as terminal,
    ):
        terminal.wait_for(lambda text: "starting" in text)
        trained = ("trains for", "answered in")
        terminal.wait_for(lambda text: any(map(text.__contains__, trained)), within_s=SLOW_S)
        if command == "local":
            victim = next(
                pid for pid in processes.running() if "client-1.toml" in " ".join(command_of(pid))
            )
            os.kill(victim, signal.SIGKILL)
            text = terminal.wait_for(lambda text: "! edge-" in text)
            assert "client-1" in text.splitlines()[0]
        terminal.type("\x03")
        assert terminal.wait_exit(120.0) == 130
        assert (terminal.is_alternate, terminal.has_cursor) == (False, True)
        end = "fedphd: interrupted" if command == "local" else "fedphd: stopped"
        assert end in terminal.text
        lines = (run / "logs" / "run.log").read_text("utf-8")
        assert ("listening on" if command == "local" else "running   flwr run") in lines
        assert "client-2 joined" in lines
