"""A Flower Grid that yields replies one at a time, each bounded, exactly one per message.

Flower's own ``send_and_receive`` looks for replies every 3 s and returns all of them at once, so
memory grows with the clients and one endless upload holds up the rest. ``Strategy`` takes an
iterable of replies, so a generator lets it aggregate while others still train.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any, Final, Protocol
from uuid import uuid4

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.common.typing import Run
from flwr.serverapp import Grid

from fedphd.common.errors import FailureKind
from fedphd.common.wire import internals
from fedphd.common.wire.exchange import (
    PUSH_BATCH,
    Exchange,
    LateReply,
    Quorum,
    Sent,
    UnderWay,
)
from fedphd.common.wire.failures import NoAnswerError
from fedphd.common.wire.replies import GrpcReplies
from fedphd.common.wire.rhythm import near_s
from fedphd.common.wire.traffic import Traffic

_REFUSED: Final = "its SuperLink refused the message"
# In place of Flower's own text, which is too long for the line that an interval prints.
_REASONS: Final = {
    ErrorCode.NODE_UNAVAILABLE: "no heartbeat from it: its process or its network is gone"
}
_Reply = Message | str | NoAnswerError
_KINDS: Final[dict[int, FailureKind]] = {
    ErrorCode.NODE_UNAVAILABLE: "gone",
    ErrorCode.MESSAGE_UNAVAILABLE: "lost",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "lost",
}


class Replies(UnderWay, Protocol):
    """Where replies come from: ``GrpcReplies`` for processes, ``PlainReplies`` otherwise.

    ``moving``: the last ``poll`` brought a part of a reply.
    """

    stall_s: float
    moving: bool

    def expect(self, num_values: int) -> None:
        """From now on replies hold weights of so many values, and a variate of as many."""

    def poll(
        self, message_ids: list[str], wanted: Collection[str] | None = None
    ) -> list[tuple[str, Message | str]]:
        """Look once; each reply found comes whole, or as the reason why it is lost.

        None: all are ``wanted``. Of others at most failures come, where they can be told early.
        """

    def wait(self, message_ids: list[str], seconds: float) -> None:
        """Return after ``seconds``; sooner where it is known that one of the replies came."""

    def forget(self, message_id: str) -> None:
        """Nobody waits for this reply any more."""

    def discard(self, message_ids: list[str]) -> list[tuple[str, bool]]:
        """Take what came of forgotten replies out of the server, unread.

        Returns each message of which nothing is to come any more, and whether its reply came.
        """


@dataclass
class PlainReplies:
    """Replies of a Grid whose ``pull_messages`` never blocks (simulation, tests).

    ``on_forget`` is told the id of each message that nobody waits for any more, and then takes
    care of its reply; None: the reply stays in the grid until ``discard``.
    """

    grid: Grid
    on_forget: Callable[[str], None] | None = None
    stall_s: float = float("inf")
    moving: bool = False

    def expect(self, num_values: int) -> None:
        """Nothing to bound: these replies are in this process already."""

    def poll(
        self, message_ids: list[str], wanted: Collection[str] | None = None
    ) -> list[tuple[str, Message | str]]:
        """Look once for the replies that are wanted."""
        asked = message_ids if wanted is None else [i for i in message_ids if i in wanted]
        found = self.grid.pull_messages(asked)
        return [(reply.metadata.reply_to_message_id, reply) for reply in found]

    def wait(self, message_ids: list[str], seconds: float) -> None:
        """As the grid does, where it is one of ours."""
        if isinstance(self.grid, WrappedGrid):
            self.grid.wait(message_ids, seconds)
        else:
            time.sleep(seconds)

    def has_begun(self, message_id: str) -> bool:
        """As the grid says, where it is one of ours."""
        return not isinstance(self.grid, WrappedGrid) or self.grid.has_begun(message_id)

    def has_come(self, message_id: str) -> bool:
        """What is there a look brings at once."""
        return False

    def forget(self, message_id: str) -> None:
        """Hand on to ``on_forget``."""
        if self.on_forget:
            self.on_forget(message_id)

    def discard(self, message_ids: list[str]) -> list[tuple[str, bool]]:
        """Pull and drop them."""
        if self.on_forget:
            return [(message_id, False) for message_id in message_ids]
        found = self.grid.pull_messages(message_ids)
        return [(reply.metadata.reply_to_message_id, not reply.has_error()) for reply in found]


class WrappedGrid(Grid):
    """A Grid made of another one; how messages go and replies come is up to its subclasses."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._grid.run

    def set_run(self, run: Run) -> None:
        """Hand on to the wrapped grid."""
        self._grid.set_run(run)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Hand on to the wrapped grid (deprecated by Flower)."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are connected now."""
        return self._grid.get_node_ids()

    def wait(self, message_ids: Collection[str], seconds: float) -> None:
        """Wait until a look for replies to these messages is worth while, at most ``seconds``."""
        time.sleep(seconds)

    def has_begun(self, message_id: str) -> bool:
        """Whether the message is with the wrapped grid, and does not wait for others here."""
        return True

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Only a StreamingGrid sends and receives; raises NotImplementedError."""
        raise NotImplementedError("wrap this grid in a StreamingGrid")


class StreamingGrid(WrappedGrid):
    """Yields replies as they come, each bounded; see the module's docstring.

    Args:
        grid: Flower's grid of the running ServerApp.
        replies: how replies are pulled.
        in_order: yield replies in the order of the messages (reproducible sums).
        windows: by a message's type, how many of an exchange may be under way at a time, at least
            1; of other types all.
        counts: whether messages are counted in ``traffic``, for which each is hashed; those that
            stay in this process need not be.
        clock, sleep: monotonic seconds, and waiting in place of that for replies; for tests.
    """

    def __init__(
        self,
        grid: Grid,
        replies: Replies,
        *,
        in_order: bool = False,
        windows: Mapping[str, int] | None = None,
        counts: bool = True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(grid)
        self.traffic = Traffic()
        self.in_order = in_order
        self._counts = counts
        self._quorums: dict[str, Quorum] = {}
        self._late: dict[str, tuple[Message, float]] = {}
        self._replies, self._windows = replies, dict(windows or {})
        self._clock, self._sleep = clock, sleep

    def configure(
        self,
        *,
        in_order: bool,
        upload_stall_s: float,
        quorums: Mapping[str, Quorum] | None = None,
    ) -> None:
        """Set what a run's plan brings; ``quorums`` are for messages of one type each."""
        self.in_order = in_order
        self._replies.stall_s = upload_stall_s
        self._quorums = dict(quorums or {})

    def expect(self, num_values: int) -> None:
        """Take replies with weights of so many values; larger ones are lost."""
        self._replies.expect(num_values)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages and count the bytes of those that the SuperLink took."""
        batch = list(messages)
        if not self._counts:
            return list(self._grid.push_messages(batch))
        for message in batch:
            internals.cut_up(message)
        message_ids = list(self._grid.push_messages(batch))
        sizes: dict[str, int] = {}
        # Counted after the push, which fills in the addresses.
        taken = (message for message, i in zip(batch, message_ids, strict=False) if i)
        sent_bytes = sum(internals.message_bytes(message, sizes) for message in taken)
        self.traffic += Traffic(sent_bytes=sent_bytes)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there now."""
        found = self._replies.poll(list(message_ids))
        return [reply for _, reply in found if isinstance(reply, Message)]

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        in_order: bool | None = None,
    ) -> Iterator[Message]:
        """Send ``messages`` and yield exactly one reply for each, as they come.

        What was lost, refused or not there ``timeout`` seconds after its message was sent is
        yielded as an error reply that says why; ``metadata.src_node_id`` is always the node
        that was asked. ``messages`` are taken one after the other, as the window allows; those of
        an iterator, which may take its time over each, are sent one by one. All are of one type,
        whose quorum counts once all are sent.

        Args:
            timeout: seconds for each reply; None: no limit.
            in_order: yield replies in the order of the messages; None: as the grid is set.
        """
        first = list(islice(source := iter(messages), 1))
        kind = first[0].metadata.message_type if first else ""
        exchange = Exchange(
            chain(first, source),
            timeout_s=float("inf") if timeout is None else timeout,
            limit=f"{timeout:g} s" if timeout is not None else "",
            quorum=self._quorums.get(kind),
            window=self._windows.get(kind),
            batch=1 if source is messages else PUSH_BATCH,
        )
        try:
            self._send(exchange)
        except Exception:
            # Nobody takes the replies to those that are on their way.
            self._give_up(exchange.pending)
            raise
        return self._receive_all(exchange, self.in_order if in_order is None else in_order)

    def late_replies(self) -> list[LateReply]:
        """The replies that came since the last call, after they had been given up; dropped."""
        late = []
        for message_id, came in self._replies.discard(list(self._late)) if self._late else ():
            message, given_up_s = self._late.pop(message_id)
            if came:
                late.append(LateReply(message, self._clock() - given_up_s))
        return late

    def _send(self, exchange: Exchange) -> None:
        """Send what the window has room for."""
        pending = exchange.pending
        while room := exchange.room:
            if not (batch := list(islice(exchange.source, room))):
                exchange.all_sent = True
                return
            for message in batch:
                message.metadata.ttl = max(message.metadata.ttl, exchange.kept_s)
            # A refused message has no id in what comes back, or what comes back is too short.
            for message, message_id in zip_longest(batch, self.push_messages(batch)):
                exchange.num_sent += 1
                deadline_s = self._clock() + exchange.timeout_s
                sent = Sent(internals.envelope(message), deadline_s, refused=not message_id)
                pending[message_id or uuid4().hex] = sent

    def _receive_all(self, exchange: Exchange, in_order: bool) -> Iterator[Message]:
        try:
            yield from self._receive(exchange, in_order)
        finally:
            # Whoever took the replies has failed over one of them.
            self._give_up(exchange.pending)

    def _receive(self, exchange: Exchange, in_order: bool) -> Iterator[Message]:
        since_s, pending = self._clock(), exchange.pending
        while pending:
            # In order, the others may be there already: only the first can be late.
            first = dict(islice(pending.items(), 1 if in_order else None))
            found = self._look(exchange, first)
            if found or self._replies.moving:
                since_s = self._clock()
            if not found:
                late = exchange.overdue(first, self._clock(), self._replies)
                self._give_up(late)
                why = _no_answer(f"no reply within {exchange.limit}", exchange.late)
                found = [(key, why) for key in late]
            if not found:
                self._wait(list(first), near_s(self._clock() - since_s))
            # A second reply to the same message, or one to another's, finds nobody who waits.
            came = [
                (pending.pop(message_id).message, reply)
                for message_id, reply in found
                if message_id in pending
            ]
            # Before the replies are worked on, so that no node is idle in the meantime.
            self._send(exchange)
            accepted = deque(self._accept(message, reply) for message, reply in came)
            exchange.num_answered += sum(not reply.has_error() for reply in accepted)
            exchange.cut_short(self._clock())
            # Each may be as large as the network: it is kept no longer than it is worked on.
            del found, came
            while accepted:
                yield accepted.popleft()

    def _look(self, exchange: Exchange, first: Mapping[str, Sent]) -> list[tuple[str, _Reply]]:
        """What came of the messages whose turn it is.

        All are asked about: Flower says that a node is gone only as long as it is.
        """
        found: list[tuple[str, _Reply]] = [(key, _REFUSED) for key, s in first.items() if s.refused]
        early = exchange.early
        if asked := [k for k, sent in exchange.pending.items() if not (sent.refused or k in early)]:
            found += self._replies.poll(asked, first)
        early |= {key: reply for key, reply in found if key not in first}
        ready = [(key, early.pop(key)) for key in first if key in early]
        return [(key, reply) for key, reply in found if key in first] + ready

    def _wait(self, message_ids: list[str], seconds: float) -> None:
        if self._sleep:
            self._sleep(seconds)
        else:
            self._replies.wait(message_ids, seconds)

    def _give_up(self, pending: Mapping[str, Sent]) -> None:
        """Nobody waits for replies to these any more."""
        now_s = self._clock()
        for message_id, sent in pending.items():
            if not sent.refused:
                self._replies.forget(message_id)
                self._late[message_id] = (sent.message, now_s)

    def _accept(self, sent: Message, reply: _Reply) -> Message:
        if isinstance(reply, str):
            reply = _no_answer(reply, "lost")
        if isinstance(reply, NoAnswerError):
            return Message(reply, reply_to=sent)
        if self._counts:
            self.traffic += Traffic(received_bytes=internals.message_bytes(reply, {}))
        if reply.has_error():
            # Flower's own error replies name the SuperLink as their source, not the node.
            reason = _REASONS.get(reply.error.code, reply.error.reason or "unknown")
            kind = _KINDS.get(reply.error.code, "error")
            return Message(NoAnswerError(reply.error.code, reason, kind), reply_to=sent)
        if reply.metadata.src_node_id != sent.metadata.dst_node_id:
            source = reply.metadata.src_node_id
            why = _no_answer(f"its reply names node {source} as its source", "malformed")
            return Message(why, reply_to=sent)
        return reply


def streaming_grid(
    grid: Grid,
    *,
    upload_stall_s: float,
    in_order: bool,
    counts: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> StreamingGrid:
    """Wrap the grid that Flower hands to a ServerApp, whichever kind it is."""
    replies: Replies = PlainReplies(grid)
    if internals.reaches_nodes_over_grpc(grid):
        replies = GrpcReplies(grid, stall_s=upload_stall_s)
    return StreamingGrid(grid, replies, in_order=in_order, counts=counts, clock=clock)


def _no_answer(reason: str, kind: FailureKind) -> NoAnswerError:
    return NoAnswerError(ErrorCode.MESSAGE_UNAVAILABLE, reason, kind)
