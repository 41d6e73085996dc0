"""What a killed launcher left running: written down as it starts, ended by the next launcher.

A launcher that gets SIGKILL cannot end its SuperLink, nor the ServerApp below it. Both end by
themselves, but take seconds, in which they hold the port and write into the state folder.
"""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError

from fedphd.common.errors import StartError
from fedphd.common.files import replaced
from fedphd.deploy.launch.processes import descendants, end, started_ticks

PROCESSES = "processes.json"
# Of whoever started a whole federation, in the folder of its run.
LAUNCHER = "launcher.json"
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

    @property
    def user(self) -> int | None:
        """The id of the launcher, if it runs and is not this process."""
        if self.launcher and self.launcher.runs and self.launcher.pid != os.getpid():
            return self.launcher.pid
        return None


class Processes:
    """The processes of a launcher, in a file in its state folder.

    ``name`` is what users call the folder, ``file`` the file's name.

    Raises:
        StartError: a launcher that still runs uses the folder.
    """

    def __init__(self, state_dir: Path, *, name: str = "state_dir", file: str = PROCESSES) -> None:
        self._path = state_dir / file
        before = _read(self._path)
        if (pid := before.user) is not None:
            raise StartError(
                f"{name} = {state_dir}: process {pid} uses it; stop that process, or choose "
                "another folder"
            )
        end_processes(process.pid for process in before.started if process.runs)
        self._running = _Running(launcher=Process.of(os.getpid()))

    def add(self, pid: int) -> None:
        """Write down a process that was started."""
        if process := Process.of(pid):
            self._running.started.append(process)
            self.write()

    def write(self) -> None:
        """Write down that this process uses the folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(self._path) as beside:
            beside.write_text(self._running.model_dump_json(), encoding="utf-8")

    def end(self) -> None:
        """End those that were written down and still run, and all that they started."""
        end_processes(process.pid for process in self._running.started if process.runs)

    def close(self) -> None:
        """Forget all of them: they have ended."""
        if _read(self._path).launcher == self._running.launcher:
            self._path.unlink(missing_ok=True)


def end_leftovers(state_dir: Path) -> None:
    """End what a killed launcher left running; raises StartError where one that runs uses it."""
    Processes(state_dir)


def user_of(folder: Path) -> int | None:
    """The id of another process that uses a state folder now; None: nobody does."""
    return _read(folder / PROCESSES).user


def _read(path: Path) -> _Running:
    try:
        return _Running.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValidationError):
        return _Running()


@contextmanager
def claimed(folder: Path, *, name: str, file: str = PROCESSES) -> Iterator[None]:
    """Keep a folder, which users call ``name``, to this process while the block runs.

    Raises StartError if another process that still runs has it, or it cannot be written to.
    """
    processes = Processes(folder, name=name, file=file)
    with writing_to(folder, name):
        processes.write()
    try:
        yield
    finally:
        processes.close()


@contextmanager
def writing_to(folder: Path, name: str) -> Iterator[None]:
    """Raise StartError where the block cannot write to a folder, which users call ``name``."""
    try:
        yield
    except OSError as error:
        raise StartError(
            f"{name} = {folder}: cannot be written to: {error.strerror} ({error.filename}); choose "
            "a writable folder"
        ) from error


def end_processes(pids: Iterable[int], *, within_s: float = END_S) -> None:
    """End processes and all that they started, by force after ``within_s`` seconds."""
    chosen = set(pids)
    below = set().union(*map(descendants, chosen))
    for pid in chosen:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    end(chosen | below, within_s=within_s)
