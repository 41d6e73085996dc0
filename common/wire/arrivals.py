"""Wakes whoever waits for a reply within this process, so that nobody looks for it in vain."""

import threading
from collections.abc import Collection


class Arrivals:
    """What came and has not been taken, by message id; any thread tells, one waits for each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._came: set[str] = set()
        self._waiting: dict[str, threading.Event] = {}

    def tell(self, message_id: str) -> None:
        """The reply to this message is there."""
        with self._lock:
            self._came.add(message_id)
            if event := self._waiting.get(message_id):
                event.set()

    def forget(self, message_id: str) -> None:
        """The reply to this message was taken, or nobody waits for it any more."""
        with self._lock:
            self._came.discard(message_id)

    def wait(self, message_ids: Collection[str], seconds: float) -> None:
        """Return once a reply to one of these is there, after ``seconds`` at the latest.

        Each reply ends one wait only: whoever then finds nothing does not look all the time.
        """
        event = threading.Event()
        with self._lock:
            if came := self._came.intersection(message_ids):
                self._came -= came
                return
            self._waiting.update(dict.fromkeys(message_ids, event))
        event.wait(seconds)
        with self._lock:
            self._came.difference_update(message_ids)
            for message_id in message_ids:
                self._waiting.pop(message_id, None)
