"""What the nodes of a grid in memory do when a test asks them something."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ConfigRecord, Message, RecordDict
from support.memory import MemoryGrid


def echo(message: Message) -> Message:
    """Answer with what came."""
    return Message(message.content, reply_to=message)


def silent(message: Message) -> None:
    """Never answer."""
    return None


def failing(message: Message) -> Message:
    """Raise."""
    raise ValueError("no data")


def to(*node_ids: int) -> list[Message]:
    """A message to each node."""
    return [Message(RecordDict({"c": ConfigRecord({"n": n})}), n, "train") for n in node_ids]


def answer_later(grid: MemoryGrid, node_id: int) -> Callable[[], None]:
    """Answers the message that ``node_id`` was sent, when called."""

    def answer() -> None:
        [message] = [m for m in grid.pushed if m.metadata.dst_node_id == node_id]
        grid.deliver(message, echo(message))

    return answer


def sources(replies: list[Message]) -> list[int]:
    """Whose replies they are."""
    return [reply.metadata.src_node_id for reply in replies]
