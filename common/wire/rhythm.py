"""When to look again for what comes over and over, without asking all the time."""

import time
from collections import deque
from collections.abc import Callable
from typing import Final

# A look costs a server about 1.5 ms of CPU (its signature is checked): with a hundred nodes that
# look every 0.15 s it would do nothing else.
_FIRST_S: Final = 0.02
_SOON_S: Final = 0.1
_NEAR_S: Final = 0.5
_FAR_S: Final = 2.0
# What is due is found at most this share of the time waited too late, beyond the first seconds.
_LATE: Final = 0.02
# What is due comes within this share of its usual time.
_SPREAD: Final = 0.1
_REMEMBERED: Final = 8


def near_s(waited_s: float) -> float:
    """Seconds until the next look for what is due, after ``waited_s`` seconds without it."""
    soon_s = min(max(waited_s / 2, _FIRST_S), _SOON_S)
    return min(max(_LATE * waited_s, soon_s), _NEAR_S)


class Rhythm:
    """Waiting times between looks for the next message.

    What follows a message of a kind comes about as long after it as it did before: at those times
    looks are close together (0.02 to 0.1 s, later 2% of the time waited, up to 0.5 s), between them
    far apart (half of the time until the next is due, up to 2 s). After ``hurry`` they are close
    together until a message has come, whatever came before.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._gaps: dict[str, deque[float]] = {}
        self._kind: str | None = None
        self._since_s = clock()
        self._hurried_s: float | None = None

    def hurry(self) -> None:
        """A message is due now, as its receiver has learnt elsewhere."""
        self._hurried_s = self._clock()

    def came(self) -> None:
        """A message has come."""
        self._hurried_s = None
        if self._kind is not None:
            gaps = self._gaps.setdefault(self._kind, deque(maxlen=_REMEMBERED))
            gaps.append(self._clock() - self._since_s)

    def answered(self, kind: str) -> None:
        """A message of this kind has been dealt with; the wait for the next begins."""
        self._kind, self._since_s = kind, self._clock()

    def next_s(self) -> float:
        """Seconds until the next look."""
        if self._hurried_s is not None:
            return near_s(self._clock() - self._hurried_s)
        waited_s = self._clock() - self._since_s
        gaps = self._gaps.get(self._kind or "", ())
        if not gaps or any(abs(waited_s - gap_s) <= _SPREAD * gap_s for gap_s in gaps):
            return near_s(waited_s)
        ahead_s = [left for g in gaps if (left := (1 - _SPREAD) * g - waited_s) > 0]
        if ahead_s:
            return min(max(min(ahead_s) / 2, near_s(waited_s)), _FAR_S)
        # Later than ever.
        return min(max(_LATE * waited_s, near_s(waited_s)), _FAR_S)
