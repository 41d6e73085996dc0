"""What grids and nodes need of Flower's messages; ``replies``, ``node`` and ``control`` need more.

Flower's public API offers none of this: messages read with bounds, their sizes as they travel, ids
for those that never reach a SuperLink. A newer Flower changes these files only, and the
simulation's mends.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Final, final

from flwr.app import Array, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable import inflatable_object
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedphd.common.errors import ReplyError

_CHUNK_KIND: Final = ArrayChunk.__qualname__
# Where Flower's arrays keep their chunks once they are made.
_CHUNKS: Final = "_chunks"
# Of a message's objects, and of all its arrays' chunks: a network of 25 GB is cut into as many.
MOST_PARTS: Final = 5000


def inflated(
    message_id: str, contents: dict[str, bytes], *, most_bytes: float = math.inf
) -> Message:
    """Build a message from its objects, by id; the one place where Flower reads a peer's bytes.

    Its arrays may have ``most_bytes``: a chunk that they name often travels only once.

    Raises:
        ReplyError: they cannot be read, are too large, or are not a message.
    """
    try:
        arrays = _arrays_of(contents, most_bytes)
        message = inflate_object_from_contents(message_id, contents, objects={**arrays})
    except Exception as error:
        # Flower's reader raises whatever the sender's bytes lead it to.
        raise ReplyError(f"cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(message, Message):
        raise ReplyError(f"is a {type(message).__name__}, not a message")
    assign_id(message, message_id)
    if message.has_content():
        _keep_chunks(message.content, arrays.values())
    return message


def _keep_chunks(content: RecordDict, arrays: Iterable[Array]) -> None:
    """Give the arrays in records their chunks: Flower's reader copies ``arrays`` without them.

    The copies are around the same bytes, by which they are known.
    """
    chunks_of = {id(array.data): array.__dict__[_CHUNKS] for array in arrays}
    for record in content.array_records.values():
        for array in record.values():
            if id(array.data) in chunks_of:
                array.__dict__[_CHUNKS] = chunks_of[id(array.data)]


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


def _arrays_of(contents: dict[str, bytes], most_bytes: float) -> dict[str, Array]:
    """The arrays among a message's objects, by id, with one copy of their bytes.

    Flower's own reader copies them three times. ``contents`` loses the arrays' chunks.
    """
    arrays, chunks, most_parts = {}, set(), MOST_PARTS
    for object_id, content in contents.items():
        head = _head_of(content)
        if head[0] == Array.__qualname__:
            arrays[object_id] = array = _array(content, head[1], contents, most_bytes, most_parts)
            most_bytes -= len(array.data)
            most_parts -= len(array.__dict__[_CHUNKS])
            chunks.update(head[1])
    for object_id in chunks:
        del contents[object_id]
    return arrays


def _head_of(content: bytes) -> tuple[str, list[str], int]:
    return inflatable_object.get_object_head_values_from_object_content(content)


def _array(
    content: bytes,
    children: list[str],
    contents: Mapping[str, bytes],
    most_bytes: float,
    most_parts: int,
) -> Array:
    body = json.loads(bytes(_body_of(content)))
    # A chunk that occurs twice travels once.
    numbers = body["arraychunk_ids"]
    # Before anything is made of them: a reference of two bytes would become two objects.
    if len(numbers) > most_parts:
        raise ValueError(f"its arrays have more than {MOST_PARTS} chunks")
    order = [children[number] for number in numbers]
    if set(order) != set(children):
        raise ValueError("an array has chunks that it does not use")
    pieces = [_chunk_body(contents[key]) for key in order]
    if sum(map(len, pieces)) > most_bytes:
        raise ValueError("its arrays are larger than a reply may be")
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
