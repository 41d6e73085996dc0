"""Files that are replaced as a whole: readers see the old content or the new, never a part."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what is written there replaces ``path`` at the end.

    If the block raises, ``path`` stays as it was and the temporary file is removed; raises OSError
    where the file cannot be renamed.
    """
    # In the same folder, since a rename does not cross file systems; the process id keeps two
    # writers of one file apart.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
