"""Waiting: growing intervals between tries, and a delayed stop; and where time went."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


class Backoff:
    """Waiting times that double from ``first_s`` to ``last_s``; ``reset`` on success."""

    def __init__(self, first_s: float, last_s: float) -> None:
        self._first_s, self._last_s = first_s, last_s
        self._next_s = first_s

    def reset(self) -> None:
        """Begin again with the shortest wait."""
        self._next_s = self._first_s

    def next_s(self) -> float:
        """The next waiting time in seconds."""
        now_s, self._next_s = self._next_s, min(2 * self._next_s, self._last_s)
        return now_s


def stop_soon(stop: threading.Event, after_s: float) -> None:
    """Set ``stop`` after ``after_s`` seconds, in which a last reply can still reach the server.

    Flower drops the replies of a node that has left.
    """
    timer = threading.Timer(after_s, stop.set)
    timer.daemon = True
    timer.start()


class Stopwatch:
    """Divides the time from its making among phases, which follow one another.

    Args:
        clock: monotonic seconds.

    Attributes:
        phases: seconds of each phase.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.phases: dict[str, float] = {}
        self._clock = clock
        self._last_s = clock()

    def lap(self, phase: str) -> None:
        """The time since the last call was spent on ``phase``."""
        last_s, self._last_s = self._last_s, self._clock()
        self.phases[phase] = self.phases.get(phase, 0.0) + self._last_s - last_s

    def waiting(self, items: Iterable[ItemT], phase: str, *, work: str) -> Iterator[ItemT]:
        """``items``; until one comes is time for ``phase``, what is done with it is ``work``."""
        for item in items:
            self.lap(phase)
            yield item
            self.lap(work)
        self.lap(phase)
