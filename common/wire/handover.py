"""Flower's simulation hands a message over as soon as it is sent, however many nodes there are.

Flower asks its store for the messages of one node after the other, looking through all that are
stored each time, and then pauses for 0.1 s, whatever is sent meanwhile: an edge that asks its
clients in turn which edge they choose waits longer for that than they train. Here whoever is asked
for, the next message comes, to whichever node it goes: Flower reads that off the message. And who
sent it is told when the reply comes.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from flwr.app import Message
from flwr.serverapp import Grid

# The attribute of Flower's store that holds an _Outbox.
_OUTBOX: Final = "outbox"
# That of who is told of replies.
_LISTENERS: Final = "listeners"
# Without messages, Flower's way through all nodes takes so long. It then looks whether to stop.
_TURN_S: Final = 1.0
# In about so many waits, since each costs some processor time.
_WAITS: Final = 100


class _Outbox:
    """Ids of messages that nobody has taken, as they were sent."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ids: deque[str] = deque()
        self._looks = 0

    def put(self, message_id: str) -> None:
        with self._changed:
            self._ids.append(message_id)
            self._changed.notify()

    def take(self, num_nodes: int) -> str | None:
        """The next one; None if none comes within this look's part of a turn."""
        with self._changed:
            per_wait = max(1, num_nodes // _WAITS)
            self._looks += 1
            if not self._ids and self._looks % per_wait == 0:
                self._changed.wait(_TURN_S * per_wait / max(1, num_nodes))
            return self._ids.popleft() if self._ids else None


def hand_over_at_once() -> None:
    """Mend the store of the simulation in this process, once, before it holds messages."""
    from flwr.common import now
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState

    mended: Any = InMemoryLinkState
    if hasattr(mended, _OUTBOX):
        return
    store = mended.store_message_ins

    def outbox(state: Any) -> _Outbox:
        made: _Outbox = vars(state).setdefault(_OUTBOX, _Outbox())
        return made

    def stored(state: Any, message: Message) -> str | None:
        message_id: str | None = store(state, message)
        if message_id is not None:
            outbox(state).put(message_id)
        return message_id

    def taken(state: Any, node_id: int, limit: int | None) -> list[Message]:
        found: list[Message] = []
        while limit is None or len(found) < limit:
            message_id = outbox(state).take(len(state.nodes))
            if message_id is None:
                break
            with state.lock:
                # Drops it if it has run out of time.
                state._check_stored_messages({message_id})
                if message := state.message_ins_store.get(message_id):
                    message.metadata.delivered_at = now().isoformat()
                    found.append(message)
        return found

    mended.store_message_ins, mended.get_message_ins = stored, taken
    mended.store_message_res = _telling(mended.store_message_res)
    setattr(mended, _OUTBOX, None)


def _telling(store: Callable[[Any, Message], str | None]) -> Callable[[Any, Message], str | None]:
    """The store's way to take a reply, after which the listeners are told."""

    def stored(state: Any, message: Message) -> str | None:
        reply_id = store(state, message)
        if reply_id is not None:
            for tell in vars(state).get(_LISTENERS, ()):
                tell(message.metadata.reply_to_message_id)
        return reply_id

    return stored


def tell_of_replies(grid: Grid, tell: Callable[[str], None]) -> None:
    """Let ``tell`` know the id of each message whose reply comes to a simulation's ``grid``.

    It is called in the thread that stores the reply. Of another grid nothing is told.
    """
    state = getattr(grid, "state", None)
    if hasattr(type(state), _OUTBOX):
        vars(state).setdefault(_LISTENERS, []).append(tell)
