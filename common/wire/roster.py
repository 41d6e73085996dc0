"""Who is there: the nodes of a SuperLink, by the stable names that they give themselves."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Literal

from flwr.app import Message

from fedphd.common.config.roles import check_id
from fedphd.common.errors import FailureKind, ReplyError
from fedphd.common.wire.grid import StreamingGrid
from fedphd.common.wire.messages import HELLO, Hello, HelloReply
from fedphd.common.wire.payload import shown
from fedphd.common.wire.records import read_payload, to_records

logger = logging.getLogger(__name__)

GREET_BATCH = 64
# A node that died keeps its name until its heartbeat is missed; its successor asks again so often.
NAME_RETRY_S = 3.0

Change = Callable[[str, str, str], None]
# The name that a node's key is registered for; None: for none.
Bound = Callable[[int], str | None]


@dataclass(frozen=True)
class Peer:
    """A node that introduced itself; ``holds`` is as in ``HelloReply``."""

    name: str
    node_id: int
    num_samples: int = 0
    clients: dict[str, int] = field(default_factory=dict)
    holds: str | None = None


@dataclass(eq=False)
class Acquaintances:
    """Who has introduced itself; the rosters of servers within one process may share it.

    A node is then greeted by the server that comes first, for all of them.

    Attributes:
        peers: those that are connected, by name; changed by ``add`` and ``remove``.
        refused: until when a node is not asked again, in seconds of the rosters' clock.
        told: (node id, name) of those whose name belongs to another node, once reported.
        doubted: who must say again who it is, by node id; its name stays its own until then.
        lock: held by whoever greets.
    """

    peers: dict[str, Peer] = field(default_factory=dict)
    refused: dict[int, float] = field(default_factory=dict)
    told: set[tuple[int, str]] = field(default_factory=set)
    doubted: dict[int, Peer] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    _sorted: Mapping[str, Peer] | None = None

    def add(self, peer: Peer) -> None:
        """Know a peer by its name, or know it better."""
        with self.lock:
            self.peers[peer.name], self._sorted = peer, None

    def remove(self, name: str) -> None:
        """Forget a peer."""
        with self.lock:
            self._sorted = None
            del self.peers[name]

    def holder(self, name: str) -> Peer | None:
        """Whose name it is."""
        doubted = (peer for peer in self.doubted.values() if peer.name == name)
        return self.peers.get(name) or next(doubted, None)

    def everyone(self) -> Mapping[str, Peer]:
        """The peers as they are now, sorted by name; many servers may ask in every round."""
        with self.lock:
            if self._sorted is None:
                self._sorted = MappingProxyType(dict(sorted(self.peers.items())))
            return self._sorted


@dataclass(eq=False)
class Roster:
    """The peers of one SuperLink, all of one ``kind``, among the nodes of ``grid``.

    Args:
        asking: this process's own name.
        hello_s: seconds that a node has to introduce itself; may be set at any time.
        retry_s: seconds for which a peer that failed is left alone.
        max_samples: a client that claims more images is refused.
        bound: the names that nodes' keys may speak for; None where anybody may join.
        on_change: told (name, "joined" | "left" | "refused" | "failed" | "late" | "serves",
            detail).
        known: shared with the rosters of other servers in this process, if any.
        clock: monotonic seconds; for tests.

    Attributes:
        label_counts: images per class of clients, by node id, as they have said once.
    """

    grid: StreamingGrid
    _: KW_ONLY
    asking: str
    kind: Literal["client", "edge"]
    hello_s: float
    retry_s: float
    max_samples: int
    bound: Bound | None = None
    on_change: Change = lambda name, change, detail: None
    known: Acquaintances = field(default_factory=Acquaintances)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.label_counts: dict[int, tuple[int, ...]] = {}
        self._resting: dict[str, float] = {}

    def configure(self, *, hello_s: float, retry_s: float, max_samples: int) -> None:
        """Set the limits that a run's plan brings; drop clients that exceed them."""
        if max_samples > self.max_samples:
            refused = self.known.refused.items()
            self.known.refused = {n: until for n, until in refused if until != math.inf}
        self.hello_s, self.retry_s, self.max_samples = hello_s, retry_s, max_samples
        with self.known.lock:
            for peer in list(self.known.peers.values()):
                if peer.num_samples > max_samples:
                    self.known.remove(peer.name)
                    self.known.refused[peer.node_id] = math.inf
                    reason = f"claims {peer.num_samples} images; at most {max_samples} are allowed"
                    self.on_change(peer.name, "refused", reason)

    @property
    def peers(self) -> Mapping[str, Peer]:
        """Peers that may be asked now, by name, sorted."""
        now_s = self.clock()
        self._resting = {name: until for name, until in self._resting.items() if until > now_s}
        if not self._resting:
            return self.everyone
        return {name: peer for name, peer in self.everyone.items() if name not in self._resting}

    @property
    def everyone(self) -> Mapping[str, Peer]:
        """All peers that are connected, also those that are left alone for a while."""
        return self.known.everyone()

    def name_of(self, node_id: int) -> str:
        """The name of a node, or its id if it has none yet."""
        with self.known.lock:
            names = (p.name for p in self.known.peers.values() if p.node_id == node_id)
            return next(names, str(node_id))

    def rest(self, name: str, reason: str, kind: FailureKind) -> None:
        """Leave a peer that failed alone for ``retry_s`` seconds.

        One whose process is gone leaves: with a key its next one has the same node id, and when
        that is among the nodes again it is greeted as a new one, whatever happened to the last.
        """
        self.on_change(name, "failed", reason)
        with self.known.lock:
            peer = self.known.peers.get(name) if kind == "gone" else None
            if peer is None:
                self._resting[name] = self.clock() + self.retry_s
            else:
                self.known.remove(name)
                self._part_from(peer)

    def doubt(self, name: str, why: str) -> ReplyError:
        """Let a peer whose node answers as another, or with other data, say again who it is.

        Flower gives a key the same node id for a while, whoever starts with it. One that says the
        same as before is left alone like any that failed.

        Returns:
            The error to raise about its answer, which says ``why``.
        """
        with self.known.lock:
            if (peer := self.known.peers.get(name)) is not None:
                self.known.remove(name)
                self.label_counts.pop(peer.node_id, None)
                self.known.doubted[peer.node_id] = peer
        return ReplyError(why)

    def refresh(self, *, ask_again: bool = False) -> Mapping[str, Peer]:
        """Greet nodes that are new (or all), forget those that left; return ``peers``.

        A peer that failed because it was late is among them again once its answer has come.
        """
        self._note_late()
        with self.known.lock:
            self._greet(sorted(self._not_greeted(ask_again)))
        return self.peers

    def _not_greeted(self, ask_again: bool) -> set[int]:
        """The nodes to greet now; forgets the peers whose nodes left."""
        known, present = self.known, set(self.grid.get_node_ids())
        for peer in list(known.peers.values()):
            if peer.node_id not in present:
                known.remove(peer.name)
                self._part_from(peer)
        # A node that is refused may come back under a new id every few seconds, for weeks.
        known.refused = {n: until for n, until in known.refused.items() if n in present}
        known.told = {(n, name) for n, name in known.told if n in present}
        for node_id in [node_id for node_id in known.doubted if node_id not in present]:
            self._part_from(known.doubted.pop(node_id))
        now_s = self.clock()
        waiting = {node_id for node_id, until in known.refused.items() if until > now_s}
        if ask_again:
            left_alone = {known.peers[n].node_id for n in self._resting if n in known.peers}
        else:
            left_alone = {peer.node_id for peer in known.peers.values()}
        return present - waiting - left_alone

    def _part_from(self, peer: Peer) -> None:
        self._resting.pop(peer.name, None)
        self.label_counts.pop(peer.node_id, None)
        self.on_change(peer.name, "left", "")

    def _note_late(self) -> None:
        for reply in self.grid.late_replies():
            metadata = reply.message.metadata
            name = self.name_of(metadata.dst_node_id)
            if name in self.known.peers:
                self._resting.pop(name, None)
                kind = metadata.message_type
                detail = f"its answer ({kind}) came {reply.late_s:.1f} s too late, and is dropped"
                self.on_change(name, "late", detail)

    def _greet(self, node_ids: Iterable[int]) -> None:
        """Greet as many nodes as ``hello_s`` allows; the rest have their turn next time."""
        deadline_s = self.clock() + self.hello_s
        left = iter(node_ids)
        while (batch := list(islice(left, GREET_BATCH))) and self.clock() <= deadline_s:
            self._greet_at_once(batch)

    def _greet_at_once(self, node_ids: Iterable[int]) -> None:
        # A node that greets others first gets half of the time for that.
        hello = Hello(asking=self.asking, wait_s=self.hello_s / 2)
        messages = [Message(to_records(hello), node_id, HELLO) for node_id in node_ids]
        for reply in self.grid.send_and_receive(messages, timeout=self.hello_s):
            node_id = reply.metadata.src_node_id
            try:
                answer = self._check(read_payload(reply, HelloReply))
                self._check_bound(node_id, answer.name)
                self._welcome(node_id, answer)
            except ReplyError as error:
                self.known.refused[node_id] = self.clock() + self.retry_s
                if error.kind == "gone":
                    # It came to ask whether it may, as a check of a machine does.
                    continue
                name = (self.bound and self.bound(node_id)) or self.name_of(node_id)
                self.on_change(name, "refused", shown(str(error)))

    def _check(self, reply: HelloReply) -> HelloReply:
        if problem := reply.mismatch(f"{reply.kind} {reply.name}"):
            raise ReplyError(problem)
        try:
            for name in (reply.name, *reply.clients):
                check_id(name)
        except ValueError as error:
            raise ReplyError(str(error)) from error
        if reply.kind != self.kind:
            raise ReplyError(f"{reply.name} joins as {reply.kind}; expected {self.kind}")
        claims = [(f"lists {name} with", count) for name, count in reply.clients.items()]
        if self.kind == "client":
            claims.append(("claims", reply.num_samples))
        for claim, count in claims:
            if not 0 < count <= self.max_samples:
                raise ReplyError(
                    f"{reply.name} {claim} {count} images; 1 to {self.max_samples} "
                    "(schedule.max_client_samples) are allowed"
                )
        return reply

    def _check_bound(self, node_id: int, name: str) -> None:
        """Raise ReplyError where the node's key is registered for another name, or for none."""
        if self.bound is None:
            return
        if (owner := self.bound(node_id)) is None:
            raise ReplyError(f"calls itself {name}, and its key is registered for no name")
        if owner != name:
            raise ReplyError(f"calls itself {name}, and its key is that of {owner}")

    def _welcome(self, node_id: int, reply: HelloReply) -> None:
        old = self.known.holder(reply.name)
        if old is not None and old.node_id != node_id and old.node_id in self.grid.get_node_ids():
            # Else anybody could take the place of a participant that is alive and well.
            self.known.refused[node_id] = self.clock() + NAME_RETRY_S
            if (node_id, reply.name) not in self.known.told:
                self.known.told.add((node_id, reply.name))
                reason = f"node {node_id} uses this name too; it stays with the node that has it"
                self.on_change(reply.name, "refused", reason)
            return
        peer = Peer(reply.name, node_id, reply.num_samples, dict(reply.clients), reply.holds)
        self.known.add(peer)
        doubted = self.known.doubted.pop(node_id, None)
        if doubted == peer:
            return
        if doubted is not None and doubted.name != peer.name:
            self._part_from(doubted)
        if old is not None and old.node_id != node_id:
            # The same participant is back under a new node id; nobody answers at the old one.
            self.known.refused[old.node_id] = math.inf
            self.known.doubted.pop(old.node_id, None)
        if old is None or old.node_id != node_id or doubted is not None:
            self._resting.pop(reply.name, None)
            self.on_change(reply.name, "joined", "again" if old else "")
        if self.kind == "edge" and (old is None or set(old.clients) != set(peer.clients)):
            self.on_change(reply.name, "serves", ",".join(sorted(peer.clients)))
