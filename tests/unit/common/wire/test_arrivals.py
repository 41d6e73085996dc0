"""Who waits for replies within a process is woken by those, and by no others."""

from __future__ import annotations

import threading
import time

from support.waiting import HANG_S

from fedphd.common.wire.arrivals import Arrivals

# A wait that nothing ends; and more than one that is ended takes on a busy machine.
SHORT_S, PROMPT_S = 0.05, HANG_S / 4


def waited_s(arrivals: Arrivals, *message_ids: str, most_s: float = HANG_S) -> float:
    started_s = time.monotonic()
    arrivals.wait(message_ids, most_s)
    return time.monotonic() - started_s


def test_what_came_before_ends_one_wait() -> None:
    arrivals = Arrivals()
    arrivals.tell("b")
    assert waited_s(arrivals, "a", "b", "c") < PROMPT_S
    assert waited_s(arrivals, "a", "b", "c", most_s=SHORT_S) >= SHORT_S


def test_what_comes_ends_the_wait_of_whoever_waits_for_it() -> None:
    arrivals, ended = Arrivals(), threading.Event()

    def waiting() -> None:
        arrivals.wait(["a", "b"], HANG_S)
        ended.set()

    thread = threading.Thread(target=waiting)
    thread.start()
    arrivals.tell("c")
    assert not ended.wait(SHORT_S)
    arrivals.tell("b")
    assert ended.wait(PROMPT_S)
    thread.join(HANG_S)
    # It was woken by it, so it counts no more; what nobody has waited for does.
    assert waited_s(arrivals, "b", most_s=SHORT_S) >= SHORT_S
    assert waited_s(arrivals, "c") < PROMPT_S


def test_what_was_taken_wakes_nobody() -> None:
    arrivals = Arrivals()
    arrivals.tell("a")
    arrivals.forget("a")
    assert waited_s(arrivals, "a", most_s=SHORT_S) >= SHORT_S
