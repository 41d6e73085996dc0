"""The messages of one ``send_and_receive``: which are to be sent, under way, late."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from flwr.app import Message

from fedphd.common.errors import FailureKind
from fedphd.common.wire.failures import NoAnswerError

# Messages that are sent together, where as many are under way as want to be.
PUSH_BATCH: Final = 32
# 0.7 of 10 messages are 7, whatever floats make of it.
_ROUNDING: Final = 1e-9
# Flower forgets a message after 12 h, unless it says otherwise; a late reply is still told as one.
_LATE_S: Final = 3600.0


@dataclass(frozen=True)
class Quorum:
    """When enough have answered: the others then have ``grace_s`` seconds more.

    ``share`` is that of the messages sent, above 0 and at most 1, whose replies are enough; error
    replies do not count.
    """

    share: float
    grace_s: float


class UnderWay(Protocol):
    """What is known of a message between its being sent and its reply."""

    def has_begun(self, message_id: str) -> bool:
        """Whether the message is on its way to its node, and no longer waits in this process."""

    def has_come(self, message_id: str) -> bool:
        """Whether its reply is all there, though nobody has read it yet."""


@dataclass(frozen=True)
class LateReply:
    """A reply that came ``late_s`` seconds after it had been given up, and was dropped.

    ``message`` is the one that it answers, without its content.
    """

    message: Message
    late_s: float


@dataclass
class Sent:
    """A message under way; ``begun``: it has left this process, so its time counts."""

    message: Message
    deadline_s: float
    refused: bool
    begun: bool = False


@dataclass
class Exchange:
    """The messages of one ``send_and_receive``: those to be sent, and those under way.

    ``limit`` says how long a reply may take, for people; one that takes longer is ``late``.
    ``window`` is how many may be under way at a time; None: all. ``batch`` is how many are sent
    together.
    """

    source: Iterator[Message]
    timeout_s: float
    limit: str
    quorum: Quorum | None
    window: int | None
    batch: int = PUSH_BATCH
    pending: dict[str, Sent] = field(default_factory=dict)
    num_sent: int = 0
    num_answered: int = 0
    all_sent: bool = False
    late: FailureKind = "late"
    # Replies that came before their turn.
    early: dict[str, Message | str | NoAnswerError] = field(default_factory=dict)

    @property
    def kept_s(self) -> float:
        """How long Flower must keep a message at least, to take its reply; 0 where that is open."""
        return self.timeout_s + _LATE_S if math.isfinite(self.timeout_s) else 0.0

    @property
    def room(self) -> int:
        """How many messages may be sent now."""
        if self.window is None:
            return self.batch
        return max(0, min(self.batch, self.window - len(self.pending)))

    def cut_short(self, now_s: float) -> None:
        """Bring the deadlines forward once there is a quorum; for good, so only once."""
        quorum = self.quorum
        if quorum is None or not self.all_sent:
            return
        if self.num_answered < math.ceil(quorum.share * self.num_sent - _ROUNDING):
            return
        self.quorum = None
        answered = f"{self.num_answered} of {self.num_sent} had answered"
        self.limit, self.late = f"{quorum.grace_s:g} s after {answered}", "straggler"
        for sent in self.pending.values():
            sent.begun, sent.deadline_s = True, min(sent.deadline_s, now_s + quorum.grace_s)

    def overdue(
        self, due: Mapping[str, Sent], now_s: float, under_way: UnderWay
    ) -> dict[str, Sent]:
        """Those of ``due`` whose time is over; it begins when they leave this process.

        Who has sent all of a reply before that is not late, however long it takes to read it.
        """
        for key, sent in self.pending.items():
            if not sent.begun:
                sent.begun = sent.refused or under_way.has_begun(key)
                sent.deadline_s = sent.deadline_s if sent.begun else now_s + self.timeout_s
        over = {key: sent for key, sent in due.items() if now_s > sent.deadline_s}
        return {key: sent for key, sent in over.items() if not under_way.has_come(key)}
