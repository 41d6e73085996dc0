"""A link between two processes that a test cuts and mends."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self

_CHUNK = 65536
_LOOPBACK = "127.0.0.1"


class Relay:
    """Passes on what comes to ``address`` to a server at ``port``, until the link is cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server((_LOOPBACK, 0))
        self.address = f"{_LOOPBACK}:{self._listener.getsockname()[1]}"
        self._is_cut = threading.Event()
        self._cut_from: int | None = None
        self._cut_after: int | None = None
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self.num_cut = 0
        # All that was passed on to the server.
        self.sent_bytes = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.cut()
        self._listener.close()

    def cut(self) -> None:
        """End all connections as a router does that is switched off, and take no new ones."""
        self._is_cut.set()
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.num_cut += len(ends) // 2

    def cut_before(self, num_bytes: int) -> None:
        """Cut as soon as at least so many bytes in a piece are on their way to the server."""
        self._cut_from = num_bytes

    def cut_after(self, num_bytes: int) -> None:
        """Cut as soon as so many bytes in all have been passed on to the server."""
        self._cut_after = num_bytes

    def wait_cut(self, within_s: float) -> bool:
        """Wait until the link is cut; whether it is."""
        return self._is_cut.wait(within_s)

    def mend(self) -> None:
        """Let new connections through."""
        self._cut_from = self._cut_after = None
        self._is_cut.clear()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._is_cut.is_set():
                    near.close()
                    continue
                try:
                    far = socket.create_connection((_LOOPBACK, self._port))
                except OSError:
                    near.close()
                    continue
                with self._lock:
                    self._ends += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(
                        target=self._pass_on, args=(source, target, source is near), daemon=True
                    ).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, goes_up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                if goes_up and self._cut_from is not None and len(data) >= self._cut_from:
                    self.cut()
                target.sendall(data)
                if goes_up:
                    self._count(len(data))
        _end(source, target)

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.sent_bytes += num_bytes
        if self._cut_after is not None and self.sent_bytes >= self._cut_after:
            self.cut()


def _end(source: socket.socket, target: socket.socket) -> None:
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
