"""Shows a run on a terminal, refreshed in place, and keeps its lines in the run's folder."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from fedphd.common.config.roles import CloudConfig
from fedphd.common.errors import FedPhDError
from fedphd.deploy.launch.runs import LOGS, STOPPING, Say
from fedphd.deploy.live.follow import Follower
from fedphd.deploy.live.screen import draw

RUN_LOG = "run.log"
REFRESH_PER_S = 2.0
# Lines of processes that the picture shows anyway; all others are shown above it.
_ROUTINE = re.compile(
    r"(?P<node>\S+) +(listening on .*|(?P<server>\S+:\d+) connected|cloud \S+ connected|"
    r"ends: the run is over)|(data|running|resuming) .*|"
)
_SUMMARY = "finished; everything is in "
# How lines after it begin that belong to it.
_LAST = ("  ", "report ")
_LAST_HEIGHT = 24


def is_terminal() -> bool:
    """Whether the standard output is a terminal that can be refreshed in place."""
    return sys.stdout.isatty() and not Console().is_dumb_terminal


class Board:
    """What is seen of a run: its picture, lines that must be seen, and its last words.

    Any thread may tell it a line.
    """

    def __init__(self, folder: Path, *, foot: str) -> None:
        self.follower = Follower(folder)
        self._title, self._foot = str(folder), foot
        self._messages: list[str] = []
        self._taken = 0
        self._stopping = False
        self._words: list[str] = []
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """Take a line of a process: of an event, a message, or of the summary at the end."""
        with self._lock:
            self._poll()
            for part in line.split("\n"):
                if part.startswith(_SUMMARY) or (self._words and part.startswith(_LAST)):
                    self._words.append(part)
                elif not self.follower.shows(part):
                    self._judge(part)

    def _judge(self, line: str) -> None:
        """A line that is no event's: routine, or a message."""
        routine = _ROUTINE.fullmatch(line)
        if routine is None:
            self._message(line)
            self._stopping |= line.startswith(STOPPING)
        elif routine["server"]:
            self.follower.federation.is_there(routine["node"])

    def _poll(self) -> None:
        # Whoever tells a line must go on, whatever is in the logs.
        with suppress(OSError, ValueError, FedPhDError):
            self.follower.poll()
        new = self.follower.loud[self._taken :]
        self._taken += len(new)
        for line in new:
            self._message(line)

    def _message(self, line: str) -> None:
        # Who is being ended misses those who ended before.
        if not self._stopping:
            self._messages.append(line)

    def picture(self, width: int, height: int) -> RenderableType:
        """The run as it is now."""
        with self._lock:
            self._poll()
            return draw(
                self.follower.federation,
                self._title,
                self._messages,
                width=width,
                height=height,
                now=time.time(),
                foot=self._foot,
            )

    def last(self, console: Console) -> None:
        """What stays on the terminal: the messages, the run as it ended, and its last words."""
        height = min(_LAST_HEIGHT, console.height)
        with self._lock:
            self._poll()
            messages, self._messages, self._foot = self._messages, [], ""
        for line in messages:
            console.print(Text(line, style="yellow"))
        console.print(self.picture(console.width, height))
        if self._words:
            console.print(Text("\n".join(["", *self._words])))


@contextmanager
def refreshed(board: Board, console: Console) -> Iterator[None]:
    """Show ``board`` on the whole terminal until the block ends; then what stays of it."""
    live = Live(
        get_renderable=lambda: board.picture(console.width, console.height),
        console=console,
        screen=True,
        refresh_per_second=REFRESH_PER_S,
    )
    try:
        with live:
            yield
    finally:
        board.last(console)


@contextmanager
def shown(folder: Path, say: Say, config: CloudConfig, *, plain: bool) -> Iterator[Say]:
    """Yield what takes the lines of a local run in ``folder``, all of which go into its logs.

    They are said by ``say`` where ``plain`` is asked for or the output is no terminal, and else
    become a picture that is refreshed in place.
    """
    log = folder / LOGS / RUN_LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        if plain or not is_terminal():
            yield _both(say, file)
            return
        board = Board(folder, foot=f"Ctrl-C ends the run | every line: {log}")
        board.follower.expect(config)
        with refreshed(board, Console(highlight=False)):
            yield _both(board.say, file)


def _both(say: Say, file: TextIO) -> Say:
    lock = threading.Lock()

    def line(text: str) -> None:
        # Of threads that outlive the run, or on a full disk: the line is still said.
        with lock, suppress(OSError, ValueError):
            file.write(f"{text}\n")
            file.flush()
        say(text)

    return line
