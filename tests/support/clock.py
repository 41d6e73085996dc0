"""Clocks that jump, of single programs: the machine's own stays as it is."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Self

SOURCE = Path(__file__).with_name("clock.c")


def missing() -> str | None:
    """Why no clock can be made to jump here; None if it can."""
    return None if shutil.which("gcc") else "a clock that jumps is made by gcc, which is not here"


class Clock:
    """The time of day as the programs see it that are started with ``prefix``.

    Attributes:
        prefix: what their commands begin with.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / "clock.so"
        command = ["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        self._file = folder / "clock"
        self._file.write_bytes(struct.pack("q", 0))
        self.prefix = ("env", f"LD_PRELOAD={library}", f"FEDPHD_CLOCK={self._file}")

    def jump(self, to_s: float) -> Self:
        """Set it ``to_s`` seconds ahead of this machine's."""
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("q", int(to_s * 1e9)))
        return self
