"""A federation as its events show it: who works on what, how far, how fast."""

from dataclasses import dataclass, field
from statistics import median

from fedphd.common.errors import Interrupted
from fedphd.common.events import Event
from fedphd.common.history import events as kinds
from fedphd.common.history.status import CONNECTED
from fedphd.deploy.launch.render import distance_name

# A client that takes so many times as long as clients usually do holds its round up.
SLOW_FACTOR = 2.0
SLOW_S = 3.0
_USUAL_OF = 50
TRAINS, ANSWERED, THERE, STARTS = "training", "answered", "waits", "starting"
_BROKEN = ("failed", "left", "refused")


@dataclass
class Client:
    """A client: its ``state`` is TRAINS, ANSWERED, THERE, or what became of it, ``since`` when.

    ``edge`` is the one that it chose last, ``seconds`` what its last round took; times are Unix's.
    """

    name: str
    state: str = THERE
    detail: str = ""
    since: float = 0.0
    edge: str = ""
    rounds: int = 0
    loss: float | None = None
    seconds: float | None = None

    @property
    def is_broken(self) -> bool:
        """Whether it is not there, or failed."""
        return self.state in _BROKEN


@dataclass
class Server:
    """The cloud or an edge.

    ``rate`` is bytes per second over its links in its last round or interval; ``asked`` and
    ``answered`` are clients of the round under way; ``link`` is an edge's to its cloud.
    """

    name: str
    state: str = STARTS
    detail: str = ""
    link: str = ""
    interval: int = 0
    edge_round: int = 0
    round: int = 0
    rounds: int = 0
    asked: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float | None = None
    moved: int = 0
    rate: float | None = None
    ends_at: float | None = None
    seen: float = 0.0

    def moves(self, total: int, seconds: float) -> None:
        """It has moved ``total`` bytes by now, the last ones in ``seconds``."""
        new, self.moved = total - self.moved, total
        if seconds > 0 and new >= 0:
            self.rate = new / seconds

    def share_done(self) -> float:
        """The share of its edge rounds that is done, with what has come of the one under way."""
        under_way = len(self.answered) / len(self.asked) if self.asked else 0.0
        return min(1.0, (self.round + under_way) / self.rounds) if self.rounds else 0.0


