"""Lines of a local run: which become a picture, which are seen above it, and where all are kept."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from support.happened import append, half_a_run, over, peer, write_run

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.deploy.live.model import STARTS, THERE
from fedphd.deploy.live.show import Board, shown

ROUTINE = (
    "data      digits: 40 to 60 images per client",
    "edge-0    listening on 127.0.0.1:35169; cloud 127.0.0.1:47887",
    "edge-0    cloud 127.0.0.1:47887 connected",
    "client-4  127.0.0.1:35169 connected",
    "client-0  ends: the run is over",
    "",
)
SUMMARY = (
    "",
    "finished; everything is in runs/x",
    "  Frechet distance   352.2 -> 61.1",
    "  time 1 s",
)


def board_of(folder: Path) -> Board:
    return Board(folder, foot="leave")


def last(board: Board) -> str:
    console = Console(file=io.StringIO(), width=100, height=30)
    board.last(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def messages(board: Board) -> list[str]:
    """What is seen above the picture."""
    text = last(board)
    return text[: text.index(board_title(text))].splitlines()


def board_title(text: str) -> str:
    return next(line for line in text.splitlines() if " | " in line)


def test_routine_lines_and_those_of_events_are_not_seen(tmp_path: Path) -> None:
    board = board_of(write_run(tmp_path, half_a_run()))
    for line in (*ROUTINE, "edge-0    client-3 joined"):
        board.say(line)
    assert messages(board) == []


def test_every_other_line_and_trouble_are_seen_above_once(tmp_path: Path) -> None:
    board = board_of(write_run(tmp_path, half_a_run()))
    board.say("edge-0    refused a node without a registered key; see log")
    append(tmp_path / "metrics.jsonl", [peer(13, "edge-1", "client-1", "failed", "gone")])
    board.say("edge-1    client-1 failed: gone")
    board.say("client-2  127.0.0.1:1 lost, trying again")
    assert messages(board) == [
        "edge-0    refused a node without a registered key; see log",
        "edge-1    client-1 failed: gone",
        "client-2  127.0.0.1:1 lost, trying again",
    ]


def test_a_damaged_log_does_not_stop_what_is_said(tmp_path: Path) -> None:
    board = board_of(write_run(tmp_path, half_a_run()))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("{half a line\n")
    append(tmp_path / "metrics.jsonl", [peer(13, "edge-1", "client-1", "failed", "gone")])
    (tmp_path / "config.json").write_text("x", encoding="utf-8")
    for line in ("client-2  127.0.0.1:1 lost, trying again", "edge-0    refused somebody"):
        board.say(line)
    assert "edge-0    refused somebody" in messages(board)


def test_a_client_that_reached_an_edge_no_longer_starts(tmp_path: Path) -> None:
    board = board_of(write_run(tmp_path, []))
    board.say("client-4  127.0.0.1:35169 connected")
    clients = board.follower.federation.clients
    assert (clients["client-4"].state, clients["client-3"].state) == (THERE, STARTS)


def test_while_everybody_is_ended_nobody_complains(tmp_path: Path) -> None:
    board = board_of(write_run(tmp_path, half_a_run()))
    board.say("stopping  9 processes")
    board.say("client-1  127.0.0.1:1 lost, trying again")
    append(tmp_path / "metrics.jsonl", [over(20, 130, "stopped")])
    assert messages(board) == ["stopping  9 processes"]


def test_the_summary_stays_below_the_last_picture(tmp_path: Path) -> None:
    board = board_of(write_run(tmp_path, [*half_a_run(), over(20)]))
    for line in (*SUMMARY, "edge-0    ends: the run is over"):
        board.say(line)
    text = last(board)
    assert "leave" not in text
    assert text.endswith("\n".join(SUMMARY) + "\n")
    assert "client-5" in text


def test_without_a_terminal_lines_are_said_as_they_are_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    config = load_config(CloudConfig)
    for _ in range(2):
        with shown(tmp_path, said.append, config, plain=False) as say:
            for line in (*ROUTINE, *SUMMARY):
                say(line)
    assert said == [*ROUTINE, *SUMMARY] * 2
    assert (tmp_path / "logs" / "run.log").read_text("utf-8").splitlines() == said
    assert capsys.readouterr().out == ""
    # Of a thread that ends after the run.
    say("late")
    assert said[-1] == "late"
