"""``/live``, ``/ready`` and ``/status`` over HTTP, for supervisors and ``fedphd status``.

And ``/metrics``, where a setting asks for it.

Flower's own gRPC health service says SERVING whatever its ServerApp does.
"""

import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from fedphd.common.config.links import HealthConfig
from fedphd.common.errors import ConfigError
from fedphd.common.events import write_json
from fedphd.common.history.status import Status, StatusBoard

logger = logging.getLogger(__name__)

HEALTH = "health.json"
_JSON = "application/json"
_OK, _UNAVAILABLE, _NOT_FOUND = 200, 503, 404
# Whoever is silent for so long is cut off.
SILENCE_S: Final = 5.0
# Each connection holds a thread and a descriptor, of which training needs some too.
MOST_CONNECTIONS: Final = 32
# The oldest connection has so long to end when its place is needed.
MAKE_ROOM_S: Final = 1.0


class HealthAddress(BaseModel):
    """Where a process answers, as its state folder says."""

    address: str
    role: str
    node: str


class _Server(ThreadingHTTPServer):
    """Listens on an address of either family; a host in brackets is of IPv6.

    At most ``most`` connections are open at a time. The oldest makes room for a new one, so that
    strangers who keep theirs open do not make a supervisor believe that this process is dead.
    """

    daemon_threads = True
    # Where more wait to be taken on than this, they try again only after seconds.
    request_queue_size = 128
    board: StatusBoard
    # The answer to /metrics and its type; None where it is off.
    metrics: Callable[[], tuple[bytes, str]] | None = None

    def __init__(self, address: str, most: int = MOST_CONNECTIONS) -> None:
        self._most = most
        # In the order in which they came.
        self._open: dict[Any, None] = {}
        self._closed = threading.Condition()
        host, _, port = address.rpartition(":")
        # Its base class knows IPv4 alone unless it is told otherwise before.
        self.address_family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        super().__init__((host.strip("[]"), int(port)), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, where there is room for one more."""
        if self._make_room():
            self._open[request] = None
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def _make_room(self) -> bool:
        with self._closed:
            if len(self._open) < self._most:
                return True
            # Its thread then reads an end, and closes it.
            with suppress(OSError):
                next(iter(self._open)).shutdown(socket.SHUT_RDWR)
            return self._closed.wait_for(lambda: len(self._open) < self._most, MAKE_ROOM_S)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, which every one comes to, and count it no more."""
        # Closed under the lock: elsewhere its number might belong to another file already.
        with self._closed:
            super().shutdown_request(request)
            self._open.pop(request, None)
            self._closed.notify()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless the other side has just gone: it may do so for ever."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SILENCE_S

    def do_GET(self) -> None:
        """Answer one question; the code says yes (200) or no (503)."""
        board = self.server.board
        match self.path.partition("?")[0]:
            case "/live":
                live, _ = board.health()
                self._answer(live, {"live": live})
            case "/ready":
                _, reason = board.health()
                self._answer(not reason, {"ready": not reason, "reason": reason})
            case "/status":
                self._answer(True, board.snapshot().model_dump(mode="json"))
            case "/metrics" if self.server.metrics:
                self._send(_OK, *self.server.metrics())
            case "/metrics":
                self._refuse("/metrics is off: health.metrics = true turns it on")
            case _:
                self._refuse("ask for /live, /ready, /status or /metrics")

    def _answer(self, good: bool, content: object) -> None:
        self._send(_OK if good else _UNAVAILABLE, json.dumps(content).encode())

    def _refuse(self, why: str) -> None:
        self._send(_NOT_FOUND, json.dumps({"error": why}).encode())

    def _send(self, code: int, body: bytes, content_type: str = _JSON) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a supervisor asks every few seconds."""


@contextmanager
def serving(
    config: HealthConfig, board: StatusBoard, state_dir: Path, run_dir: Path | None = None
) -> Iterator[str | None]:
    """Answer while the block runs; yields the address, None where none is configured or free.

    The state folder's ``health.json`` names it for ``fedphd status``. Raises ConfigError where
    ``health.metrics`` asks for what is not installed.
    """
    if config.address is None:
        yield None
        return
    # First: what is not installed ends the start.
    folders = {"state": state_dir, **({"run": run_dir} if run_dir else {})}
    metrics = _metrics(config, board, folders) if config.metrics else None
    try:
        server = _Server(config.address)
    except OSError as error:
        # Training does not depend on it.
        logger.warning("health.address = %s: %s; nothing answers there", config.address, error)
        yield None
        return
    server.board, server.metrics = board, metrics
    address = f"{config.address.rpartition(':')[0]}:{server.server_address[1]}"
    status = board.snapshot()
    place = state_dir / HEALTH
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        place, HealthAddress(address=address, role=status.role, node=status.node).model_dump()
    )
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        place.unlink(missing_ok=True)


def _metrics(
    config: HealthConfig, board: StatusBoard, folders: dict[str, Path]
) -> Callable[[], tuple[bytes, str]]:
    # Whoever does not ask for it does not pay for it.
    try:
        from fedphd.deploy.launch.metrics import CONTENT_TYPE, Metrics
    except ImportError as error:
        raise ConfigError(
            f'health.metrics = true: {error}; pip install "fedphd[monitoring]", or leave it out'
        ) from error
    metrics = Metrics(config, board, folders)
    return lambda: (metrics.text(), CONTENT_TYPE)


def parse_status(body: bytes) -> Status:
    """What ``/status`` answered; raises ValueError if it is something else."""
    return Status.model_validate_json(body)
