"""Waiting times that grow, and where time went."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.memory import FakeTime

from fedphd.common.timing import Backoff, Stopwatch


def test_backoff_doubles_up_to_its_limit() -> None:
    backoff = Backoff(0.1, 0.5)
    assert [backoff.next_s() for _ in range(4)] == [0.1, 0.2, 0.4, 0.5]
    backoff.reset()
    assert backoff.next_s() == 0.1


def test_phases_add_up_to_the_whole() -> None:
    time = FakeTime()
    watch = Stopwatch(time.clock)
    time.sleep(1.0)
    watch.lap("asking")

    def replies() -> Iterator[str]:
        time.sleep(2.0)
        yield "a"
        time.sleep(4.0)
        yield "b"
        time.sleep(8.0)

    for _ in watch.waiting(replies(), "training", work="averaging"):
        time.sleep(0.5)
    time.sleep(0.25)
    watch.lap("averaging")
    assert watch.phases == pytest.approx({"asking": 1.0, "training": 14.0, "averaging": 1.25})
