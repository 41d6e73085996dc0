"""Processes that are not our children: which run, who started whom, and how to end them."""

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
    if stat := _stat(pid):
        return stat[0] != "Z"
    if (_PROC / "self").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def started_ticks(pid: int) -> int | None:
    """When a running process began, in clock ticks since the machine did; None if it has ended.

    0 where there is no /proc.
    """
    if not alive(pid):
        return None
    # proc(5): starttime is field 22, of which the first two are cut off.
    return int(stat[19]) if (stat := _stat(pid)) else 0


def descendants(pid: int) -> set[int]:
    """Children of a process, their children and so on; none where there is no /proc."""
    children: dict[int, list[int]] = defaultdict(list)
    for child in (int(entry.name) for entry in _PROC.glob("[0-9]*")):
        if stat := _stat(child):
            children[int(stat[1])].append(child)
    found: set[int] = set()
    parents = [pid]
    while parents:
        new = set(children[parents.pop()]) - found
        found |= new
        parents += new
    return found


def end(pids: Iterable[int], *, within_s: float) -> None:
    """Give processes ``within_s`` seconds to exit, then kill those that are left."""
    deadline_s, left = time.monotonic() + within_s, list(pids)
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
