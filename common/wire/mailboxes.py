"""Flower's simulation with many nodes: a node's messages are found without looking at the others'.

Ten times a second Flower asks for the messages of every node, and for each it looks through all
that are stored, and checks each of them: with 10,000 nodes and a hundred messages a million.
"""

from collections import defaultdict, deque
from typing import Any, Final

from flwr.app import Message

# The attribute of Flower's store: ids of messages that nobody has taken, by node.
_BOXES: Final = "ids_by_node"


def sort_messages_by_node() -> None:
    """Mend the store of the simulation in this process, once, before it holds messages."""
    from flwr.common import now
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState

    mended: Any = InMemoryLinkState
    if hasattr(mended, _BOXES):
        return
    store = mended.store_message_ins

    def boxes(state: Any) -> defaultdict[int, deque[str]]:
        made: defaultdict[int, deque[str]] = vars(state).setdefault(_BOXES, defaultdict(deque))
        return made

    def stored(state: Any, message: Message) -> str | None:
        with state.lock:
            message_id: str | None = store(state, message)
            if message_id is not None:
                boxes(state)[message.metadata.dst_node_id].append(message_id)
        return message_id

    def taken(state: Any, node_id: int, limit: int | None) -> list[Message]:
        if not (box := boxes(state).get(node_id)):
            return []
        found: list[Message] = []
        with state.lock:
            while box and (limit is None or len(found) < limit):
                message_id = box.popleft()
                # Drops it if it has run out of time.
                state._check_stored_messages({message_id})
                if message := state.message_ins_store.get(message_id):
                    message.metadata.delivered_at = now().isoformat()
                    found.append(message)
        return found

    mended.store_message_ins, mended.get_message_ins = stored, taken
    setattr(mended, _BOXES, None)
