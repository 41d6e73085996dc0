"""Waiting: growing intervals between tries, and a delayed stop."""

import threading


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
