"""One interval at an edge: who trains here, and the average of each edge round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedphd.common.errors import ReplyError
from fedphd.common.rng import sample_participants
from fedphd.common.unet.costs import images_of_steps
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.parts import PARTS, joined, part_sets
from fedphd.common.wire.messages import TRAIN, IntervalTask, TrainReply, TrainTask
from fedphd.common.wire.metrics import TrainMetrics
from fedphd.common.wire.offers import CHOOSE, Choose, ChooseReply, Offer
from fedphd.common.wire.records import (
    check_reply_weights,
    check_variate,
    read_array,
    read_payload,
    read_variate,
    read_weights,
    to_records,
    weights_record,
)
from fedphd.common.wire.roster import Peer, Roster
from fedphd.edge.averaging import PartAverage, ServerVariate

logger = logging.getLogger(__name__)


@dataclass
class RoundStats:
    """An edge round's figures; ``metrics`` weigh each client by its registered images."""

    edge_round: int
    clients: list[str] = field(default_factory=list)
    num_samples: int = 0
    metrics: TrainMetrics = field(default_factory=TrainMetrics)
    steps: int = 0
    images: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, answer: TrainReply, num_samples: int, batch_size: int) -> None:
        """Count a client that trained, with the number of images that it registered with."""
        self.num_samples += num_samples
        self.metrics = TrainMetrics.merge([self.metrics, answer.metrics.weighing(num_samples)])
        self.steps += answer.steps
        self.images += images_of_steps(num_samples, answer.steps, batch_size)

    @property
    def mean_steps(self) -> float:
        """Optimiser steps per client of this round."""
        return self.steps / len(self.clients) if self.clients else 0.0


