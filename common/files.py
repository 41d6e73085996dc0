"""Files that are replaced as a whole: readers see the old content or the new, never a part."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

# A temporary file that nobody has written to for so long belongs to a process that was killed.
STALE_S: Final = 60.0

# By folder, as it was when this process first looked: temporary files by whose they are.
_left: dict[Path, dict[str, list[Path]]] = {}


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what is written there replaces ``path`` at the end.

    If the block raises, ``path`` stays as it was and the temporary file is removed; raises OSError
    where the file cannot be renamed.
    """
    # In the same folder, since a rename does not cross file systems; the process id keeps two
    # processes that write one file apart, not two threads of one.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    _remove_stale(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        # It is still there, too, where it is a second name of ``path``: a rename then does nothing.
        beside.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove what writers of ``path`` that were killed have left before this process looked."""
    if path.parent not in _left:
        _left[path.parent] = _temporary(path.parent)
    kept = []
    for left in _left[path.parent].pop(path.name, ()):
        pid = left.name.rpartition(".")[2]
        # Another machine's process may be writing here too, where the folder is shared.
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime <= STALE_S or _runs(int(pid)):
                kept.append(left)
            else:
                left.unlink()
    if kept:
        _left[path.parent][path.name] = kept


def _temporary(folder: Path) -> dict[str, list[Path]]:
    """What may be temporary files in ``folder``, by the names of the files that they replace."""
    found = defaultdict[str, list[Path]](list)
    # One look for all: the states of ten thousand clients lie in one folder.
    with suppress(OSError):
        for path in folder.iterdir():
            name, _, pid = path.name.rpartition(".")
            if name.startswith(".") and pid.isdecimal():
                found[name.removeprefix(".")].append(path)
    return found


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It is somebody else's.
        return True
    return True
