"""Looks for messages: close together when one is due, far apart between."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.memory import FakeTime

from fedphd.common.wire.rhythm import Rhythm


def looks(rhythm: Rhythm, time: FakeTime, until_s: float) -> list[float]:
    """When a node looks, in seconds from now, up to the first look after ``until_s``."""
    begun_s, found = time.now_s, list[float]()
    while not found or found[-1] < until_s:
        time.sleep(rhythm.next_s())
        found.append(time.now_s - begun_s)
    return found


def lived(gaps: list[float]) -> tuple[Rhythm, FakeTime]:
    """A rhythm that has met these gaps after messages of kind "train"."""
    time = FakeTime()
    rhythm = Rhythm(time.clock)
    for gap_s in gaps:
        rhythm.answered("train")
        time.sleep(gap_s)
        rhythm.came()
    rhythm.answered("train")
    return rhythm, time


def test_at_first_it_looks_often_and_then_at_a_share_of_the_time_waited() -> None:
    rhythm, time = lived([])
    assert rhythm.next_s() == 0.02
    time.sleep(5.0)
    assert rhythm.next_s() == pytest.approx(0.1)
    time.sleep(100.0)
    assert rhythm.next_s() == 0.5


def test_what_is_due_is_found_soon_by_few_looks() -> None:
    rhythm, time = lived([10.0, 10.4])
    found = looks(rhythm, time, 10.2)
    assert found[-1] - 10.2 <= 0.21
    # By looks every 0.15 s there were 68.
    assert len(found) <= 20
    # Halves of the 9 s before the first window, 2 s at the most.
    assert found[:3] == pytest.approx([2.0, 4.0, 6.0])


def test_between_two_usual_times_it_looks_seldom() -> None:
    """A node that is not drawn waits for the next round: the gap is a short or a long one."""
    rhythm, time = lived([1.0, 20.0])
    found = looks(rhythm, time, 20.0)
    assert len([at for at in found if 1.2 < at < 17.0]) <= 9
    assert max(b - a for a, b in pairwise(found)) <= 2.0 + 1e-9
    assert found[-1] - 20.0 <= 0.4


def test_in_a_hurry_it_looks_often_until_a_message_has_come() -> None:
    rhythm, time = lived([10.0])
    time.sleep(2.0)
    assert rhythm.next_s() == 2.0
    rhythm.hurry()
    assert rhythm.next_s() == 0.02
    time.sleep(3.0)
    assert rhythm.next_s() == pytest.approx(0.1)
    rhythm.came()
    rhythm.answered("train")
    assert rhythm.next_s() == 2.0


def test_what_comes_later_than_ever_is_looked_for_at_a_share_of_the_time_waited() -> None:
    rhythm, time = lived([10.0])
    time.sleep(50.0)
    assert rhythm.next_s() == pytest.approx(1.0)
    time.sleep(500.0)
    assert rhythm.next_s() == 2.0


def test_kinds_of_messages_have_their_own_times() -> None:
    rhythm, time = lived([10.0])
    rhythm.answered("query")
    assert rhythm.next_s() == 0.02
    time.sleep(1.0)
    rhythm.came()
    rhythm.answered("train")
    assert rhythm.next_s() == 2.0


def test_only_the_last_gaps_count() -> None:
    rhythm, _ = lived([100.0] + [0.5] * 8)
    assert rhythm.next_s() == pytest.approx(0.225)
