"""One interval at an edge: who trains here, and the average of each edge round."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedphd.common.config.run import FederationConfig
from fedphd.common.errors import ReplyError
from fedphd.common.events import Event
from fedphd.common.history.events import Replied, RoundBegan
from fedphd.common.rng import sample_participants
from fedphd.common.robust import MOST_IMAGES, Norms, UpdateBound, norm_of, update_norm
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.parts import PARTS, Part, joined, part_sets
from fedphd.common.wire import records
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.messages import TRAIN, IntervalTask, TrainReply, TrainTask
from fedphd.common.wire.offers import Offer
from fedphd.common.wire.roster import Peer, Roster
from fedphd.edge.averaging import Average, PartAverage, ServerVariate, TrimmedMean, WeightedSum
from fedphd.edge.questions import Questions
from fedphd.edge.round import EdgeRound, RoundStats, Trainee

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """A client's reply that passed every check of its own.

    Attributes:
        part_set: number of the part set that ``weights``, (numel,), float32, are.
        change: SCAFFOLD's change of the client's variate, as ``weights``.
    """

    trainee: Trainee
    part_set: int
    answer: TrainReply
    weights: torch.Tensor
    change: torch.Tensor | None


def update_bounds(plan: FederationConfig) -> list[UpdateBound[Update]]:
    """A bound for each part set of a run: their sizes differ, and so do the norms of updates."""
    ratio = plan.aggregation.max_update_ratio
    return [UpdateBound(ratio) for _ in part_sets(plan.exchange.parts)]


class EdgeAverage(Strategy):
    """Edge rounds of one interval (Alg. 1 of arXiv:2507.06449, the edge's part).

    In each round the sampled clients are asked, in batches, which edge they choose; those that
    choose this one train, and their weights are averaged by their numbers of samples while
    others still train. A reply that is late, malformed or not finite leaves its client out of
    the round, and so does an update far longer than those of the others (``UpdateBound``).

    ``on_round`` is told the statistics of each finished round, ``on_event`` what happens within
    it; ``shared_questions`` is as in ``Questions``; ``variate`` is SCAFFOLD's, where that is the
    method; ``bounds`` are those of ``update_bounds``, which learn from round to round; None: they
    begin with this interval.

    Attributes:
        offer: what the edge holds in this interval, after its last round.
        part_sets: the parts of the U-Net that clients send back together.
        averaged: the numbers of the part sets that somebody sent in this interval.
    """

    def __init__(
        self,
        edge_id: str,
        task: IntervalTask,
        roster: Roster,
        *,
        on_round: Callable[[RoundStats], None],
        on_event: Callable[[Event], None] = lambda event: None,
        shared_questions: bool = False,
        variate: ServerVariate | None = None,
        bounds: list[UpdateBound[Update]] | None = None,
    ) -> None:
        self.offer = Offer.empty(edge_id, task.plan.target_distribution)
        self.rounds: list[RoundStats] = []
        self.part_sets = part_sets(task.plan.exchange.parts)
        self.averaged: set[int] = set()
        self._edge_id = edge_id
        self._task = task
        self._layout: TensorLayout = task.network.tensor_layout()
        self._roster = roster
        self._questions = Questions(edge_id, task, roster, shared=shared_questions)
        self._on_round, self._on_event = on_round, on_event
        self._variate = variate
        self._bounds = update_bounds(task.plan) if bounds is None else bounds
        self._round: EdgeRound | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Find this round's clients, and make their training messages."""
        array = next(iter(arrays.values()))
        weights = records.read_array(array)
        round_ = self._round = EdgeRound(server_round, weights, self.offer, self._roster)
        self.rounds.append(round_.stats)
        peers = self._roster.refresh()
        task = self._task
        if task.plan.reproducible:
            # Edges in step ask the same clients, also who failed at one of them: else the others'
            # questions would be held for that one's offer.
            peers = self._roster.everyone
        sampled = sample_participants(
            peers,
            fraction=task.plan.schedule.participation,
            seed=task.plan.seed,
            interval=task.interval,
            edge_round=server_round,
            tries=task.tries,
        )
        orders = self._orders(round_, [peers[name] for name in sampled], array, grid)
        # Clients that share a process would answer only after those who train there.
        return orders if self._questions.one_by_one else list(orders)

    def _orders(
        self, round_: EdgeRound, peers: Sequence[Peer], array: Array, grid: Grid
    ) -> Iterator[Message]:
        """The training messages of those who choose this edge, each as soon as it has.

        ``peers`` are asked in this order; ``array`` has the round's weights.
        """
        interval, edge_round = self._task.interval, round_.stats.edge_round
        number = (interval - 1) * self._task.plan.schedule.edge_rounds + edge_round
        contents: list[RecordDict] = []
        for chosen in self._questions.ask(peers, round_, grid):
            round_.watch.lap("asking")
            contents = contents or self._contents(round_, array)
            for peer in chosen:
                # Part sets go in turn over the clients in the round's seeded order, starting
                # elsewhere in each round: so all are sent, and a client alone sends them one after
                # the other.
                part_set = (number + len(round_.part_set_of)) % len(self.part_sets)
                round_.hand_out(peer, part_set)
                yield Message(contents[part_set], peer.node_id, TRAIN)
            round_.watch.lap("sending")
        round_.watch.lap("asking")
        self._began(round_, number)

    def _contents(self, round_: EdgeRound, array: Array) -> list[RecordDict]:
        """What a training message of each part set holds; the weights are serialised once."""
        codec = Codec(self._task.plan.codecs.client_down, self._layout)
        sent = array if codec.is_exact else records.to_array(codec.pack(round_.weights))
        variate = None
        if self._variate:
            variate = records.to_array(codec.pack(self._variate.current))
        tasks = [self._train_task(round_.stats.edge_round, parts) for parts in self.part_sets]
        return [records.to_records(order, sent, variate) for order in tasks]

    def _began(self, round_: EdgeRound, number: int) -> None:
        """Say who trains in a round, which is the run's ``number``."""
        names = sorted(trainee.peer.name for trainee in round_.trainees.values())
        began = RoundBegan(
            interval=self._task.interval,
            edge_round=round_.stats.edge_round,
            round=number,
            rounds=self._task.plan.schedule.total_edge_rounds,
            clients=names,
        )
        self._on_event(began)

    def _train_task(self, edge_round: int, send: tuple[Part, ...]) -> TrainTask:
        task, plan = self._task, self._task.plan
        parts = joined(self.part_sets)
        return TrainTask(
            edge_id=self._edge_id,
            interval=task.interval,
            edge_round=edge_round,
            network=task.network,
            diffusion=plan.diffusion,
            training=plan.local_training,
            objective=plan.objective,
            parts=parts,
            send=send,
            initial=None if parts == PARTS else plan.model,
            sparsity_lambda=plan.pruning.sparsity_lambda if task.sparse else 0.0,
            optimizer_moments=plan.pruning.optimizer_moments,
            cut=task.cut,
            codec=plan.codecs.client_down,
            reply_codec=plan.codecs.client_up,
            seed=plan.seed,
            run_name=task.run_name,
            resumed=task.resumed,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the clients by their registered numbers of samples, one reply at a time.

        Each part set is averaged over those that sent it; one that nobody sent stays.
        """
        round_ = self._round
        assert round_ is not None, "Flower configures a round before it aggregates it"
        mean = PartAverage(self._layout, self.part_sets, self._new_average)
        round_.watch.lap("sending")
        came = round_.watch.waiting(replies, "training", work="averaging")
        trained: list[Trainee] = []
        for bound, selection in zip(self._bounds, mean.selections, strict=True):
            bound.start(norm_of(selection.take(self._variate.current)) if self._variate else 0.0)
        for update in self._updates(round_, server_round, came, mean):
            norms = self._norms(update, mean, round_.weights)
            round_.stats.update_norms += norms[:1]
            usable = self._bounds[update.part_set].offer(norms, update)
            trained += [self._count(one, mean, round_.stats) for one in usable]
        for bound in self._bounds:
            usable, dropped = bound.finish()
            trained += [self._count(one, mean, round_.stats) for one in usable]
            for update, why in dropped:
                round_.leave_out(update.trainee.peer, why, "outlier")
        round_.finish(trained)
        self.offer = round_.offer
        self._on_round(round_.stats)
        average, sent = mean.applied_to(round_.weights)
        self.averaged |= sent
        if not sent:
            return None, None
        loss = round_.stats.metrics.loss.value or 0.0
        return records.weights_record(average), MetricRecord({"loss": loss})

    def _new_average(self) -> Average:
        aggregation = self._task.plan.aggregation
        trims = aggregation.method == "trimmed_mean"
        return TrimmedMean(aggregation.trim) if trims else WeightedSum()

    def _updates(
        self, round_: EdgeRound, number: int, replies: Iterable[Message], mean: PartAverage
    ) -> Iterator[Update]:
        """The replies that pass every check of their own; the others' senders are left out."""
        answered: set[int] = set()
        for reply in replies:
            node_id = reply.metadata.src_node_id
            if node_id not in round_.trainees:
                logger.warning("round %d: node %d was not asked to train", number, node_id)
                continue
            trainee, part_set = round_.trainees[node_id], round_.part_set_of[node_id]
            peer, selection = trainee.peer, mean.selections[part_set]
            codec = Codec(self._task.plan.codecs.client_up, selection.chosen)
            if node_id in answered:
                round_.ignore(peer, "answers a second time; only its first answer counts")
                continue
            answered.add(node_id)
            try:
                answer = self._check(peer, number, reply)
                base = None if codec.is_exact else selection.take(round_.weights)
                weights = records.read_coded(reply, codec, base)
                records.check_reply_weights(weights, answer.network, codec.layout)
                change = None
                if self._variate:
                    change = records.read_variate(reply, codec)
                    records.check_variate(change, codec.layout)
            except ReplyError as error:
                round_.leave_out(peer, str(error), error.kind)
                continue
            self._on_event(self._replied(round_, node_id, answer))
            yield Update(trainee, part_set, answer, weights, change)

    def _replied(self, round_: EdgeRound, node_id: int, answer: TrainReply) -> Replied:
        return Replied(
            interval=answer.interval,
            edge_round=answer.edge_round,
            client=answer.client_id,
            loss=answer.metrics.loss.value,
            seconds=round(round_.handed_out_for_s(node_id), 3),
        )

    def _norms(self, update: Update, mean: PartAverage, sent: torch.Tensor) -> Norms:
        """Of the update of the weights, and of the control variate's."""
        if not self._task.plan.aggregation.max_update_ratio:
            return ()
        weights = update_norm(update.weights, mean.selections[update.part_set].take(sent))
        usual = median_low(peer.num_samples for peer in self._roster.everyone.values())
        images = min(update.trainee.peer.num_samples, MOST_IMAGES * usual)
        weights /= self._task.plan.training.usual_steps(images)
        return (weights,) if update.change is None else (weights, norm_of(update.change))

    def _count(self, update: Update, mean: PartAverage, stats: RoundStats) -> Trainee:
        """Put a reply into the averages."""
        num_samples = update.trainee.peer.num_samples
        mean.add(update.part_set, update.weights, float(num_samples))
        if self._variate and update.change is not None:
            self._variate.add(update.change)
        stats.add(update.answer, num_samples, self._task.plan.training.batch_size)
        return update.trainee

    def _check(self, peer: Peer, edge_round: int, reply: Message) -> TrainReply:
        """What a client says beside its weights; raises ReplyError if that cannot be."""
        answer = records.read_payload(reply, TrainReply)
        if (answer.interval, answer.edge_round) != (self._task.interval, edge_round):
            raise ReplyError(
                f"answers interval {answer.interval} round {answer.edge_round}; expected "
                f"interval {self._task.interval} round {edge_round}"
            )
        if answer.client_id != peer.name:
            why = f"answers as {answer.client_id}; expected {peer.name}"
            raise self._roster.doubt(peer.name, why)
        if answer.num_examples != peer.num_samples:
            raise self._roster.doubt(
                peer.name,
                f"claims {answer.num_examples} examples, but registered with {peer.num_samples}",
            )
        most = self._task.plan.training.most_steps(peer.num_samples)
        if answer.steps > most:
            raise ReplyError(f"claims {answer.steps} steps; at most {most} fit")
        if not answer.metrics.is_of_one_client():
            raise ReplyError(f"claims metrics that no single client has: {answer.metrics.values()}")
        return answer

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
