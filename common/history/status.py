"""How a process is right now, folded from its events: whether it works, and who is connected."""

import threading
import time
from collections.abc import Callable
from importlib.metadata import version

from pydantic import BaseModel, Field

from fedphd.common.events import Event
from fedphd.common.history import events as kinds

CONNECTED = "connected"
FAILED = "failed"
# A loop that has not come round for so long hangs.
STALE_S = 30.0
# It begins only once Flower has taken the ServerApp, for which a busy machine needs long.
START_S = 120.0
# Of those that are not connected, the latest of each state are remembered.
MOST_GONE = 100


class PeerStatus(BaseModel):
    """A client of an edge, or an edge of the cloud; ``clients`` are those that an edge serves.

    ``kind`` is "edge" or "client": the cloud of a flat federation has both.
    ``state`` is "connected", "left", "refused" or "failed", ``since`` and ``last_seen`` are Unix
    times.
    """

    kind: str = "client"
    state: str
    since: float
    last_seen: float
    detail: str = ""
    clients: list[str] = Field(default_factory=list)


class Status(BaseModel):
    """One process.

    Attributes:
        live: its own loop comes round.
        ready: it can do its part: the cloud's run accepts edges, an edge is connected to the
            cloud, a client to an edge.
        reason: why it is not ready; "" if it is.
        upstream: what became of the connection to each server, by its address.
        interval, edge_round: the last finished ones.
    """

    role: str
    node: str
    version: str = Field(default_factory=lambda: version("fedphd"))
    live: bool = True
    ready: bool = False
    reason: str = "starting"
    started: float = Field(default_factory=time.time)
    interval: int = 0
    intervals: int = 0
    edge_round: int = 0
    last_event: float = 0.0
    upstream: dict[str, str] = Field(default_factory=dict)
    peers: dict[str, PeerStatus] = Field(default_factory=dict)


class StatusBoard:
    """Keeps the status of one process; any thread may ask or tell.

    ``clock`` is monotonic, in seconds. ``on_event``, which may be set, is told every event too.
    """

    def __init__(
        self, role: str, node: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._status = Status(role=role, node=node)
        # Who is not connected, by state, in the order in which they came to it.
        self._gone: dict[str, dict[str, None]] = {}
        # Whether a peer that failed is not among the remembered ones.
        self._failed_more = False
        self._clock = clock
        self._lock = threading.Lock()
        self._running = role == "client"
        self._beat_s = clock() + START_S
        self.on_event: Callable[[Event], None] = lambda event: None

    def beat(self) -> None:
        """The process's own loop came round."""
        self._beat_s = self._clock()

    def snapshot(self) -> Status:
        """The status now."""
        with self._lock:
            status = self._status.model_copy(deep=True)
        status.live, status.reason = self.health()
        status.ready = not status.reason
        return status

    def health(self) -> tuple[bool, str]:
        """Whether it is live, and why it is not ready, "" if it is; costs the same for any peers.

        A supervisor asks every few seconds, and ends a process that answers too late.
        """
        live = self._clock() - self._beat_s < STALE_S
        with self._lock:
            return live, self._missing(live)

    def _missing(self, live: bool) -> str:
        if not live:
            return f"its loop has not come round for {STALE_S:g} s"
        if not self._running:
            return "its ServerApp does not run"
        if self._status.role == "cloud" or CONNECTED in self._status.upstream.values():
            return ""
        return "it is connected to no server"

    def linked(self, server: str, change: str) -> None:
        """A connection to a server changed; ``change`` is as in ``LinkChanged``."""
        with self._lock:
            self._status.upstream[server] = change
            self._status.last_event = time.time()

    def event(self, event: Event) -> None:
        """Something happened in the process."""
        with self._lock:
            status = self._status
            status.last_event = event.time
            match event:
                case kinds.Started():
                    self._running = True
                case kinds.Ended():
                    self._running = False
                case kinds.LinkChanged():
                    status.upstream[event.server] = event.change
                case kinds.PeerChanged():
                    self._peer(status, event)
                case kinds.RoundEnded():
                    status.interval, status.edge_round = event.interval, event.edge_round
                    self._seen(status, event.clients, event)
                case kinds.IntervalEnded():
                    status.interval, status.intervals = event.interval, event.intervals
                    self._seen(status, event.edge_weights, event)
                case kinds.Trained():
                    status.interval, status.edge_round = event.interval, event.edge_round
                case _:
                    pass
        self.on_event(event)

    def _peer(self, status: Status, event: kinds.PeerChanged) -> None:
        before = status.peers.get(event.peer)
        if event.change == kinds.SERVES:
            if before:
                before.clients = event.detail.split(",") if event.detail else []
                before.last_seen = event.time
            return
        if event.change == "refused" and before and before.state == CONNECTED:
            # Somebody else who used its name.
            return
        # Who was late has answered, and is asked again.
        state = CONNECTED if event.change in ("joined", "late") else event.change
        status.peers[event.peer] = PeerStatus(
            kind=_kind(event),
            state=state,
            since=event.time,
            last_seen=event.time,
            detail=event.detail,
            clients=before.clients if before else [],
        )
        if before:
            self._gone.get(before.state, {}).pop(event.peer, None)
        if state != CONNECTED:
            self._remember(status, event.peer, state)

    def _remember(self, status: Status, name: str, state: str) -> None:
        # A node may come back under a new name, or id, every few seconds, for weeks.
        gone = self._gone.setdefault(state, {})
        gone[name] = None
        if len(gone) > MOST_GONE:
            first = next(iter(gone))
            del gone[first], status.peers[first]
            self._failed_more |= state == FAILED

    def _seen(self, status: Status, names: object, event: Event) -> None:
        for name in names if isinstance(names, list | dict) else ():
            if peer := status.peers.get(name):
                peer.last_seen = event.time
                # It failed once, and has answered since. Who left after its answer stays so.
                if peer.state == FAILED:
                    del self._gone[FAILED][name]
                    peer.state = CONNECTED
            elif self._failed_more:
                # So many failed after it that it was forgotten, and it has answered since.
                status.peers[name] = PeerStatus(
                    kind=_kind(event), state=CONNECTED, since=event.time, last_seen=event.time
                )


def _kind(event: Event) -> str:
    """What a peer is, of which this event tells."""
    return "client" if event.role == "edge" else "edge"
