"""How far long work is, told to whoever listens in this thread, as a log would be.

What works does not know who listens: a terminal's bar, a run's event log, or nobody.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")

# Called with what is done, how many steps of it are, and of how many.
Listener = Callable[[str, int, int], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


class Steps:
    """``total`` steps of work called ``what``; whoever listens hears of the first at once."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._listener = _listener.get()
        self.advance(0)

    def advance(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self._done += steps
        if self._listener:
            self._listener(self._what, self._done, self._total)


@contextmanager
def telling(listener: Listener) -> Iterator[None]:
    """Let ``listener`` hear of all work that this thread does in the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tracked(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Yield ``items``, of which there are ``total``; each counts as done when the next is asked."""
    steps = Steps(what, total)
    for item in items:
        yield item
        steps.advance()
