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

Handler = Callable[[Message], Message | None]
SERVER_NODE = 1
RUN_ID = 7


class MemoryGrid(Grid):
    """Nodes are functions; one that returns None never answers.

    Args:
        nodes: handler by node id; may be changed while the grid is in use.
        threaded: answer in threads (like processes) or at once, in ``push_messages``.
    """

    def __init__(self, nodes: dict[int, Handler], *, threaded: bool = False) -> None:
        self.nodes = nodes
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
        ids = []
        for message in messages:
            message_id = uuid4().hex
            message.metadata.__dict__.update(
                _run_id=RUN_ID, _src_node_id=SERVER_NODE, _message_id=message_id
            )
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
