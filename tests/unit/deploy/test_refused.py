"""A refusal of ``flwr run`` stands last, and without Flower's tracebacks."""

from __future__ import annotations

import logging
import threading

import pytest

from fedphd.common.errors import ConfigError
from fedphd.deploy.apps.refused import LastWord, stand_last

ERROR = ConfigError("--run-config: schedule.intervals = 'many'")


def record(text: str, *, cause: Exception | None = None) -> logging.LogRecord:
    exc_info = (type(cause), cause, None) if cause else None
    return logging.LogRecord("flwr", logging.ERROR, "", 0, text, None, exc_info)


def test_tracebacks_and_repetitions_of_the_reason_go() -> None:
    last = LastWord(ERROR)
    assert not last.filter(record("Traceback (most recent call last):\n  ..."))
    assert not last.filter(record(f"ServerApp thread raised an exception: {ERROR}"))
    assert last.filter(record("something else"))


def test_flowers_last_report_says_why() -> None:
    failed = record("Simulation raised an exception", cause=RuntimeError("in ServerApp thread"))
    assert LastWord(ERROR).filter(failed)
    assert failed.getMessage() == f"refused before the start: {ERROR}"
    assert failed.exc_info is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_that_end_with_the_refusal_print_nothing_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))
    logger = logging.getLogger("flwr")
    before = list(logger.filters)
    stand_last(ERROR)
    other = ValueError("other")

    def fail(error: Exception) -> None:
        raise error

    for error in (ERROR, other):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    for added in set(logger.filters) - set(before):
        logger.removeFilter(added)
    assert seen == [other]
