"""Events, as JSON lines that programs read, and the verdict that a process leaves.

Every process appends events to a file of its own, which ``deploy/launch/render.py`` shows to
people. A process ends with a verdict, since Flower's exit codes say nothing about a run.
"""

import copy
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import BaseModel

from fedphd.common.errors import EXIT_OK, FedPhDError, telling
from fedphd.common.files import replaced


class Event(BaseModel):
    """Base of all events (``common/history/events.py``); who and when is filled in by the log."""

    time: float = 0.0
    role: str = ""
    node: str = ""
    event: str


class EventLog:
    """Appends one JSON object per line, flushed at once; several threads may write.

    Args:
        path: the file; its folder is made.
        role, node: "cloud", "edge" or "client", and the participant's stable name.
        on_event: is called with every event, for example to print it.
        before: the participant's events that the file holds already.

    Attributes:
        count: events of this participant in the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        role: str,
        node: str,
        on_event: Callable[[Event], None] = lambda event: None,
        before: int = 0,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Nothing stays in a buffer that could not be written.
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._common = {"role": role, "node": node}
        self._on_event = on_event
        self.count = before

    def sibling(self, *, role: str, node: str) -> Self:
        """A log of another participant in the same file, which the first one closes."""
        other = copy.copy(self)
        other._common = {"role": role, "node": node}
        other.count = 0
        return other

    @telling("its event log cannot be written")
    def write(self, event: Event) -> None:
        """Append an event, stamped with the time and the log's participant.

        Raises:
            FedPhDError: the file cannot be written, such as on a full disk; it holds no part of
                the event then.
        """
        stamped = event.model_copy(update={"time": round(time.time(), 3), **self._common})
        with self._lock:
            self._append(json.dumps(stamped.model_dump(mode="json")).encode() + b"\n")
            self.count += 1
        self._on_event(stamped)

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            # A disk that gets full takes a part of it first.
            while line := line[self._file.write(line) :]:
                pass
        except OSError as error:
            self._file.truncate(size)
            raise FedPhDError(
                f"{self._file.name} cannot be written: {error.strerror}; make room there"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a process ended: its exit code, and the reason in one line."""

    exit_code: int = EXIT_OK
    message: str = "finished"


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as JSON; readers see all of it or nothing."""
    with replaced(path) as beside:
        beside.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Leave a process's verdict for the process that started it."""
    write_json(path, dataclasses.asdict(verdict))


def read_verdict(path: Path) -> Verdict | None:
    """The verdict at ``path``, or None if there is none yet; raises FedPhDError if malformed."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return Verdict(int(content["exit_code"]), str(content["message"]))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise FedPhDError(f"{path} is not a verdict: {error}") from error
