"""Freed memory stays in the process, for the next network.

glibc gives a block as large as a network back to the system at once. Then every copy of one begins
in new memory, each page of which is a fault: four times the time of the copying itself on a virtual
machine (docs/performance.md).
"""

import ctypes
import os
from collections.abc import Mapping
from typing import Final

# Freed memory beyond this, at the heap's end, goes back to the system.
_MOST_KEPT: Final = 1 << 30
# All blocks come from one heap, none is a mapping of its own: what one thread freed serves another.
# By mallopt's numbers (malloc.h) and by the names that glibc reads when a process starts.
_SETTINGS: Final = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, _MOST_KEPT),
}
_TUNABLES: Final = "GLIBC_TUNABLES"


def allocator_environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for a process to be started; none where ``given`` ones choose for themselves."""
    if _is_chosen(given):
        return {}
    return {name: str(value) for name, (_, value) in _SETTINGS.items()}


def keep_freed_memory(given: Mapping[str, str] = os.environ) -> None:
    """The same for this process, where its C library can; to be called before there are threads."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not _is_chosen(given):
        for number, value in _SETTINGS.values():
            mallopt(number, value)


def _is_chosen(given: Mapping[str, str]) -> bool:
    return any(name in given for name in (_TUNABLES, *_SETTINGS))
