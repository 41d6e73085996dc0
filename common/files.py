"""Files that are replaced as a whole: readers see the old content or the new, never a part."""

import glob
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

# A temporary file that nobody has written to for so long belongs to a process that was killed.
STALE_S: Final = 60.0

_looked_at: set[Path] = set()


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what is written there replaces ``path`` at the end.

    If the block raises, ``path`` stays as it was and the temporary file is removed; raises OSError
    where the file cannot be renamed.
    """
    # In the same folder, since a rename does not cross file systems; the process id keeps two
    # writers of one file apart.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    _remove_stale(path)
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _remove_stale(path: Path) -> None:
    """Remove what writers of ``path`` that were killed have left, once in this process."""
    if path in _looked_at:
        return
    _looked_at.add(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        pid = left.name.rpartition(".")[2]
        # Another machine's process may be writing here too, where the folder is shared.
        with suppress(FileNotFoundError):
            stale = time.time() - left.stat().st_mtime > STALE_S
            if stale and pid.isdecimal() and not _runs(int(pid)):
                left.unlink()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It is somebody else's.
        return True
    return True
