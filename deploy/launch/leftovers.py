"""What a killed launcher left running: written down as it starts, ended by the next launcher.

A launcher that gets SIGKILL cannot end its SuperLink, nor the ServerApp below it. Both end by
themselves, but take seconds, in which they hold the port and write into the state folder.
"""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError

from fedphd.common.errors import StartError
from fedphd.common.files import replaced
from fedphd.deploy.launch.processes import descendants, end, started_ticks

PROCESSES = "processes.json"
END_S = 3.0


class Process(BaseModel):
    """A process that cannot be taken for a later one with the same number."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The process that runs as ``pid`` now, if any."""
        started = started_ticks(pid)
        return None if started is None else cls(pid=pid, started=started)

    @property
    def runs(self) -> bool:
        """Whether it still does."""
        return started_ticks(self.pid) == self.started


class _Running(BaseModel):
    launcher: Process | None = None
    started: list[Process] = []


class Processes:
    """The processes of a launcher, in a file in its state folder.

    Raises:
        StartError: a launcher that still runs uses the folder.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / PROCESSES
        before = self._read()
        if before.launcher and before.launcher.runs and before.launcher.pid != os.getpid():
            raise StartError(
                f"state_dir = {state_dir}: process {before.launcher.pid} uses it; stop that "
                "process, or choose another folder"
            )
        end_processes(process.pid for process in before.started if process.runs)
        self._running = _Running(launcher=Process.of(os.getpid()))

    def add(self, pid: int) -> None:
        """Write down a process that was started."""
        if process := Process.of(pid):
            self._running.started.append(process)
            with replaced(self._path) as beside:
                beside.write_text(self._running.model_dump_json(), encoding="utf-8")

    def close(self) -> None:
        """Forget all of them: they have ended."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> _Running:
        try:
            return _Running.model_validate_json(self._path.read_text("utf-8"))
        except (FileNotFoundError, ValidationError):
            return _Running()


def end_processes(pids: Iterable[int], *, within_s: float = END_S) -> None:
    """End processes and all that they started, by force after ``within_s`` seconds."""
    chosen = set(pids)
    below = set().union(*map(descendants, chosen))
    for pid in chosen:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    end(chosen | below, within_s=within_s)
