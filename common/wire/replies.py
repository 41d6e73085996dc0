"""Replies pulled from a SuperLink with bounds, below Flower's public API (as ``internals``)."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from flwr.app import Message
from flwr.common.serde import message_from_proto
from flwr.proto import appio_pb2, message_pb2
from flwr.supercore.inflatable import inflatable_object

from fedphd.common.errors import ReplyError
from fedphd.common.wire.internals import MOST_PARTS, assign_id, inflated

# Replies of which parts are held at the same time, so that memory stays bounded.
_AT_A_TIME: Final = 4
# Objects of a reply that are pulled at the same time.
_TRANSFERS: Final = 2
# After this a reply that comes slowly makes room for one that is there whole.
_PATIENCE_S: Final = 1.0
# So many replies without room are asked about in one look, whether they are there whole.
_PROBES: Final = 8
# The longest that one look works on one reply, while others and their deadlines wait.
_TURN_S: Final = 1.0
# What a reply holds beside weights: the features' sums of reference statistics are 34 MB.
_BESIDE_BYTES: Final = 64 << 20
UNREADABLE: Final = (
    "its reply is not in Flower's format: install the same version of flwr on every machine"
)
# Flower's servicer failed at what some node sent.
_UNREADABLE: Final = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)

Found = Message | str


@dataclass
class _Partial:
    """A reply that is announced, and those of its objects that have come so far.

    ``object_ids`` are in the order in which a node pushes them: the message itself comes last, so
    waiting for it first would take a slow upload for a stalled one. ``began_s`` is when it was
    given room, ``progress_s`` when something of it came last; ``evicted``: how often it lost it;
    ``whole``: the SuperLink has all of it.
    """

    object_ids: tuple[str, ...]
    began_s: float | None = None
    progress_s: float = 0.0
    evicted: int = 0
    whole: bool = False
    num_bytes: int = 0
    missing: deque[str] = field(default_factory=deque)
    contents: dict[str, bytes] = field(default_factory=dict)

    @property
    def message_id(self) -> str:
        return self.object_ids[-1]

    def begin(self, now_s: float) -> None:
        """Give it room."""
        self.began_s = self.progress_s = now_s
        self.missing = deque(self.object_ids)

    def evict(self) -> None:
        """Take its room away, and what came: the SuperLink keeps it until it is confirmed."""
        self.began_s, self.num_bytes = None, 0
        self.evicted += 1
        self.contents.clear()


class GrpcReplies:
    """Replies to a ServerApp's messages, pulled with bounds (Flower's own may wait two hours).

    A node that dies after announcing its reply leaves objects that never come. Announced
    replies are therefore pulled object by object without ever blocking, four at a time so that
    memory stays bounded, and given up after ``stall_s`` seconds without a new object. One that
    comes slowly keeps none waiting that is there whole, and one that is larger than expected costs
    only its own sender. So does one that Flower cannot read, but for what was found in the same
    look; from then on each message is asked about by itself, for the next one would cost as much.

    ``grid`` is Flower's GrpcGrid of the running ServerApp; ``clock``, monotonic, is for tests.
    """

    def __init__(
        self, grid: Any, *, stall_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._grid = grid
        self.stall_s = stall_s
        self.moving = False
        self._most_bytes = _BESIDE_BYTES
        self._clock = clock
        self._partial: dict[str, _Partial] = {}
        self._one_by_one = False
        self._pool = ThreadPoolExecutor(_TRANSFERS)

    def expect(self, num_values: int) -> None:
        """Take replies with weights of so many values, and a control variate of as many."""
        self._most_bytes = _BESIDE_BYTES + 2 * 4 * num_values

    def forget(self, message_id: str) -> None:
        """Drop what came of a reply that nobody waits for any more."""
        if partial := self._partial.pop(message_id, None):
            self._confirm(partial.message_id)

    def discard(self, message_ids: list[str]) -> list[tuple[str, bool]]:
        """Free what the SuperLink keeps of forgotten replies, as in ``Replies``."""
        done = []
        for message_id, found in self._announced(message_ids):
            if found is None:
                done.append((message_id, False))
                continue
            proto, tree = found
            self._confirm(tree.object_id)
            done.append((message_id, not proto.HasField("error")))
        return done

    def poll(
        self, message_ids: list[str], wanted: Collection[str] | None = None
    ) -> list[tuple[str, Found]]:
        """Look once for replies to ``message_ids``; each comes whole, or as why it is lost.

        Of those that are not ``wanted`` (None: all are) only failures come. Raises grpc.RpcError
        where the SuperLink is gone.
        """
        self.moving = False
        done: list[tuple[str, Found]] = []
        if unannounced := [i for i in message_ids if i not in self._partial]:
            done += self._note_announced(unannounced)
        asked = message_ids if wanted is None else [i for i in message_ids if i in wanted]
        for message_id in self._with_room([i for i in asked if i in self._partial]):
            result = self._advance(self._partial[message_id])
            if result is not None:
                del self._partial[message_id]
                done.append((message_id, result))
        return done

    def wait(self, message_ids: list[str], seconds: float) -> None:
        """A SuperLink tells nobody what came."""
        time.sleep(seconds)

    def has_begun(self, message_id: str) -> bool:
        """A SuperLink's nodes look for messages by themselves."""
        return True

    def has_come(self, message_id: str) -> bool:
        """Whether the SuperLink has the whole reply, so that its sender can do no more."""
        partial = self._partial.get(message_id)
        return partial is not None and self._is_whole(partial)

    def _announced(self, message_ids: list[str]) -> Iterator[tuple[str, tuple[Any, Any] | None]]:
        """Replies that are announced, and their objects; None: Flower cannot read what came.

        A look that fails has lost all replies that it found. So from the first failure on each
        message has its own.
        """
        if not self._one_by_one:
            try:
                yield from self._look(message_ids)
                return
            except grpc.RpcError as error:
                if error.code() not in _UNREADABLE:
                    raise
                self._one_by_one = True
                if len(message_ids) == 1:
                    yield message_ids[0], None
                    return
        for message_id in message_ids:
            try:
                yield from self._look([message_id])
            except grpc.RpcError as error:
                if error.code() not in _UNREADABLE:
                    raise
                yield message_id, None

    def _look(self, message_ids: list[str]) -> list[tuple[str, tuple[Any, Any]]]:
        request = appio_pb2.PullAppMessagesRequest(message_ids=message_ids)
        response = self._grid._stub.PullMessages(request)
        pairs = zip(response.messages_list, response.message_object_trees, strict=True)
        return [(pair[0].metadata.reply_to_message_id, pair) for pair in pairs]

    def _note_announced(self, message_ids: list[str]) -> list[tuple[str, Found]]:
        """Remember what is announced; returns what needs no pulling."""
        done: list[tuple[str, Found]] = []
        for message_id, found in self._announced(message_ids):
            if found is None:
                done.append((message_id, UNREADABLE))
                continue
            proto, tree = found
            if proto.HasField("error"):
                error = message_from_proto(proto)
                assign_id(error, tree.object_id)
                self._confirm(tree.object_id)
                done.append((message_id, error))
                continue
            items = inflatable_object.iterate_object_tree(tree)
            object_ids = tuple(dict.fromkeys(item.object_id for item in items))
            if len(object_ids) > MOST_PARTS:
                self._confirm(tree.object_id)
                parts = f"{len(object_ids)} parts; at most {MOST_PARTS} are taken"
                done.append((message_id, f"its reply has {parts}"))
                continue
            self._partial[message_id] = _Partial(object_ids)
        return done

    def _with_room(self, message_ids: list[str]) -> list[str]:
        """Those that are pulled now; whoever has waited in vain for its sender makes room."""
        now_s, partial = self._clock(), self._partial
        placed = {i: at_s for i in message_ids if (at_s := partial[i].began_s) is not None}
        waiting = [i for i in message_ids if i not in placed]
        slow = [i for i, at_s in placed.items() if now_s - at_s > _PATIENCE_S]
        if slow and waiting and len(placed) >= _AT_A_TIME:
            waiting.sort(key=lambda i: (not partial[i].whole, partial[i].evicted))
            ready = [i for i in waiting[:_PROBES] if self._is_whole(partial[i])]
            # What takes long although it is there whole takes long by itself: it would lose its
            # room to others that are as large, and they to it.
            late = [i for i in slow if not self._is_whole(partial[i])]
            for slowest, _ in zip(late, ready, strict=False):
                partial[slowest].evict()
                del placed[slowest]
        waiting.sort(key=lambda i: (not partial[i].whole, partial[i].evicted))
        chosen = waiting[: max(0, _AT_A_TIME - len(placed))]
        for message_id in chosen:
            partial[message_id].begin(now_s)
        return [*placed, *chosen]

    def _is_whole(self, partial: _Partial) -> bool:
        """Whether all of it is there: its message comes last, and is small."""
        partial.whole = partial.whole or self._pull(partial.message_id) != b""
        return partial.whole

    def _advance(self, partial: _Partial) -> Found | None:
        """Pull what is there; the message if it is whole, the reason if it is lost, else None."""
        turn_s = self._clock() + _TURN_S
        while partial.missing:
            asked = [partial.missing[i] for i in range(min(_TRANSFERS, len(partial.missing)))]
            found = list(self._pool.map(self._pull, asked))
            if None in found:
                return "its reply was lost on the server"
            came = {key: content for key, content in zip(asked, found, strict=True) if content}
            if came:
                self.moving = True
                partial.contents |= came
                partial.num_bytes += sum(map(len, came.values()))
                for _ in asked:
                    partial.missing.popleft()
                partial.missing.extendleft([key for key in asked if key not in came][::-1])
                partial.progress_s = self._clock()
            elif self._clock() - partial.progress_s <= self.stall_s:
                return None
            else:
                self._confirm(partial.message_id)
                return f"its upload stalled for {self.stall_s:g} s"
            if partial.num_bytes > self._most_bytes:
                self._confirm(partial.message_id)
                return f"its reply is larger than {self._most_bytes / 1e6:.0f} MB"
            if partial.missing and self._clock() > turn_s:
                return None
        self._confirm(partial.message_id)
        try:
            contents, most_bytes = partial.contents, self._most_bytes
            return inflated(partial.message_id, contents, most_bytes=most_bytes)
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
