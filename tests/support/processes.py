"""Real processes of a test, seen from the outside: by their ids, /proc and what they print.

Everything that a test starts carries a mark in its environment, which its children inherit. So
the test finds all of them and no others, whoever their parent is by then.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from fedphd.deploy.launch.superlink import flower_environment

MARK = "FEDPHD_TEST"
# For what hangs: what takes seconds on an idle machine takes minutes on a busy one.
SLOW_S = 600.0
END_S = 120.0
_POLL_S = 0.05
_ESTABLISHED, _LISTEN = "01", "0A"


class Program:
    """A started command, leader of a process group, and the lines that it prints."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                with self._changed:
                    self.lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its process group."""
        return self.process.pid

    @property
    def text(self) -> str:
        """Everything printed so far."""
        return "\n".join(self.lines)

    def wait_line(self, pattern: str, *, within_s: float = SLOW_S) -> re.Match[str]:
        """The first line in which ``pattern`` is found; fails if the program ends without it."""
        deadline_s = time.monotonic() + within_s
        seen = 0
        with self._changed:
            while True:
                while seen < len(self.lines):
                    match = re.search(pattern, self.lines[seen])
                    if match:
                        return match
                    seen += 1
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, f"no {pattern!r} within {within_s:g} s in:\n{self.text}"
                assert self._reader.is_alive(), f"ended without {pattern!r}:\n{self.text}"
                self._changed.wait(min(left_s, 1.0))

    def wait_exit(self, *, within_s: float = SLOW_S) -> int:
        """The exit code; fails if the program does not end."""
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {within_s:g} s:\n{self.text}") from None
        self._reader.join(5)
        return code


class Processes:
    """Starts programs and, at the latest at its end, kills all that came of them.

    Args:
        folder: working directory of the programs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid4().hex
        self.programs: list[Program] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        deadline_s = time.monotonic() + END_S
        # Again and again, since a process may start another one while this looks.
        while (pids := self.running()) and time.monotonic() < deadline_s:
            for pid in pids:
                kill(pid, signal.SIGKILL)
            time.sleep(_POLL_S)
        for program in self.programs:
            program.wait_exit(within_s=END_S)

    def start(self, *arguments: str, prefix: Sequence[str] = ()) -> Program:
        """Start ``fedphd`` with ``arguments``; ``prefix`` is a command that starts commands."""
        return self.start_command([*prefix, sys.executable, "-m", "fedphd.deploy.cli", *arguments])

    def start_flower(
        self,
        name: str,
        *arguments: str,
        folder: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> Program:
        """Start one of Flower's own commands, such as ``flwr``, in ``folder``; as ``start``."""
        environment = flower_environment(self.folder / "flower-home")
        command = [*prefix, str(Path(sys.executable).parent / name), *arguments]
        return self.start_command(command, environment, folder)

    def start_command(
        self,
        command: list[str],
        environment: Mapping[str, str] = os.environ,
        folder: Path | None = None,
    ) -> Program:
        """Start ``command`` with this test's mark in its environment."""
        marked = {**environment, MARK: self.mark, "PYTHONUNBUFFERED": "1"}
        program = Program(command, marked, folder or self.folder)
        self.programs.append(program)
        return program

    def running(self) -> set[int]:
        """Ids of all processes that came of the programs and still run."""
        entry = f"{MARK}={self.mark}".encode()
        found = set()
        for pid in all_pids():
            try:
                marked = entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            # A zombie has an empty environment, and has ended.
            if marked:
                found.add(pid)
        return found

    def commands(self) -> dict[int, list[str]]:
        """The running processes and their command lines."""
        return {pid: command_of(pid) for pid in sorted(self.running())}

    def groups(self) -> dict[int, set[int]]:
        """The running processes by process group."""
        groups: dict[int, set[int]] = defaultdict(set)
        for pid in self.running():
            try:
                groups[os.getpgid(pid)].add(pid)
            except ProcessLookupError:
                continue
        return dict(groups)

    def wait_gone(self, *, within_s: float = END_S) -> None:
        """Wait until nothing runs any more; fails and says what does."""
        deadline_s = time.monotonic() + within_s
        while left := self.commands():
            assert time.monotonic() < deadline_s, f"left after {within_s:g} s: {left}"
            time.sleep(_POLL_S)


def all_pids() -> Iterator[int]:
    """Ids of all processes of this machine."""
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def kill(pid: int, number: int) -> None:
    """Send a signal to one process, which may have ended by itself."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def command_of(pid: int) -> list[str]:
    """A process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        return []


def connections(pid: int) -> set[int]:
    """Ports on loopback to which a process holds established TCP connections."""
    return {_port(remote) for _, remote in _sockets(pid, _ESTABLISHED)}


def open_to_others(pid: int) -> set[int]:
    """Ports at which a process listens on more than the loopback address."""
    return {_port(local) for local, _ in _sockets(pid, _LISTEN) if not _is_loopback(local)}


def _is_loopback(address: str) -> bool:
    """Whether an address of /proc/net, 4 bytes a word in the machine's order, is its own."""
    words = bytes.fromhex(address.partition(":")[0])
    packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    found = ipaddress.ip_address(packed)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def _port(address: str) -> int:
    return int(address.partition(":")[2], 16)


def _sockets(pid: int, state: str) -> Iterator[tuple[str, str]]:
    """The local and remote addresses of a process's TCP sockets in a state, as the kernel does."""
    held = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            held.add(os.readlink(entry))
        except OSError:
            continue
    # gRPC reaches IPv4 addresses through IPv6 sockets where it can.
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text("ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and f"socket:[{fields[9]}]" in held:
                yield fields[1], fields[2]


def _ports() -> Iterator[int]:
    """Ports that no other worker of this test run is given, nor the system gives to anybody."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10_000 + 1000 * (worker % 10)
    # Another test run on this machine begins elsewhere.
    return itertools.cycle([first + (os.getpid() + i) % 1000 for i in range(1000)])


_PORTS = _ports()


def free_port() -> int:
    """A TCP port on loopback that is free now, and that nothing else takes meanwhile."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the ports never end")
