"""What the grids need of Flower's internals; ``node``, ``control`` and the simulation's mends too.

Flower's public API offers none of this: replies pulled with bounds, sizes of messages as they
travel, ids for messages that never reach a SuperLink. A newer Flower changes these files only.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final, final

from flwr.app import Array, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto import appio_pb2, message_pb2
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable import inflatable_object
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedphd.common.errors import ReplyError

# Replies that are pulled at the same time.
_AT_A_TIME: Final = 4
# Objects of a reply that are pulled at the same time.
_TRANSFERS: Final = 2
_CHUNK_KIND: Final = ArrayChunk.__qualname__
# Where Flower's arrays keep their chunks once they are made.
_CHUNKS: Final = "_chunks"


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
        self.moving = False
        self._clock = clock
        self._partial: dict[str, _Partial] = {}
        self._pool = ThreadPoolExecutor(_TRANSFERS)

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
        self.moving = False
        if unannounced := [i for i in message_ids if i not in self._partial]:
            self._note_announced(unannounced)
        done: list[tuple[str, Message | str]] = []
        for message_id in [i for i in message_ids if i in self._partial][:_AT_A_TIME]:
            result = self._advance(self._partial[message_id])
            if result is not None:
                del self._partial[message_id]
                done.append((message_id, result))
        return done

    def wait(self, message_ids: list[str], seconds: float) -> None:
        """A SuperLink tells nobody what came."""
        time.sleep(seconds)

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
        while partial.missing:
            asked = partial.missing[-_TRANSFERS:]
            found = list(self._pool.map(self._pull, asked))
            if None in found:
                return "its reply was lost on the server"
            came = {key: content for key, content in zip(asked, found, strict=True) if content}
            if came:
                self.moving = True
                partial.contents |= came
                partial.missing = [key for key in partial.missing if key not in came]
                partial.progress_s = self._clock()
            elif self._clock() - partial.progress_s <= self.stall_s:
                return None
            else:
                self._confirm(partial.message_id)
                return f"its upload stalled for {self.stall_s:g} s"
        self._confirm(partial.message_id)
        try:
            return inflated(partial.message_id, partial.contents)
        except ReplyError as error:
            return f"its reply {error}"

    def _pull(self, object_id: str) -> bytes | None:
        """An object's content, which is never empty; b"" if it is yet to come, None if lost."""
        request = message_pb2.PullObjectRequest(
            node=self._grid.node, run_id=self._grid.run.run_id, object_id=object_id
        )
        reply = self._grid._stub.PullObject(request)
        if not reply.object_found:
            return None
        return reply.object_content if reply.object_available else b""

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
        arrays = _arrays_of(contents)
        message = inflate_object_from_contents(message_id, contents, objects={**arrays})
    except Exception as error:
        # Flower's reader raises whatever the sender's bytes lead it to.
        raise ReplyError(f"cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(message, Message):
        raise ReplyError(f"is a {type(message).__name__}, not a message")
    assign_id(message, message_id)
    return message


@final
class _Chunk(ArrayChunk):
    """A piece of an array's bytes, which is hashed once and written with one copy.

    Flower's own is copied twice whenever it is written, and written to be hashed. What travels is
    the same.
    """

    def __init__(self, data: memoryview, object_id: str | None = None) -> None:
        super().__init__(data)
        divider = HEAD_VALUE_DIVIDER
        head = f"{_CHUNK_KIND}{divider}{divider}{len(data)}".encode()
        self._head = head + HEAD_BODY_DIVIDER
        self._id = object_id

    @property
    def object_id(self) -> str:
        """The SHA-256 of what ``deflate`` writes."""
        if self._id is None:
            digest = hashlib.sha256(self._head)
            digest.update(self.data)
            self._id = digest.hexdigest()
        return self._id

    @property
    def num_bytes(self) -> int:
        """The length of what ``deflate`` writes."""
        return len(self._head) + len(self.data)

    def deflate(self) -> bytes:
        """What travels."""
        return b"".join((self._head, self.data))


def cut_up(message: Message) -> None:
    """Divide the arrays of a message into chunks as Flower does, but into cheap ones.

    To be called before anything asks for the message's id or its objects.
    """
    if not message.has_content():
        return
    size = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    for record in message.content.array_records.values():
        for array in record.values():
            if _CHUNKS not in array.__dict__:
                view = memoryview(array.data)
                begins = range(0, len(view), size)
                _set_chunks(array, [_Chunk(view[begin : begin + size]) for begin in begins])


def _set_chunks(array: Array, chunks: list[_Chunk]) -> None:
    array.__dict__[_CHUNKS] = [(chunk.object_id, chunk) for chunk in chunks]


def _arrays_of(contents: dict[str, bytes]) -> dict[str, Array]:
    """The arrays among a message's objects, by id, with one copy of their bytes.

    Flower's own reader copies them three times. ``contents`` loses the arrays' chunks.
    """
    arrays, chunks = {}, set()
    for object_id, content in contents.items():
        head = _head_of(content)
        if head[0] == Array.__qualname__:
            arrays[object_id] = _array(content, head[1], contents)
            chunks.update(head[1])
    for object_id in chunks:
        del contents[object_id]
    return arrays


def _head_of(content: bytes) -> tuple[str, list[str], int]:
    return inflatable_object.get_object_head_values_from_object_content(content)


def _array(content: bytes, children: list[str], contents: Mapping[str, bytes]) -> Array:
    body = json.loads(bytes(_body_of(content)))
    # A chunk that occurs twice travels once.
    order = [children[number] for number in body["arraychunk_ids"]]
    if set(order) != set(children):
        raise ValueError("an array has chunks that it does not use")
    pieces = [_chunk_body(contents[key]) for key in order]
    data, shape = b"".join(pieces), tuple(body["shape"])
    array = Array(dtype=body["dtype"], shape=shape, stype=body["stype"], data=data)
    ends = accumulate(len(piece) for piece in pieces)
    views = [memoryview(data)[end - len(p) : end] for p, end in zip(pieces, ends, strict=True)]
    # Whoever counts the array's bytes, or sends it on, need not hash it again.
    _set_chunks(array, [_Chunk(view, key) for view, key in zip(views, order, strict=True)])
    return array


def _chunk_body(content: bytes) -> memoryview:
    if (kind := _head_of(content)[0]) != _CHUNK_KIND:
        raise ValueError(f"a {kind} in place of an array's chunk")
    return _body_of(content)


def _body_of(content: bytes) -> memoryview:
    return memoryview(content)[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]


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
    cut_up(message)
    with inflatable_object.no_object_id_recompute():
        objects = inflatable_object.get_all_nested_objects(message)
        new = {key: item for key, item in objects.items() if key not in sizes}
        sizes |= {key: _size_of(item) for key, item in new.items()}
    return sum(sizes[object_id] for object_id in objects)


def _size_of(item: inflatable_object.InflatableObject) -> int:
    return item.num_bytes if isinstance(item, _Chunk) else len(item.deflate())


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
