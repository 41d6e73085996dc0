"""Edges inside the cloud's process: for Flower's simulation, and for a flat federation.

The cloud's strategy sees a Grid of edges. With processes that is the cloud's SuperLink; here it
is ``VirtualEdges``, which run the same edge code over one grid of clients that they share.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.typing import Run
from flwr.serverapp import Grid

from fedphd.common.events import EventLog
from fedphd.common.grid import streaming_grid
from fedphd.common.messages import (
    CHOOSE,
    EVERY_EDGE,
    FINISH,
    HELLO,
    Choose,
    read_payload,
    to_records,
)
from fedphd.common.replies import envelope
from fedphd.common.settings import WaitConfig
from fedphd.edge.app import EdgeService

_SHARED = (HELLO, CHOOSE, FINISH)


@dataclass
class _Question:
    """One real message to a client, and the edges that wait for its answer."""

    askers: list[Message] = field(default_factory=list)
    choices: list[Choose] = field(default_factory=list)
    sent_as: str | None = None


class SharedClients:
    """One grid of clients, as several virtual edges use it at the same time.

    What all edges ask of a client becomes one message: the greeting, the end of the run, and
    the choice of an edge, which holds all edges' offers and is sent when the last has made its.

    Args:
        grid: Flower's grid of the clients.
        num_edges: edges that share it.
    """

    def __init__(self, grid: Grid, num_edges: int) -> None:
        self.grid = grid
        self._num_edges = num_edges
        self._lock = threading.RLock()
        self._open: dict[tuple[Any, ...], _Question] = {}
        self._question_of: dict[str, _Question] = {}
        self._answers: dict[str, Message] = {}

    def push(self, messages: Iterable[Message]) -> list[str]:
        """Take an edge's messages; returns ids of their own for them."""
        ids = []
        with self._lock:
            for message in messages:
                message_id = uuid4().hex
                message.metadata.__dict__.update(
                    _run_id=self.grid.run.run_id, _message_id=message_id
                )
                ids.append(message_id)
                self._add(message)
        return ids

    def _add(self, message: Message) -> None:
        kind, node_id = message.metadata.message_type, message.metadata.dst_node_id
        key: tuple[Any, ...] = (kind, node_id)
        if kind not in _SHARED:
            key = (message.metadata.message_id,)
        asked = read_payload(message, Choose) if kind == CHOOSE else None
        if asked is not None:
            key = (kind, node_id, asked.interval, asked.edge_round)
        question = self._open.setdefault(key, _Question())
        question.askers.append(envelope(message))
        if asked is not None:
            question.choices.append(asked)
        self._question_of[message.metadata.message_id] = question
        if len(question.askers) == (self._num_edges if kind in _SHARED else 1):
            del self._open[key]
            choices = question.choices
            content = to_records(_merged(choices)) if choices else message.content
            sent = self.grid.push_messages([Message(content, node_id, kind)])
            question.sent_as = next(iter(sent), "")

    def pull(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are there; each edge gets its own copy."""
        with self._lock:
            wanted = list(message_ids)
            open_ = {
                id(q): q
                for q in (self._question_of.get(message_id) for message_id in wanted)
                if q is not None and q.sent_as is not None
            }
            by_real_id = {q.sent_as: q for q in open_.values()}
            for reply in self.grid.pull_messages([i for i in by_real_id if i]):
                self._deliver(by_real_id[reply.metadata.reply_to_message_id], reply)
            return [self._answers.pop(i) for i in wanted if i in self._answers]

    def _deliver(self, question: _Question, reply: Message) -> None:
        for asker in question.askers:
            message_id = asker.metadata.message_id
            body = reply.error if reply.has_error() else reply.content
            self._answers[message_id] = Message(body, reply_to=asker)
            del self._question_of[message_id]


def _merged(asked: Sequence[Choose]) -> Choose:
    """One question with all edges' offers; its answer is for whichever edge is chosen."""
    offers = tuple(offer for question in asked for offer in question.offers)
    ordered = tuple(sorted(offers, key=lambda offer: offer.edge_id))
    return asked[0].model_copy(update={"asking": EVERY_EDGE, "offers": ordered})


class _View(Grid):
    """The shared clients as a Grid of one edge."""

    def __init__(self, clients: SharedClients) -> None:
        self._clients = clients

    @property
    def run(self) -> Run:
        return self._clients.grid.run

    def set_run(self, run: Run) -> None:
        self._clients.grid.set_run(run)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._clients.grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return self._clients.grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._clients.push(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._clients.pull(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError("wrap this grid in a StreamingGrid")


class VirtualEdges(Grid):
    """A Grid whose nodes are edges within this process.

    Args:
        clients: Flower's grid of the clients.
        edge_ids: names of the edges; their node ids are 1, 2, ... in this order.
        events: the run's event log, where the edges write too.
        hello_s: seconds that a client has to introduce itself before the first interval.
    """

    def __init__(
        self,
        clients: Grid,
        edge_ids: Sequence[str],
        events: EventLog,
        *,
        hello_s: float = WaitConfig().query_s,
    ) -> None:
        self._clients = clients
        shared = SharedClients(clients, len(edge_ids))
        self._edges = {}
        for number, edge_id in enumerate(edge_ids, start=1):
            # A single edge shares its clients with nobody, and can pull over gRPC with bounds.
            own = clients if len(edge_ids) == 1 else _View(shared)
            self._edges[number] = EdgeService(
                edge_id,
                streaming_grid(own, upload_stall_s=float("inf"), in_order=False),
                events.sibling(role="edge", node=edge_id),
                threading.Event(),
                shared_questions=own is not clients,
                hello_s=hello_s,
            )
        self._pool = ThreadPoolExecutor(max_workers=len(edge_ids))
        self._replies: dict[str, Message] = {}

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._clients.run

    def set_run(self, run: Run) -> None:
        """Hand on to the clients' grid."""
        self._clients.set_run(run)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Hand on to the clients' grid (deprecated by Flower)."""
        return self._clients.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of the edges."""
        return list(self._edges)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give each edge its message; they all work at the same time."""
        ids = []
        for message in messages:
            message_id = uuid4().hex
            message.metadata.__dict__.update(_run_id=self.run.run_id, _message_id=message_id)
            ids.append(message_id)
            self._pool.submit(self._work, message)
        return ids

    def _work(self, message: Message) -> None:
        edge = self._edges[message.metadata.dst_node_id]
        try:
            reply = edge.handle(message)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(ErrorCode.UNKNOWN, reason), reply_to=message)
        self._replies[message.metadata.message_id] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies of edges that are done."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Not offered: a StreamingGrid around this grid sends and receives."""
        raise NotImplementedError("wrap this grid in a StreamingGrid")
