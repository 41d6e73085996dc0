"""A bar for what takes long, where somebody can see it."""

from __future__ import annotations

import io
import sys
import threading

import pytest
from rich.console import Console

from fedphd.common.working import Steps
from fedphd.deploy.cli.bars import Bar, bar


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_short_work_shows_nothing() -> None:
    console = terminal()
    with Bar("reading data", console, after_s=600.0).running():
        Steps("sampling", 2).advance()
    assert written(console) == ""


def test_long_work_shows_how_far_it_is_and_leaves_the_cursor() -> None:
    console = terminal()
    appeared = threading.Event()

    class Seen(Bar):
        def _appear(self) -> None:
            super()._appear()
            appeared.set()

    with Seen("reading data", console, after_s=0.0).running():
        steps = Steps("sampling", 4)
        assert appeared.wait(60.0)
        steps.advance()
    text = written(console)
    assert "sampling" in text
    assert "25%" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_where_nobody_sees_it_there_is_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with bar("reading data", after_s=0.0):
        Steps("sampling", 4)
    assert capsys.readouterr().err == ""
