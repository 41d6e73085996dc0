"""Processes that are not our children: which run, who started whom, and how to end them."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_POLL_S = 0.05
_PROC = Path("/proc")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, whose parent has yet to reap it, does not."""
    stat = _stat(pid)
    if stat is not None:
        return stat[0] != "Z"
    if (_PROC / "self").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def descendants(pid: int) -> set[int]:
    """Children of a process, their children and so on; none where there is no /proc."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in _PROC.glob("[0-9]*"):
        stat = _stat(int(entry.name))
        if stat is not None:
            children[int(stat[1])].append(int(entry.name))
    found: set[int] = set()
    parents = [pid]
    while parents:
        new = [child for child in children[parents.pop()] if child not in found]
        found.update(new)
        parents += new
    return found


def end(pids: Iterable[int], *, within_s: float) -> None:
    """Give processes ``within_s`` seconds to exit, then kill those that are left."""
    left = list(pids)
    deadline_s = time.monotonic() + within_s
    while (left := [pid for pid in left if alive(pid)]) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    for pid in left:
        # It may exit in between.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _stat(pid: int) -> list[str] | None:
    """State, parent and so on of a process, without its name, which may contain anything."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
