"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

# For what hangs; nothing that works takes nearly as long, on however busy a machine.
HANG_S = 120.0


def wait_until(condition: Callable[[], bool], *, within_s: float = HANG_S) -> None:
    """Return as soon as ``condition()`` holds; fail if it does not within ``within_s``."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s"
        time.sleep(0.02)