class EdgeAverage(Strategy):
    """Edge rounds of one interval (Alg. 1 of arXiv:2507.06449, the edge's part).

    In each round the sampled clients are asked, in batches, which edge they choose; those that
    choose this one train, and their weights are averaged by their numbers of samples while
    others still train. A reply that is late, malformed or not finite leaves its client out of
    the round.

    Args:
        edge_id: this edge.
        task: the cloud's order for the interval.
        roster: the clients that this edge sees.
        on_round: told the statistics of each finished round.
        shared_questions: the edges ask through one process, where an answer may come after the
            other edges' training.
        variate: SCAFFOLD's server variate, where that is the method.

    Attributes:
        offer: what the edge holds in this interval, the clients included that train now.
        groups: of parts of the U-Net that clients send back together.
        averaged: the numbers of the groups that somebody sent in this interval.
    """

    def __init__(
        self,
        edge_id: str,
        task: IntervalTask,
        roster: Roster,
        *,
        on_round: Callable[[RoundStats], None],
        shared_questions: bool = False,
        variate: ServerVariate | None = None,
    ) -> None:
        self.offer = Offer.empty(edge_id, task.plan.target_distribution)
        self.rounds: list[RoundStats] = []
        self._edge_id = edge_id
        self._task = task
        self._layout: TensorLayout = task.network.tensor_layout()
        self._roster = roster
        self._on_round = on_round
        self._shared_questions = shared_questions
        self._others_silent = False
        self._variate = variate
        self.groups = part_sets(task.plan.exchange.parts)
        self.averaged: set[int] = set()
        self._weights = torch.empty(0)
        self._training: dict[int, tuple[Peer, tuple[int, ...]]] = {}
        self._group_of: dict[int, int] = {}
        self._offer_before = self.offer
        self._started_s = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Find this round's clients, and make their training messages."""
        self._started_s = time.monotonic()
        stats = RoundStats(server_round)
        self.rounds.append(stats)
        self._training = {}
        self._others_silent = False
        self._offer_before = self.offer
        peers = self._roster.refresh()
        schedule = self._task.plan.schedule
        sampled = sample_participants(
            peers,
            fraction=schedule.participation,
            seed=self._task.plan.seed,
            interval=self._task.interval,
            edge_round=server_round,
        )
        for start in range(0, len(sampled), schedule.query_batch):
            batch = [peers[name] for name in sampled[start : start + schedule.query_batch]]
            self._ask(batch, stats, grid)
        array = next(iter(arrays.values()))
        self._weights = read_array(array)
        self._group_of = self._assigned(sampled, server_round)
        variate = self._variate.current if self._variate else None
        records = [
            to_records(self._train_task(server_round, group), array, variate)
            for group in range(len(self.groups))
        ]
        return [Message(records[self._group_of[n]], n, TRAIN) for n in self._training]

    def _assigned(self, sampled: list[str], edge_round: int) -> dict[int, int]:
        """Which group of parts each client sends back, by node id.

        In turn over those that train here, in the round's seeded order, starting elsewhere in
        each round: so all groups are sent, and a client alone sends them one after the other.
        """
        node_of = {peer.name: node_id for node_id, (peer, _) in self._training.items()}
        schedule = self._task.plan.schedule
        first = (self._task.interval - 1) * schedule.edge_rounds + edge_round
        here = [node_of[name] for name in sampled if name in node_of]
        return {n: (first + place) % len(self.groups) for place, n in enumerate(here)}

    def _ask(self, batch: list[Peer], stats: RoundStats, grid: Grid) -> None:
        """Ask a batch which edge they choose; those that choose this one count at once."""
        question = to_records(self._question(stats.edge_round))
        messages = [Message(question, peer.node_id, CHOOSE) for peer in batch]
        asked = {peer.node_id: peer for peer in batch}
        started_s = time.monotonic()
        for reply in grid.send_and_receive(messages, timeout=self._query_timeout_s):
            peer = asked[reply.metadata.src_node_id]
            try:
                self._attach(peer, read_payload(reply, ChooseReply))
            except ReplyError as error:
                self._fail(peer, stats, str(error))
        if time.monotonic() - started_s >= self._offer_wait_s:
            self._others_silent = True

    def _attach(self, peer: Peer, answer: ChooseReply) -> None:
        if answer.edge_id != self._edge_id:
            return
        counts = answer.label_counts
        num_classes = self._task.plan.num_classes
        if len(counts) != num_classes or min(counts) < 0 or sum(counts) != peer.num_samples:
            raise ReplyError(
                f"label counts {list(counts)} do not fit {num_classes} classes and the "
                f"{peer.num_samples} images that it registered with"
            )
        self.offer = self.offer.with_client(counts)
        self._training[peer.node_id] = (peer, counts)

    def _question(self, edge_round: int) -> Choose:
        plan = self._task.plan
        # The factors are in mean samples per client, so that one setting serves any data set.
        known = [peer.num_samples for peer in self._roster.everyone.values()]
        mean_samples = sum(known) / len(known)
        return Choose(
            asking=self._edge_id,
            interval=self._task.interval,
            edge_round=edge_round,
            offers=(self.offer,),
            target=plan.target_distribution,
            policy=plan.selection.policy,
            factor=plan.selection.factor * mean_samples,
            offset=plan.selection.offset * mean_samples,
            epsilon=plan.selection.epsilon,
            seed=plan.seed,
            offer_wait_s=self._offer_wait_s,
            synchronised=plan.reproducible,
        )

    @property
    def _offer_wait_s(self) -> float:
        """How long a client may wait for other edges' offers of this round before it answers."""
        waits = self._task.plan.waits
        # Synchronised edges are at most one round apart, which is bounded by its training.
        if self._task.plan.reproducible:
            return waits.round_s
        # One client has waited in vain: an edge that is behind costs each round this once.
        return 0.0 if self._others_silent else waits.offer_s

    @property
    def _query_timeout_s(self) -> float:
        """How long an answer to a question may take."""
        waits = self._task.plan.waits
        # Such an answer may come after the other edges' training of a round.
        in_step = self._task.plan.reproducible or self._shared_questions
        return waits.query_s + (waits.round_s if in_step else 0.0)

    def _train_task(self, edge_round: int, group: int) -> TrainTask:
        task, plan = self._task, self._task.plan
        parts = joined(self.groups)
        return TrainTask(
            edge_id=self._edge_id,
            interval=task.interval,
            edge_round=edge_round,
            network=task.network,
            diffusion=plan.diffusion,
            training=plan.training,
            objective=plan.objective,
            parts=parts,
            send=self.groups[group],
            initial=None if parts == PARTS else plan.model,
            sparsity_lambda=plan.pruning.sparsity_lambda if task.sparse else 0.0,
            optimizer_moments=plan.pruning.optimizer_moments,
            cut=task.cut,
            seed=plan.seed,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the clients by their registered numbers of samples, one reply at a time.

        Each group of parts is averaged over those that sent it; one that nobody sent stays.
        """
        stats = self.rounds[-1]
        mean = PartAverage(self._layout, self.groups)
        trained: dict[str, tuple[int, ...]] = {}
        for reply in replies:
            peer, counts = self._training[reply.metadata.src_node_id]
            try:
                group = self._group_of[reply.metadata.src_node_id]
                expected = mean.selections[group].chosen
                answer, weights = self._check(peer, server_round, reply, expected)
                change = check_variate(read_variate(reply), expected) if self._variate else None
            except ReplyError as error:
                self._fail(peer, stats, str(error))
                continue
            mean.add(group, weights, float(peer.num_samples))
            if self._variate and change is not None:
                self._variate.add(change)
            trained[peer.name] = counts
            stats.add(answer, peer.num_samples, self._task.plan.training.batch_size)
        stats.clients = sorted(trained)
        # Those that chose this edge but did not deliver must not weigh in later offers.
        self.offer = self._offer_before
        for name in stats.clients:
            self.offer = self.offer.with_client(trained[name])
        stats.seconds = time.monotonic() - self._started_s
        self._on_round(stats)
        average, came = mean.applied_to(self._weights)
        self.averaged |= came
        if not came:
            return None, None
        return weights_record(average), MetricRecord({"loss": stats.metrics.loss.value or 0.0})

    def _check(
        self, peer: Peer, edge_round: int, reply: Message, expected: TensorLayout
    ) -> tuple[TrainReply, torch.Tensor]:
        answer = read_payload(reply, TrainReply)
        if (answer.interval, answer.edge_round) != (self._task.interval, edge_round):
            raise ReplyError(
                f"answers interval {answer.interval} round {answer.edge_round}; expected "
                f"interval {self._task.interval} round {edge_round}"
            )
        if answer.num_examples != peer.num_samples:
            raise ReplyError(
                f"claims {answer.num_examples} examples, but registered with {peer.num_samples}"
            )
        if not answer.metrics.is_of_one_client():
            raise ReplyError(f"claims metrics that no single client has: {answer.metrics.values()}")
        return answer, check_reply_weights(read_weights(reply), answer.network, expected)

    def _fail(self, peer: Peer, stats: RoundStats, reason: str) -> None:
        stats.failures.append(f"{peer.name}: {reason}")
        logger.warning("round %d goes on without %s: %s", stats.edge_round, peer.name, reason)
        self._roster.rest(peer.name, reason)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: the cloud evaluates."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing: the cloud evaluates."""
        return None

    def summary(self) -> None:
        """Nothing to add to the event log."""

    def interval_mean_steps(self) -> float:
        """Optimiser steps that a client's weights took on the way through the interval."""
        return sum(stats.mean_steps for stats in self.rounds)
