"""The cloud's wait for edges and clients, at the start and before each interval."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fedphd.common.config.waits import WaitConfig
from fedphd.common.errors import ParticipantsError
from fedphd.common.history.progress import Reported
from fedphd.common.wire.roster import Roster

_POLL_S: Final = 0.5
# Intervals differ: an edge may be at work for so many times as long as usual.
LONG_INTERVALS: Final = 3


@dataclass(frozen=True, order=True)
class Wait:
    """So many seconds at the most, and what says so."""

    seconds: float
    of: str = "waits.start_s"


def start_wait(waits: WaitConfig, so_far: Reported, *, resumed: bool) -> Wait:
    """How long a run waits for its participants before its first interval.

    Those who were at work when the cloud ended are back when they are done: at most an interval
    later. Where they are gone for good nobody should wait for as long as an interval may take.
    """
    begin = Wait(waits.start_s)
    if not resumed or not so_far.rounds:
        return begin
    usual_s = LONG_INTERVALS * so_far.intervals_s / len(so_far.rounds)
    longest = Wait(usual_s, f"{LONG_INTERVALS} intervals as they were so far")
    return max(begin, min(longest, Wait(waits.interval_s, "waits.interval_s")))


def gather(
    roster: Roster, num_edges: int, num_clients: int, wait: Wait, *, say: Callable[[str], None]
) -> None:
    """Wait until enough edges are there that see enough clients.

    Raises:
        ParticipantsError: they did not come in time; says who came.
    """
    deadline_s, told = time.monotonic() + wait.seconds, False
    while True:
        edges = roster.refresh(ask_again=True)
        clients = {name for edge in edges.values() for name in edge.clients}
        if len(edges) >= num_edges and len(clients) >= num_clients:
            return
        if not told:
            told = True
            counts = (("edges", len(edges), num_edges), ("clients", len(clients), num_clients))
            lacking = [f"{what}: {n} of {of} are there" for what, n, of in counts if n < of]
            say(f"waits for {', '.join(lacking)}")
        if time.monotonic() > deadline_s:
            raise ParticipantsError(
                f"after {round(wait.seconds, 1):g} s ({wait.of}) there are {len(edges)} of "
                f"{num_edges} edges ({', '.join(edges) or 'none'}) and {len(clients)} of "
                f"{num_clients} clients ({', '.join(sorted(clients)) or 'none'}); start the "
                "missing ones, or lower schedule.num_edges and schedule.min_clients"
            )
        time.sleep(_POLL_S)
