"""What the grids need of Flower's internals; ``node.py`` and ``control.py`` know the others.

Flower's public API offers none of this: replies pulled with bounds, sizes of messages as they
travel, ids for messages that never reach a SuperLink. A newer Flower changes these files only.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.proto import appio_pb2, message_pb2
from flwr.serverapp import Grid
from flwr.supercore.inflatable import inflatable_object
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedphd.common.errors import ReplyError

# Replies that are pulled at the same time.
_AT_A_TIME: Final = 4


@dataclass
class _Partial:
    """A reply that is announced, and those of its objects that have come so far."""

    message_id: str
    missing: list[str]
    progress_s: float
    contents: dict[str, bytes] = field(default_factory=dict)


class GrpcReplies:
    """Replies to a ServerApp's messages, pulled with bounds (Flower's own may wait two hours).

    A node that dies after announcing its reply leaves objects that never come. Announced
    replies are therefore pulled object by object without ever blocking, four at a time so that
    memory stays bounded, and given up after ``stall_s`` seconds without a new object.

    ``grid`` is Flower's GrpcGrid of the running ServerApp; ``clock``, monotonic, is for tests.
    """

    def __init__(
        self, grid: Any, *, stall_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._grid = grid
        self.stall_s = stall_s
        self._clock = clock
        self._partial: dict[str, _Partial] = {}

    def forget(self, message_id: str) -> None:
        """Drop what came of a reply that nobody waits for any more."""
        if partial := self._partial.pop(message_id, None):
            self._confirm(partial.message_id)

    def discard(self, message_ids: list[str]) -> list[tuple[str, bool]]:
        """Free what the SuperLink keeps of forgotten replies, as in ``Replies``."""
        request = appio_pb2.PullAppMessagesRequest(message_ids=message_ids)
        response = self._grid._stub.PullMessages(request)
        pairs = zip(response.messages_list, response.message_object_trees, strict=True)
        done = []
        for proto, tree in pairs:
            self._confirm(tree.object_id)
            done.append((proto.metadata.reply_to_message_id, not proto.HasField("error")))
        return done

    def poll(self, message_ids: list[str]) -> list[tuple[str, Message | str]]:
        """Look once for replies to ``message_ids``; each comes whole, or as why it is lost."""
        if unannounced := [i for i in message_ids if i not in self._partial]:
            self._note_announced(unannounced)
        done: list[tuple[str, Message | str]] = []
        for message_id in [i for i in message_ids if i in self._partial][:_AT_A_TIME]:
            result = self._advance(self._partial[message_id])
            if result is not None:
                del self._partial[message_id]
                done.append((message_id, result))
        return done

    def _note_announced(self, message_ids: list[str]) -> None:
        request = appio_pb2.PullAppMessagesRequest(message_ids=message_ids)
        response = self._grid._stub.PullMessages(request)
        pairs = zip(response.messages_list, response.message_object_trees, strict=True)
        for proto, tree in pairs:
            # Pulled from the end, in the order in which a node pushes them: the message itself
            # comes last, so waiting for it first would take a slow upload for a stalled one.
            missing = [item.object_id for item in inflatable_object.iterate_object_tree(tree)][::-1]
            partial = _Partial(tree.object_id, missing, progress_s=self._clock())
            self._partial[proto.metadata.reply_to_message_id] = partial

    def _advance(self, partial: _Partial) -> Message | str | None:
        """Pull what is there; the message if it is whole, the reason if it is lost, else None."""
        stub, ours = self._grid._stub, {"node": self._grid.node, "run_id": self._grid.run.run_id}
        while partial.missing:
            object_id = partial.missing[-1]
            reply = stub.PullObject(message_pb2.PullObjectRequest(object_id=object_id, **ours))
            if not reply.object_found:
                return "its reply was lost on the server"
            if not reply.object_available:
                if self._clock() - partial.progress_s <= self.stall_s:
                    return None
                self._confirm(partial.message_id)
                return f"its upload stalled for {self.stall_s:g} s"
            partial.contents[object_id] = reply.object_content
            partial.missing.pop()
            partial.progress_s = self._clock()
        self._confirm(partial.message_id)
        try:
            return inflated(partial.message_id, partial.contents)
        except ReplyError as error:
            return f"its reply {error}"

    def _confirm(self, message_id: str) -> None:
        """Let the SuperLink delete a reply, which it keeps otherwise."""
        request = message_pb2.ConfirmMessageReceivedRequest(
            message_object_id=message_id, node=self._grid.node, run_id=self._grid.run.run_id
        )
        self._grid._stub.ConfirmMessageReceived(request)


def inflated(message_id: str, contents: dict[str, bytes]) -> Message:
    """Build a message from its objects, by id; the one place where Flower reads a peer's bytes.

    Raises:
        ReplyError: they cannot be read, or are not a message.
    """
    try:
        message = inflate_object_from_contents(message_id, contents)
    except Exception as error:
        # Flower's reader raises whatever the sender's bytes lead it to.
        raise ReplyError(f"cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(message, Message):
        raise ReplyError(f"is a {type(message).__name__}, not a message")
    assign_id(message, message_id)
    return message


def assign_id(message: Message, message_id: str, *, run_id: int | None = None) -> str:
    """Give a message the id (and the run) that a SuperLink would give it; returns the id."""
    # Flower's metadata has no setters for these.
    message.metadata.__dict__["_message_id"] = message_id
    if run_id is not None:
        message.metadata.__dict__["_run_id"] = run_id
    return message_id


def reaches_nodes_over_grpc(grid: Grid) -> bool:
    """Whether a grid of Flower's reaches real nodes through a SuperLink, not simulated ones."""
    return hasattr(grid, "_stub")


def message_bytes(message: Message, sizes: dict[str, int]) -> int:
    """Bytes of a message's contents as they travel (what Flower counts for a run).

    ``sizes`` remembers each object's, so that weights that go to many nodes are serialised once.
    """
    with inflatable_object.no_object_id_recompute():
        objects = inflatable_object.get_all_nested_objects(message)
        new = {key: item for key, item in objects.items() if key not in sizes}
        sizes |= {key: len(item.deflate()) for key, item in new.items()}
    return sum(sizes[object_id] for object_id in objects)


def with_own_records(records: RecordDict) -> RecordDict:
    """The same in records that no other message holds; the arrays' bytes are shared.

    Flower writes an id into each record when it serialises it. Where messages are handed over
    within a process, one thread may write it while another one pickles the record.
    """
    # An ArrayRecord makes arrays of its own here, around the same bytes.
    own = {name: type(record)(dict(record)) for name, record in records.items()}  # type: ignore[arg-type]
    return RecordDict(own)


def envelope(message: Message) -> Message:
    """The message without its content, to reply to when its weights are long gone."""
    return make_message(metadata=message.metadata, content=RecordDict())