@dataclass
class Federation:
    """What a run's events say, one after the other.

    Attributes:
        intervals: of the whole run; 0 while nobody has said so.
        samples: where the first ones are.
        working: what the cloud does beside training, with its steps: done, total.
        distances, measure: of the evaluations, and what they are called.
        measured_after: the interval of the last of them, 0 before training.
        started, ended: Unix times of the process under way, or the last; None: not yet.
        before_s: what the cloud's earlier processes took, where the run was resumed.
        verdict: exit code and message of the cloud's end.
    """

    cloud: Server = field(default_factory=lambda: Server("cloud"))
    edges: dict[str, Server] = field(default_factory=dict)
    clients: dict[str, Client] = field(default_factory=dict)
    intervals: int = 0
    parameters: int = 0
    distances: list[float] = field(default_factory=list)
    measured_after: int = 0
    measure: str = ""
    samples: str = ""
    working: tuple[str, int, int] | None = None
    started: float | None = None
    ended: float | None = None
    before_s: float = 0.0
    verdict: tuple[int, str] | None = None
    _usual: list[float] = field(default_factory=list)

    def expect(self, num_edges: int, num_clients: int, intervals: int) -> None:
        """Who will come, by the names that a launcher gives, and for how many intervals."""
        self.intervals = intervals
        for number in range(num_edges):
            self._edge(f"edge-{number}")
        for number in range(num_clients):
            self._client(f"client-{number}").state = STARTS

    def is_there(self, name: str) -> None:
        """A client has reached a server, which may not have greeted it yet."""
        client = self._client(name)
        if client.state == STARTS:
            client.state = THERE

    def server(self, event: Event) -> Server:
        """Whose event this is; in a flat federation the cloud does an edge's work too."""
        return self.cloud if event.node == self.cloud.name else self._edge(event.node)

    def _edge(self, name: str) -> Server:
        return self.edges.setdefault(name, Server(name))

    def _client(self, name: str) -> Client:
        return self.clients.setdefault(name, Client(name))

    def fold(self, event: Event) -> None:
        """Take one more event; they come in the order of their times."""
        server = self.server(event)
        if self.started is None:
            self.started = event.time
        elif isinstance(event, kinds.Started) and server is self.cloud and server.seen:
            # Resumed: nobody worked for it since the cloud was there last.
            self.before_s += server.seen - self.started
            self.started = event.time
        server.seen = event.time
        match event:
            case kinds.Started():
                server.state, self.ended, self.verdict = "running", None, None
            case kinds.Ended():
                self._end(server, event)
            case kinds.LinkChanged():
                server.link = event.change
                # Beside an edge alone, that is all there is to know of it.
                if event.change == CONNECTED and self.cloud.state == STARTS:
                    self.cloud.state = "running"
            case kinds.PeerChanged():
                self._peer(server, event)
            case _:
                self._progress(server, event)

    def _progress(self, server: Server, event: Event) -> None:
        match event:
            case kinds.Working():
                under_way = event.done < event.total
                self.working = (event.what, event.done, event.total) if under_way else None
            case kinds.RoundBegan():
                self._began(server, event)
            case kinds.Replied():
                self._replied(server, event)
            case kinds.RoundEnded():
                self._round(server, event)
            case kinds.IntervalEnded():
                self._interval(event)
            case kinds.Drawn():
                self.samples = event.path
            case kinds.Pruned():
                self.parameters = event.after.parameters
            case kinds.Evaluated():
                self.working, self.measure = None, distance_name(event)
                if event.frechet_distance is not None:
                    self.distances.append(event.frechet_distance)
                    self.measured_after = event.interval or 0
            case _:
                pass

    def _end(self, server: Server, event: kinds.Ended) -> None:
        stopped = event.exit_code == Interrupted.exit_code
        server.state = "ended" if event.exit_code == 0 else "stopped" if stopped else "failed"
        server.detail = event.message if server.state == "failed" else ""
        if event.role != "edge":
            self.ended, self.verdict = event.time, (event.exit_code, event.message)
            self.working = None
            if not stopped:
                self._end_edges()

    def _end_edges(self) -> None:
        """They were told; the events of those on other machines are out of sight."""
        for edge in self.edges.values():
            if edge.state == "running":
                edge.state = "ended"

    def _peer(self, server: Server, event: kinds.PeerChanged) -> None:
        if event.role == "cloud":
            # Flat: the cloud is an edge of its own.
            if event.peer != event.node:
                self._peer_of_cloud(event)
            return
        client = self._client(event.peer)
        # "refused" may be somebody else who used its name.
        if event.change == kinds.SERVES or (event.change == "refused" and client.since):
            return
        there = event.change in ("joined", "late")
        if there and client.state in (TRAINS, ANSWERED):
            return
        client.state, client.since = THERE if there else event.change, event.time
        client.detail = "" if there else event.detail

    def _peer_of_cloud(self, event: kinds.PeerChanged) -> None:
        edge = self._edge(event.peer)
        if event.change == kinds.SERVES:
            # Where the edge's own events are out of sight, that is all there is to know.
            for name in filter(None, event.detail.split(",")):
                client = self._client(name)
                client.edge = client.edge or event.peer
                if client.state == STARTS:
                    client.state, client.since = THERE, event.time
        elif event.change != "late":
            edge.state = "running" if event.change == "joined" else event.change
            edge.detail, edge.seen = event.detail, event.time

    def _began(self, server: Server, event: kinds.RoundBegan) -> None:
        server.interval, server.edge_round = event.interval, event.edge_round
        server.round, server.rounds = event.round - 1, event.rounds
        server.asked, server.answered = list(event.clients), []
        for name in event.clients:
            client = self._client(name)
            client.state, client.since, client.detail = TRAINS, event.time, ""
            client.edge = event.node

    def _replied(self, server: Server, event: kinds.Replied) -> None:
        server.answered.append(event.client)
        client = self._client(event.client)
        client.state, client.since, client.detail = ANSWERED, event.time, ""
        client.loss, client.seconds = event.loss, event.seconds
        client.rounds += 1
        self._usual = [*self._usual[1 - _USUAL_OF :], event.seconds]

    def _round(self, server: Server, event: kinds.RoundEnded) -> None:
        server.interval, server.edge_round = event.interval, event.edge_round
        server.round, server.rounds = event.round, event.rounds
        server.ends_at, server.seconds = event.time + event.left_s, event.seconds
        server.asked, server.answered = [], []
        if event.loss is not None and server is not self.cloud:
            server.losses.append(event.loss)
        server.moves(event.sent_bytes + event.received_bytes, event.seconds)

    def _interval(self, event: kinds.IntervalEnded) -> None:
        cloud, self.intervals = self.cloud, event.intervals
        cloud.interval, cloud.seconds = event.interval, event.seconds
        cloud.ends_at = event.time + event.left_s
        self.parameters = event.parameters
        if event.loss is not None:
            cloud.losses.append(event.loss)
        cloud.moves(event.edge_cloud_bytes, event.seconds)

    def took_s(self, now: float) -> float | None:
        """Seconds that the run has taken so far; None before it began."""
        if self.started is None:
            return None
        return self.before_s + (self.ended or now) - self.started

    def usual_s(self) -> float | None:
        """What a client's round has taken lately, the median in seconds."""
        return median(self._usual) if self._usual else None

    def is_slow(self, client: Client, now: float) -> bool:
        """Whether a client trains for far longer than clients usually do."""
        usual = self.usual_s()
        if client.state != TRAINS or usual is None:
            return False
        return now - client.since > max(SLOW_S, SLOW_FACTOR * usual)

    def share_done(self) -> float:
        """The share of the run that is done: of its edge rounds where they are known."""
        shares = [edge.share_done() for edge in self.edges.values() if edge.rounds]
        if self.cloud.rounds:
            shares.append(self.cloud.share_done())
        whole = self.cloud.interval / self.intervals if self.intervals else 0.0
        return max(whole, min(shares)) if shares else whole

    @property
    def is_trained(self) -> bool:
        """Whether the last interval is done; its evaluation may still be under way."""
        return 0 < self.intervals == self.cloud.interval

    def left_s(self, now: float) -> float | None:
        """Seconds until the last interval ends, as the slowest edge guesses, else the cloud.

        None where nobody has guessed, or what was guessed is over.
        """
        if self.ended is not None or self.is_trained:
            return None
        ends = [edge.ends_at for edge in self.edges.values() if edge.ends_at is not None]
        if not ends and self.cloud.ends_at is not None:
            ends = [self.cloud.ends_at]
        left_s = max(ends, default=now) - now
        return left_s if left_s > 0 else None
