"""An edge asks the clients of a round which edge they choose."""

import logging
import time
from collections.abc import Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedphd.common.errors import ReplyError
from fedphd.common.wire.messages import IntervalTask
from fedphd.common.wire.offers import CHOOSE, Choose, ChooseReply
from fedphd.common.wire.records import read_payload, to_records
from fedphd.common.wire.roster import Peer, Roster
from fedphd.edge.round import EdgeRound

logger = logging.getLogger(__name__)


class Questions:
    """The questions of an interval.

    With ``shared`` the edges ask through one process, where an answer may come after the other
    edges' training.

    Attributes:
        one_by_one: whether a client that has chosen may begin to train while others are still
            asked: there is a choice, and whoever is asked has a process of its own to answer with.
    """

    def __init__(self, edge_id: str, task: IntervalTask, roster: Roster, *, shared: bool) -> None:
        self._edge_id = edge_id
        self._task, self._plan = task, task.plan
        self._roster = roster
        self._shared = shared
        self.one_by_one = not shared and task.num_edges > 1
        # In this interval a client has waited for an edge as long as a round may take.
        self._out_of_step = False

    def ask(self, peers: Sequence[Peer], round_: EdgeRound, grid: Grid) -> Iterator[list[Peer]]:
        """Ask in batches, and attach those that choose this edge before the next batch is asked.

        Yields whoever was attached, in the order of ``peers``; those of a batch before the next
        one is asked. Where one edge has an order there is no choice: a client is asked once, for
        its counts.
        """
        counts, size = self._roster.label_counts, self._plan.schedule.query_batch
        is_alone = self._task.num_edges == 1
        known = {p.node_id for p in peers if p.node_id in counts} if is_alone else set()
        unknown = [peer for peer in peers if peer.node_id not in known]
        for start in range(0, len(unknown), size):
            batch = unknown[start : start + size]
            self._ask_batch(batch, round_, grid)
            if not known:
                yield [peer for peer in batch if peer.node_id in round_.trainees]
        if known:
            # In the round's order, as if all had been asked: sums depend on it in their last bits.
            chosen = known | round_.trainees.keys()
            round_.trainees.clear()
            attached = [peer for peer in peers if peer.node_id in chosen]
            for peer in attached:
                round_.attach(peer, counts[peer.node_id])
            yield attached

    def _ask_batch(self, peers: Sequence[Peer], round_: EdgeRound, grid: Grid) -> None:
        question = to_records(self._question(round_))
        messages = [Message(question, peer.node_id, CHOOSE) for peer in peers]
        asked = {peer.node_id: peer for peer in peers}
        wait_s, started_s = self._offer_wait_s(round_), time.monotonic()
        others_silent = False
        for reply in grid.send_and_receive(messages, timeout=self._timeout_s):
            peer = asked[reply.metadata.src_node_id]
            try:
                self._attach(peer, read_payload(reply, ChooseReply), round_)
                # Who answers only now has waited in vain; who does not may be gone itself.
                others_silent |= time.monotonic() - started_s >= wait_s
            except ReplyError as error:
                round_.leave_out(peer, str(error), error.kind)
        if wait_s and others_silent and self._task.num_edges > 1:
            round_.others_silent = True
            if self._plan.reproducible and not self._out_of_step:
                self._out_of_step = True
                logger.warning(
                    "interval %d: another edge has made no offer for %g s, and is not waited for "
                    "until the next interval: this one cannot be repeated", self._task.interval,
                    wait_s,
                )  # fmt: skip

    def _attach(self, peer: Peer, answer: ChooseReply, round_: EdgeRound) -> None:
        if answer.client_id != peer.name:
            why = f"answers as {answer.client_id}; expected {peer.name}"
            raise self._roster.doubt(peer.name, why)
        if answer.edge_id != self._edge_id:
            return
        counts, num_classes = answer.label_counts, self._plan.num_classes
        if len(counts) != num_classes or min(counts) < 0 or sum(counts) != peer.num_samples:
            # It may have been started again with other data.
            raise self._roster.doubt(
                peer.name,
                f"label counts {list(counts)} do not fit {num_classes} classes and the "
                f"{peer.num_samples} images that it registered with",
            )
        self._roster.label_counts[peer.node_id] = counts
        round_.attach(peer, counts)

    def _question(self, round_: EdgeRound) -> Choose:
        # The factors are in mean samples per client, so that one setting serves any data set.
        known = [peer.num_samples for peer in self._roster.everyone.values()]
        mean_samples = sum(known) / len(known)
        selection = self._plan.selection
        return Choose(
            asking=self._edge_id,
            num_edges=self._task.num_edges,
            run_name=self._task.run_name,
            attempt=self._task.attempt,
            interval=self._task.interval,
            edge_round=round_.stats.edge_round,
            offers=(round_.offer,),
            target=self._plan.target_distribution,
            policy=selection.policy,
            factor=selection.factor * mean_samples,
            offset=selection.offset * mean_samples,
            epsilon=selection.epsilon,
            seed=self._plan.seed,
            offer_wait_s=self._offer_wait_s(round_),
            synchronised=self._plan.reproducible,
        )

    def _offer_wait_s(self, round_: EdgeRound) -> float:
        """How long a client may wait for other edges' offers of this round before it answers."""
        # Synchronised edges are at most one round apart, which is bounded by its training.
        if self._plan.reproducible:
            return 0.0 if self._out_of_step else self._plan.waits.round_s
        # One client has waited in vain: an edge that is behind costs each round this once.
        return 0.0 if round_.others_silent else self._plan.waits.offer_s

    @property
    def _timeout_s(self) -> float:
        """How long an answer to a question may take."""
        waits = self._plan.waits
        # Such an answer may come after the other edges' training of a round.
        in_step = self._plan.reproducible or self._shared
        return waits.query_s + (waits.round_s if in_step else 0.0)
