"""Work beside the run, for which the run need not wait: samples and distance of a snapshot."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

# Training on the same machine goes first, as long as it has something to do.
_NICENESS: Final = 10
LONG_S: Final = 5.0


class Background:
    """One job at a time, in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None], *, awaited: bool = False) -> None:
        """Begin a job; the one before it has been waited for.

        It has a low priority, unless it is ``awaited`` by somebody who looks on.
        """
        if self._thread is not None:
            raise RuntimeError("the job before has not been waited for")
        # A process that is told to end does not wait for it.
        self._thread = threading.Thread(target=self._run, args=(job, awaited), daemon=True)
        self._thread.start()

    def wait(self, on_long: Callable[[], None] = lambda: None) -> float:
        """Wait for the job, if there is one; returns for how many seconds.

        ``on_long`` is called where it takes more than ``LONG_S``. Raises what the job raised.
        """
        started_s = time.monotonic()
        if self._thread is not None:
            self._thread.join(LONG_S)
            if self._thread.is_alive():
                on_long()
                self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return time.monotonic() - started_s

    def _run(self, job: Callable[[], None], awaited: bool) -> None:
        if not awaited:
            # On Linux the priority is the thread's, and that of threads which it starts.
            with suppress(OSError, AttributeError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            job()
        except BaseException as error:
            self._error = error
