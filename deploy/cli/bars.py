"""A bar on the terminal while something takes long: sampling, reading data, statistics."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedphd.common.working import telling

AFTER_S = 5.0


class Bar:
    """A bar that appears once the work has taken ``after_s`` seconds, and leaves no trace.

    It shows ``what`` until the work itself tells what it does, and how far it is.
    """

    def __init__(self, what: str, console: Console, after_s: float) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        # Without a total it moves to and fro.
        self._task = self._progress.add_task(what, total=None)
        self._what = what
        self._lock = threading.Lock()
        self._over = False
        self._timer = threading.Timer(after_s, self._appear)
        self._timer.daemon = True

    def _appear(self) -> None:
        with self._lock:
            if not self._over:
                self._progress.start()

    def tell(self, what: str, done: int, total: int) -> None:
        """The work says how far it is; as a ``tracking.Listener``."""
        if what != self._what:
            self._what = what
            self._progress.reset(self._task, description=what)
        self._progress.update(self._task, completed=done, total=total)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Wait for the bar's time while the block works; the terminal is clean afterwards."""
        self._timer.start()
        try:
            with telling(self.tell):
                yield
        finally:
            self._timer.cancel()
            with self._lock:
                self._over = True
                self._progress.stop()


@contextmanager
def bar(what: str, *, after_s: float = AFTER_S) -> Iterator[None]:
    """Show a bar while the block works for longer than ``after_s``, if somebody can see it."""
    if not sys.stderr.isatty():
        yield
        return
    with Bar(what, Console(stderr=True), after_s).running():
        yield
