"""Edges inside the cloud's process: for Flower's simulation, and for a flat federation.

The cloud's strategy sees a Grid of edges. Where edges are processes, that is its SuperLink; here
it is ``VirtualEdges``, which run the same edge code over one grid of clients that they share.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedphd.common.config.roles import CloudConfig
from fedphd.common.events import EventLog
from fedphd.common.stores import FileStore
from fedphd.common.wire import internals
from fedphd.common.wire.arrivals import Arrivals
from fedphd.common.wire.grid import PlainReplies, StreamingGrid, WrappedGrid, streaming_grid
from fedphd.common.wire.handover import tell_of_replies
from fedphd.common.wire.messages import FINISH, STATISTICS, TRAIN, Ack
from fedphd.common.wire.offers import CHOOSE, EVERY_EDGE, Choose, OfferBook
from fedphd.common.wire.records import read_payload, to_records
from fedphd.common.wire.roster import Acquaintances, Bound
from fedphd.edge.app import STATE, EdgeService

# Messages with weights that edges may have under way at a time, all together: Flower's simulation
# holds them, and the replies, in the ServerApp's process.
_WINDOW = 64
# Of these, clients that train: as many again as there are cores, so that none is idle, and no
# more, since the time that an answer may take counts from when it is asked for.
_TRAININGS = 4

Key = tuple[Any, ...]


@dataclass
class _Question:
    """One real message to a client, and the edges that wait for its answer."""

    key: Key
    kind: str
    node_id: int
    askers: list[Message] = field(default_factory=list)
    choices: list[Choose] = field(default_factory=list)
    deadline_s: float = float("inf")
    sent_as: str | None = None


class SharedClients(WrappedGrid):
    """One grid of clients, as several virtual edges use it at the same time.

    What all edges ask of a client becomes one message: the choice of an edge. It holds all edges'
    offers, as a resident client brings them together: it waits for every edge's offer of this
    edge round, as long as ``offer_wait_s`` allows; then it goes with the latest offers of the
    others (synchronised: without them). The end of the run need not be told.

    ``max_trainings`` clients train at a time, of all edges together; ``grid`` is
    Flower's, of the clients; ``clock``, monotonic, is for tests.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        max_trainings: int = _TRAININGS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(grid)
        self._max_trainings = max_trainings
        self._waiting: deque[tuple[_Question, RecordDict]] = deque()
        self._clock = clock
        self._lock = threading.RLock()
        # By what is asked: questions that an edge may still join, and answers for late edges.
        self._open: dict[Key, _Question] = {}
        self._kept: dict[Key, RecordDict] = {}
        # By the id that an edge knows, and by the one that Flower knows.
        self._question_of: dict[str, _Question] = {}
        self._sent: dict[str, _Question] = {}
        self._answers: dict[str, Message] = {}
        self._arrivals = Arrivals()
        tell_of_replies(grid, self._came)
        self._interval = 0
        self._book = OfferBook(past_intervals=0)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take an edge's messages; returns ids of their own for them."""
        ids = []
        with self._lock:
            for message in messages:
                ids.append(internals.assign_id(message, uuid4().hex, run_id=self.run.run_id))
                self._add(message)
        return ids

    def _add(self, message: Message) -> None:
        kind, node_id = message.metadata.message_type, message.metadata.dst_node_id
        asked = read_payload(message, Choose) if kind == CHOOSE else None
        if kind == FINISH:
            # It has no process that could end.
            told = to_records(Ack(name=str(node_id)))
            self._put(message.metadata.message_id, Message(told, reply_to=message))
            return
        key: Key = (message.metadata.message_id,)
        if asked is not None:
            # An interval in which nobody trained comes again, in a new attempt.
            key = (kind, node_id, asked.interval, asked.attempt, asked.edge_round)
            self._note(asked)
        if key in self._kept:
            answer = Message(self._kept[key], reply_to=internals.envelope(message))
            self._put(message.metadata.message_id, answer)
            return
        question = self._open.setdefault(key, _Question(key, kind, node_id))
        question.askers.append(internals.envelope(message))
        self._question_of[message.metadata.message_id] = question
        if asked is not None:
            question.choices.append(asked)
            question.deadline_s = min(question.deadline_s, self._clock() + asked.offer_wait_s)
        if question.sent_as is not None:
            return
        if kind == TRAIN:
            self._waiting.append((question, message.content))
            self._send_waiting()
        elif asked is None:
            self._send(question, message.content)
        elif len(question.choices) == asked.num_edges:
            self._send(question, to_records(self._merged(question)))

    def _note(self, asked: Choose) -> None:
        """Remember the offers of the newest interval; forget the answers of old ones."""
        if asked.interval > self._interval:
            self._interval = asked.interval
            # An edge may be late by the end of an interval, not by more.
            oldest = asked.interval - 1
            self._kept = {key: answer for key, answer in self._kept.items() if key[2] >= oldest}
        if asked.interval == self._interval:
            self._book.note(asked)

    def _merged(self, question: _Question) -> Choose:
        """One question with all edges' offers; its answer is for whichever edge is chosen."""
        of_round = [offer for asked in question.choices for offer in asked.offers]
        merged = self._book.merged(question.choices[0], of_round)
        return merged.model_copy(update={"asking": EVERY_EDGE})

    def _send(self, question: _Question, content: RecordDict) -> None:
        # Its sender is still counting the bytes of these records, maybe for several clients.
        records = internals.with_own_records(content)
        ttl = max((asker.metadata.ttl for asker in question.askers), default=None)
        message = Message(records, question.node_id, question.kind, ttl=ttl)
        question.sent_as = next(iter(self._grid.push_messages([message])), "")
        self._sent[question.sent_as] = question

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are there; each edge gets a copy of its own."""
        with self._lock:
            asked = list(message_ids)
            # Else another edge has pulled already what woke this one.
            if not any(message_id in self._answers for message_id in asked):
                self._pull()
            return [self._take(message_id) for message_id in asked if message_id in self._answers]

    def wait(self, message_ids: Collection[str], seconds: float) -> None:
        """Until an answer to one of these is there, at most ``seconds``."""
        self._arrivals.wait(message_ids, seconds)

    def has_begun(self, message_id: str) -> bool:
        """Whether Flower has the message: an order to train may wait for a client's turn."""
        with self._lock:
            question = self._question_of.get(message_id)
            return question is None or question.kind != TRAIN or question.sent_as is not None

    def _pull(self) -> None:
        """All that came, for other edges too: what is not pulled stays in Flower's store."""
        self._send_overdue()
        for reply in self._grid.pull_messages([i for i in self._sent if i]):
            self._deliver(self._sent.pop(reply.metadata.reply_to_message_id), reply)
        self._send_waiting()

    def _came(self, sent_as: str) -> None:
        """Flower has a reply; not pulled here, in a thread that has others to store."""
        with self._lock:
            question = self._sent.get(sent_as)
            for asker in question.askers if question else ():
                self._arrivals.tell(asker.metadata.message_id)

    def _put(self, message_id: str, answer: Message) -> None:
        self._answers[message_id] = answer
        self._arrivals.tell(message_id)

    def _take(self, message_id: str) -> Message:
        self._arrivals.forget(message_id)
        return self._answers.pop(message_id)

    def _send_waiting(self) -> None:
        """Send the orders to train that there is room for, and that an edge still waits for."""
        busy = sum(q.kind == TRAIN and bool(q.askers) for q in self._sent.values())
        while self._waiting and busy < self._max_trainings:
            question, content = self._waiting.popleft()
            if question.askers:
                self._send(question, content)
                busy += 1

    def _send_overdue(self) -> None:
        """Send the questions that have waited long enough for other edges' offers."""
        now_s = self._clock()
        for question in list(self._open.values()):
            if question.sent_as is None and now_s > question.deadline_s:
                self._send(question, to_records(self._merged(question)))

    def _deliver(self, question: _Question, reply: Message) -> None:
        self._open.pop(question.key, None)
        if question.kind == CHOOSE and not reply.has_error():
            self._kept[question.key] = reply.content
        for asker in question.askers:
            message_id = asker.metadata.message_id
            body = reply.error if reply.has_error() else reply.content
            self._put(message_id, Message(body, reply_to=asker))
            del self._question_of[message_id]

    def forget(self, message_id: str) -> None:
        """An edge no longer waits for the answer to this message."""
        with self._lock:
            self._answers.pop(message_id, None)
            self._arrivals.forget(message_id)
            question = self._question_of.pop(message_id, None)
            if question is not None:
                others = [m for m in question.askers if m.metadata.message_id != message_id]
                question.askers = others
                if not others and question.sent_as is None:
                    self._open.pop(question.key, None)
                self._send_waiting()


