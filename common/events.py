"""What happened, as JSON lines that programs read and a supervisor's verdict file.

Every process appends events to a file of its own; whoever wants to show them to people reads
that file (``deploy/launch/render.py``). A process ends with a verdict, since Flower's exit codes
say nothing about a run.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedphd.common.errors import EXIT_OK, FedPhDError
from fedphd.common.files import replaced


class EventLog:
    """Appends one JSON object per line, flushed at once; several threads may write.

    Args:
        path: the file; its folder is made.
        role: "cloud", "edge" or "client".
        node: the participant's stable name.
        on_event: also told every event, such as to print it.
    """

    def __init__(
        self,
        path: Path,
        *,
        role: str,
        node: str,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._common = {"role": role, "node": node}
        self._on_event = on_event

    def sibling(self, *, role: str, node: str) -> EventLog:
        """A log of another participant in the same file, which the first one closes."""
        other = copy.copy(self)
        other._common = {"role": role, "node": node}
        return other

    def write(self, event: str, **values: Any) -> None:
        """Append an event; ``values`` must be JSON-able."""
        line = {"time": round(time.time(), 3), **self._common, "event": event, **values}
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._on_event(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True)
class Verdict:
    """How a process ended: its exit code, and why in one line."""

    exit_code: int = EXIT_OK
    message: str = "finished"


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as JSON; readers see all of it or nothing."""
    with replaced(path) as beside:
        beside.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Leave a process's verdict for whoever started it."""
    write_json(path, {"exit_code": verdict.exit_code, "message": verdict.message})


def read_verdict(path: Path) -> Verdict | None:
    """The verdict at ``path``, or None as long as there is none.

    Raises:
        FedPhDError: the file holds something else.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text)
        return Verdict(int(content["exit_code"]), str(content["message"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FedPhDError(f"{path} does not hold a verdict: {error}") from error
