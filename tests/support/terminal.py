"""A command on a terminal of its own, whose screen a test can read, resize and type into."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import pyte
from support.waiting import HANG_S, wait_until

# The command gets the terminal as its controlling one, so that Ctrl-C reaches it.
_LOGIN = "import os, sys; os.login_tty(0); os.execvp(sys.argv[1], sys.argv[1:])"
_ALTERNATE = 1049


class _Screen(pyte.Screen):
    """Also knows whether a program has the alternate screen, which pyte ignores."""

    is_alternate = False

    def set_mode(self, *modes: int, **kwargs: bool) -> None:
        self.is_alternate |= _ALTERNATE in modes
        super().set_mode(*modes, **kwargs)

    def reset_mode(self, *modes: int, **kwargs: bool) -> None:
        self.is_alternate &= _ALTERNATE not in modes
        super().reset_mode(*modes, **kwargs)


class Terminal:
    """Runs ``command`` on a terminal of so many columns and rows.

    Attributes:
        process: the command.
    """

    def __init__(
        self,
        command: Sequence[str],
        columns: int,
        rows: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._master, slave = pty.openpty()
        self._screen = _Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self._set_size(columns, rows)
        kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOGIN, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**kept, "TERM": "xterm-256color", **(environment or {})},
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._master)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                # The last process that had the terminal has ended.
                return
            with self._lock:
                self._stream.feed(data)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size; its program gets the signal for that."""
        with self._lock:
            self._screen.resize(rows, columns)
        self._set_size(columns, rows)

    def type(self, keys: str) -> None:
        """What somebody types, such as Ctrl-C as "\\x03"."""
        os.write(self._master, keys.encode())

    @property
    def lines(self) -> list[str]:
        """What the screen shows, without the blanks at the ends."""
        with self._lock:
            return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        """All lines that the screen shows."""
        return "\n".join(self.lines)

    @property
    def has_cursor(self) -> bool:
        """Whether the cursor is seen."""
        return not self._screen.cursor.hidden

    @property
    def is_alternate(self) -> bool:
        """Whether a program has the screen for itself."""
        return self._screen.is_alternate

    def wait_for(self, condition: Callable[[str], bool], *, within_s: float = HANG_S) -> str:
        """Wait until what is shown meets ``condition``; returns it."""
        found: list[str] = []

        def seen() -> bool:
            text = self.text
            if condition(text):
                found.append(text)
            return bool(found)

        try:
            wait_until(seen, within_s=within_s)
        except AssertionError:
            raise AssertionError(f"the screen still shows:\n{self.text}") from None
        return found[0]

    def wait_exit(self, within_s: float = HANG_S) -> int:
        """The command's exit code; all that it wrote is on the screen then."""
        code = self.process.wait(within_s)
        self._reader.join()
        return code