def _grid_of_edge(
    clients: Grid, shared: SharedClients, num_edges: int, num_trainings: int
) -> StreamingGrid:
    """An edge's way to the clients; real ones, over gRPC, may all work at the same time."""
    if internals.reaches_nodes_over_grpc(clients):
        return streaming_grid(clients, upload_stall_s=float("inf"), in_order=False)
    window = -(-max(_WINDOW, num_trainings) // num_edges)
    replies = PlainReplies(shared, shared.forget)
    return StreamingGrid(shared, replies, windows={TRAIN: window, STATISTICS: window})


def _num_trainings(cores: int) -> int:
    """More than the simulation has processes, or some of these would be idle."""
    return max(_TRAININGS, 2 * (cores or os.cpu_count() or 1))


def grid_of_edges(
    grid: Grid,
    config: CloudConfig,
    events: EventLog,
    *,
    simulated: bool,
    bound: Bound | None = None,
    folder: Path | None = None,
    cores: int = 0,
) -> Grid:
    """The grid of edges that a cloud works with, made of the ``grid`` that Flower gives it.

    That one's nodes are edge processes, or clients: ``simulated`` ones, or of a flat federation,
    with names ``bound`` as in ``Roster``. What simulated edges must find again is in ``folder``.
    Clients are simulated on ``cores``, 0: this machine's.
    """
    if config.topology == "flat":
        return VirtualEdges(grid, ["cloud"], events, bound, cores=cores)
    if simulated:
        names = [f"edge-{number}" for number in range(config.schedule.num_edges)]
        return VirtualEdges(grid, names, events, folder=folder, cores=cores)
    return grid


class VirtualEdges(WrappedGrid):
    """A Grid whose nodes are edges within this process, over Flower's grid of the clients.

    The node ids of ``edge_ids`` are 1, 2, ... in this order; the edges write to ``events`` too.
    What must outlive the process goes into a folder of each edge's name in ``folder``.
    """

    def __init__(
        self,
        clients: Grid,
        edge_ids: Sequence[str],
        events: EventLog,
        bound: Bound | None = None,
        folder: Path | None = None,
        *,
        cores: int = 0,
    ) -> None:
        super().__init__(clients)
        num_trainings = _num_trainings(cores)
        shared = SharedClients(clients, max_trainings=num_trainings)
        self._edges: dict[int, EdgeService] = {}
        known, alphabetical = Acquaintances(), sorted(edge_ids)
        for number, edge_id in enumerate(edge_ids, start=1):
            store = FileStore(folder / edge_id / STATE, resident=True) if folder else None
            self._edges[number] = EdgeService(
                edge_id,
                _grid_of_edge(clients, shared, len(edge_ids), num_trainings),
                events.sibling(role="edge", node=edge_id),
                threading.Event(),
                shared_questions=len(edge_ids) > 1,
                known=known,
                # So each client is with the edge that would give its statistics.
                place=(alphabetical.index(edge_id), len(edge_ids)),
                bound=bound,
                store=store,
            )
        # As a process does: an edge's next order waits until it is done with the one before.
        self._working = {number: ThreadPoolExecutor(max_workers=1) for number in self._edges}
        self._replies: dict[str, Message] = {}
        self._arrivals = Arrivals()

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of the edges."""
        return list(self._edges)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give each edge its message; they all work at the same time."""
        ids = []
        for message in messages:
            ids.append(internals.assign_id(message, uuid4().hex, run_id=self.run.run_id))
            self._working[message.metadata.dst_node_id].submit(self._work, message)
        return ids

    def _work(self, message: Message) -> None:
        edge = self._edges[message.metadata.dst_node_id]
        try:
            reply = edge.handle(message)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(ErrorCode.UNKNOWN, reason), reply_to=message)
        self._replies[message.metadata.message_id] = reply
        self._arrivals.tell(message.metadata.message_id)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies of edges that are done."""
        done = [message_id for message_id in message_ids if message_id in self._replies]
        for message_id in done:
            self._arrivals.forget(message_id)
        return [self._replies.pop(message_id) for message_id in done]

    def wait(self, message_ids: Collection[str], seconds: float) -> None:
        """Until one of these edges is done, at most ``seconds``."""
        self._arrivals.wait(message_ids, seconds)
