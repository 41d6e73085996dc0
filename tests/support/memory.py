"""A Flower Grid within one process: messages go to functions, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.typing import Run
from flwr.serverapp import Grid

from fedphd.common.wire.grid import PlainReplies, StreamingGrid

Handler = Callable[[Message], Message | None]
SERVER_NODE = 1
RUN_ID = 7


class FakeTime:
    """Monotonic seconds that pass only in ``sleep``.

    Args:
        at: what happens when, as {seconds: function}; a function runs once the time has come.
    """

    def __init__(self, at: dict[float, Callable[[], None]] | None = None) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []
        self._at = dict(at or {})

    def clock(self) -> float:
        """The present, in seconds."""
        return self.now_s

    def at(self, due_s: float, happens: Callable[[], None]) -> None:
        """Let something happen once the time has come."""
        self._at[due_s] = happens

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.slept_s.append(seconds)
        self.now_s += seconds
        for due_s in sorted(self._at):
            if due_s <= self.now_s:
                self._at.pop(due_s)()


class MemoryGrid(Grid):
    """Nodes are functions; one that returns None never answers.

    Args:
        nodes: handler by node id; may be changed while the grid is in use.
        threaded: answer in threads (like processes) or at once, in ``push_messages``.

    Attributes:
        pushed: every message that was handed in, in order.
        refused: ids of nodes whose messages the SuperLink refuses: they get None for an id.
    """

    def __init__(self, nodes: dict[int, Handler], *, threaded: bool = False) -> None:
        self.nodes = nodes
        self.pushed: list[Message] = []
        self.refused: set[int] = set()
        self._threaded = threaded
        self._replies: dict[str, Message] = {}
        self._lock = threading.Lock()

    @property
    def run(self) -> Run:
        """A run that only has an id."""
        return Run.create_empty(RUN_ID)

    def set_run(self, run: Run) -> None:
        """There is only one run."""

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Deprecated by Flower and not used here."""
        raise AssertionError("use Message(...)")

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are there now."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand each message to its node."""
        ids: list[Any] = []
        for message in messages:
            message_id = uuid4().hex
            message.metadata.__dict__.update(
                _run_id=RUN_ID, _src_node_id=SERVER_NODE, _message_id=message_id
            )
            self.pushed.append(message)
            if message.metadata.dst_node_id in self.refused:
                ids.append(None)
                continue
            ids.append(message_id)
            # A node gets a message of its own, as if it had crossed a wire.
            copy = Message(metadata=message.metadata, content=message.content)
            if self._threaded:
                threading.Thread(target=self._answer, args=(copy,), daemon=True).start()
            else:
                self._answer(copy)
        return ids

    def _answer(self, message: Message) -> None:
        handler = self.nodes.get(message.metadata.dst_node_id)
        try:
            reply = handler(message) if handler else None
        except Exception as error:
            failure = Error(
                ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"
            )
            reply = Message(failure, reply_to=message)
        if reply is not None:
            self.deliver(message, reply)

    def deliver(self, message: Message, reply: Message) -> None:
        """Put a reply to ``message`` where ``pull_messages`` finds it."""
        with self._lock:
            self._replies[message.metadata.message_id] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there."""
        with self._lock:
            found = [i for i in message_ids if i in self._replies]
            return [self._replies.pop(i) for i in found]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Only StreamingGrid sends."""
        raise AssertionError("wrap this grid in a StreamingGrid")


def streaming(
    grid: MemoryGrid, *, time: FakeTime | None = None, in_order: bool = True
) -> StreamingGrid:
    """``grid`` as the code under test sees it; with ``time`` nothing really waits."""
    if time is None:
        return StreamingGrid(grid, PlainReplies(grid), in_order=in_order)
    return StreamingGrid(
        grid, PlainReplies(grid), in_order=in_order, clock=time.clock, sleep=time.sleep
    )
