"""Work beside the run: it does not hold the run up, and its errors are not lost."""

from __future__ import annotations

import os
import threading

import pytest

from fedphd.common.errors import FedPhDError
from fedphd.server.background import Background


def test_a_job_runs_beside_its_caller_at_low_priority() -> None:
    beside, go = Background(), threading.Event()
    priorities = []

    def job() -> None:
        assert go.wait(10)
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    ours = os.getpriority(os.PRIO_PROCESS, 0)
    beside.start(job)
    # Only a caller that is not held up comes this far.
    go.set()
    assert beside.wait() < 10
    assert priorities == [10]
    assert os.getpriority(os.PRIO_PROCESS, 0) == ours


def test_a_job_that_somebody_looks_for_has_its_callers_priority() -> None:
    beside, ours = Background(), os.getpriority(os.PRIO_PROCESS, 0)
    priorities = []
    beside.start(
        lambda: priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())),
        awaited=True,
    )
    beside.wait()
    assert priorities == [ours]


def test_a_long_wait_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedphd.server.background.LONG_S", 0.05)
    beside, go, told = Background(), threading.Event(), list[str]()

    def on_long() -> None:
        told.append("long")
        go.set()

    beside.start(lambda: go.wait(10) and None)
    beside.wait(on_long)
    beside.start(lambda: None)
    beside.wait(on_long)
    assert told == ["long"]


def test_there_is_nothing_to_wait_for_at_first() -> None:
    assert Background().wait() < 1


def test_an_error_of_the_job_is_the_callers_once() -> None:
    beside = Background()

    def job() -> None:
        raise FedPhDError("not finite")

    beside.start(job)
    with pytest.raises(FedPhDError, match="not finite"):
        beside.wait()
    beside.wait()


def test_jobs_come_one_after_the_other() -> None:
    beside, go = Background(), threading.Event()
    beside.start(lambda: go.wait(10) and None)
    with pytest.raises(RuntimeError, match="not been waited for"):
        beside.start(lambda: None)
    go.set()
    beside.wait()
    beside.start(lambda: None)
    beside.wait()
