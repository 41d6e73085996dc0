"""Waiting times that grow."""

from __future__ import annotations

from fedphd.common.timing import Backoff


def test_backoff_doubles_up_to_its_limit() -> None:
    backoff = Backoff(0.1, 0.5)
    assert [backoff.next_s() for _ in range(4)] == [0.1, 0.2, 0.4, 0.5]
    backoff.reset()
    assert backoff.next_s() == 0.1
