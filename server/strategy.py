"""The cloud's strategy: average edges by size and homogeneity, prune once, keep the EMA."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedphd.common.config.run import FederationConfig
from fedphd.common.errors import FailureKind, ReplyError
from fedphd.common.history.events import EdgeFigures
from fedphd.common.homogeneity import aggregation_weights, homogeneity_score
from fedphd.common.robust import (
    FEWEST_NORMS,
    Norms,
    UsualNorms,
    can_trim,
    excess,
    norm_of,
    trimmed_mean,
    update_norm,
)
from fedphd.common.timing import Stopwatch
from fedphd.common.unet.costs import PruneReport
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import PrunedUNet, unet_config
from fedphd.common.unet.parts import Part, PartSubset, joined, part_sets
from fedphd.common.wire import records
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.messages import TRAIN, IntervalReply, IntervalTask, UNetSpec
from fedphd.common.wire.metrics import TrainMetrics
from fedphd.common.wire.payload import shown
from fedphd.common.wire.roster import Roster
from fedphd.server.broadcast import Broadcast
from fedphd.server.census import Census
from fedphd.server.ema import Ema
from fedphd.server.pruning import prune_unet
from fedphd.server.replies import EdgeUpdate, read_update
from fedphd.server.stats import IntervalStats, NobodyTrained


@dataclass(frozen=True)
class Stored:
    """What a strategy goes on from: the state after ``interval`` intervals.

    ``resumed`` has the run's resumptions as in ``IntervalTask``, this one among them. ``cut`` is
    JSON text, ``variate`` and what edges hold, ``held``, (numel,), float32; they are None where
    there is none. The variate is a mean over ``num_clients``; ``trained`` are the names of those
    that did.
    """

    interval: int
    resumed: tuple[int, ...]
    unet: PrunedUNet
    ema_state: Mapping[str, torch.Tensor]
    ema_steps: float
    cut: str | None
    variate: torch.Tensor | None
    held: torch.Tensor | None = None
    num_clients: int | None = None
    trained: frozenset[str] = frozenset()


class FedPhD(Strategy):
    """FedPhD at the cloud (Alg. 1 of arXiv:2507.06449).

    Each Flower round is one interval: every edge gets the model, runs its edge rounds, and its
    model comes back; edges are weighted by ``aggregation_weights``. After the sparse phase (or
    before the first interval, "one_shot") the U-Net is pruned, and from then on the smaller one
    travels. The EMA follows by the number of optimiser steps, so it costs no traffic.

    Parts of the U-Net that are not exchanged (``ExchangeConfig``) keep their initial values here.
    Under SCAFFOLD the server variate travels beside the weights, and the edges' changes add up.

    Args:
        unet: the initial U-Net; the strategy owns it from then on.
        roster: the edges.
        on_interval: told the statistics of each finished interval.
        on_pruned: told when the U-Net got smaller.
        gather: called before each interval; returns when there is somebody to train with.
        run_name: of the run, as in ``IntervalTask``.
        stored: where a run goes on; Flower's round 1 is then the interval after it.
    """

    def __init__(
        self,
        config: FederationConfig,
        unet: PrunedUNet,
        roster: Roster,
        *,
        on_interval: Callable[[IntervalStats], None],
        on_pruned: Callable[[int, PruneReport], None],
        gather: Callable[[], None],
        run_name: str = "",
        stored: Stored | None = None,
    ) -> None:
        self.config = config
        self.run_name = run_name
        self.resumed = stored.resumed if stored else ()
        # Intervals that were finished before this process.
        self.done = stored.interval if stored else 0
        self.unet = unet
        # Those of the U-Net, once they were asked for; None after they changed.
        self._weights: torch.Tensor | None = None
        self._part_sets = part_sets(config.exchange.parts)
        self._usual_norms = [UsualNorms() for _ in self._part_sets]
        self.cut: Cut | None = None
        # SCAFFOLD's server variate c, (numel,), float32; it follows the layout of the weights.
        self.variate = None
        if config.objective.method == "scaffold":
            self.variate = torch.zeros_like(self.weights())
        # Over so many clients the variate is a mean.
        self.num_clients = (stored.num_clients if stored else None) or 0
        self.ema = Ema(unet.state_dict(), decay=config.ema.decay, warmup=config.ema.warmup)
        self.broadcast = Broadcast()
        self._roster = roster
        self._census = Census(
            roster,
            most_samples=config.schedule.max_client_samples,
            trained=stored.trained if stored else (),
        )
        self._on_interval = on_interval
        self._on_pruned = on_pruned
        self._gather = gather
        self._asked: dict[int, str] = {}
        self._watch = Stopwatch()
        # The tries of the next interval in which nobody trained.
        self._in_vain: list[IntervalStats] = []
        if stored:
            self._restore(stored)
        elif config.pruning.mode == "one_shot":
            self._prune(0)

    def _restore(self, stored: Stored) -> None:
        self.unet, self._weights, self.variate = stored.unet, None, stored.variate
        self.broadcast = Broadcast(stored.held)
        self.cut = Cut.from_json(stored.cut) if stored.cut else None
        self.ema = Ema(
            stored.ema_state,
            decay=self.config.ema.decay,
            warmup=self.config.ema.warmup,
            steps=stored.ema_steps,
        )

    def repeat(self, interval: int) -> None:
        """Make ``interval`` the next one, as in a resumed run: whoever worked in it goes back."""
        self.done = interval - 1
        self.resumed += (self.done,)

    @property
    def layout(self) -> TensorLayout:
        """Names and shapes of the current U-Net's weights."""
        return TensorLayout.of(self.unet.state_dict())

    def weights(self) -> torch.Tensor:
        """The current global weights, shape (numel,), float32; never to be written to."""
        if self._weights is None:
            self._weights = self.layout.pack(self.unet.state_dict())
        return self._weights

    def sparse(self, interval: int) -> bool:
        """Whether ``interval`` (from 1) belongs to the sparse phase."""
        pruning, edge_rounds = self.config.pruning, self.config.schedule.edge_rounds
        return pruning.mode == "scheduled" and interval * edge_rounds <= pruning.sparse_rounds

    @property
    def travelling(self) -> PartSubset:
        """The parts of the current U-Net that are exchanged."""
        return PartSubset(self.layout, joined(self._part_sets))

    def network(self) -> UNetSpec:
        """The current U-Net as it is described in messages, with what travels of it."""
        return UNetSpec(unet=unet_config(self.unet), layout=self.travelling.chosen.to_json())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Give every edge the model, serialised in ``arrays``, and its order for the interval."""
        self._gather()
        self._watch = Stopwatch()
        interval = self.done + server_round
        self._count_clients()
        travelling = self.travelling
        down = self.config.codecs.cloud_down
        whole, serialised = self.weights(), next(iter(arrays.values()))
        link = self.broadcast.send(travelling.take(whole), down, travelling.chosen)
        peers = self._roster.peers
        task = IntervalTask(
            interval=interval,
            tries=len(self._in_vain),
            sparse=self.sparse(interval),
            num_edges=max(1, len(peers)),
            num_clients=self.num_clients,
            network=self.network(),
            cut=self.cut.to_json() if self.cut else None,
            digest=link.digest,
            run_name=self.run_name,
            resumed=self.resumed,
            plan=self.config,
        )
        variate = None
        if self.variate is not None:
            codec = Codec(self.config.codecs.cloud_variate_down, travelling.chosen)
            variate = records.to_array(codec.pack(self.variate))
        self._asked = {peer.node_id: name for name, peer in peers.items()}
        # One content for all edges that get the same.
        contents: dict[str | None, RecordDict] = {}
        messages = []
        for peer in peers.values():
            weights, base = link.for_edge(peer.holds)
            if base not in contents:
                order = task.model_copy(update={"base": base})
                sent = serialised if weights is whole else weights
                contents[base] = records.to_records(order, sent, variate)
            messages.append(Message(contents[base], peer.node_id, TRAIN))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Average the edges, move the EMA, and prune when the sparse phase ends.

        Raises NobodyTrained, with everything as it was before the interval.
        """
        interval = self.done + server_round
        stats = IntervalStats(interval=interval)
        trained: list[EdgeUpdate] = []
        weights = self.weights()
        answered: set[str] = set()
        self._watch.lap("sending")
        for reply in self._watch.waiting(replies, "edges", work="averaging"):
            name = self._asked.get(reply.metadata.src_node_id)
            if name is None or name in answered:
                stats.failures.append(f"{name or 'a stranger'}: an answer that nobody asked for")
                continue
            answered.add(name)
            try:
                result = read_update(
                    reply, name, interval, config=self.config, layout=self.layout, weights=weights
                )
            except ReplyError as error:
                self._leave_out(name, str(error), stats, error.kind)
                continue
            stats.failures += result.answer.failures
            stats.client_edge += result.answer.traffic
            stats.edges[name] = _figures(result.answer)
            # An edge without clients kept the model it was given: it has nothing to add.
            if result.answer.client_rounds:
                trained.append(result)
            else:
                stats.edge_weights[name] = 0.0
        trained = self._bounded(trained, stats)
        trained.sort(key=lambda result: result.answer.edge_id)
        if trained:
            self._average(trained, stats)
        stats.ema_steps, stats.ema_span = self.ema.steps, self.ema.span
        self._watch.lap("averaging")
        stats.phases = self._watch.phases
        stats.seconds = sum(stats.phases.values())
        if not trained:
            self._in_vain.append(stats)
            raise NobodyTrained(stats, len(self._in_vain))
        stats.add_tries(self._in_vain)
        self._in_vain = []
        self._on_interval(stats)
        if self._prunes_after(interval):
            self._prune(interval)
        # Serialised here, for all edges of the next interval.
        loss = MetricRecord({"loss": stats.metrics.loss.value or 0.0})
        return records.weights_record(self.weights()), loss

    def _leave_out(self, name: str, reason: str, stats: IntervalStats, kind: FailureKind) -> None:
        reason = shown(reason)
        stats.failed[kind] = stats.failed.get(kind, 0) + 1
        stats.failures.append(f"{name}: {reason}")
        self._roster.rest(name, reason, kind)

    def _bounded(self, trained: list[EdgeUpdate], stats: IntervalStats) -> list[EdgeUpdate]:
        """Those whose updates are not far longer than the others' (``common/robust.py: excess``).

        All replies are here at the end of an interval, so each is measured by its own interval's
        norms. With two edges, or fewer of a part set, there is no telling which is wrong.
        """
        ratio = self.config.aggregation.max_update_ratio
        if not ratio or len(trained) < FEWEST_NORMS:
            return trained
        weights, dropped = self.weights(), dict[str, str]()
        for parts, usual in zip(self._part_sets, self._usual_norms, strict=True):
            selection = PartSubset(self.layout, parts)
            sent = selection.take(weights)
            senders = [result for result in trained if result.has(parts)]
            norms = [self._norms(result, parts, sent) for result in senders]
            if len(senders) < FEWEST_NORMS:
                continue
            if self.variate is not None:
                # As changes are measured: what one client adds to the mean.
                usual.start(norm_of(selection.take(self.variate)) / self.num_clients)
            measure = usual.finish(norms)
            for result, of_result in zip(senders, norms, strict=True):
                if why := excess(of_result, measure, ratio):
                    dropped[result.answer.edge_id] = why
        for name, why in sorted(dropped.items()):
            self._leave_out(name, why, stats, "outlier")
        return [result for result in trained if result.answer.edge_id not in dropped]

    def _norms(self, result: EdgeUpdate, parts: tuple[Part, ...], sent: torch.Tensor) -> Norms:
        # A client round's images there, on average.
        answer, edge_rounds = result.answer, self.config.schedule.edge_rounds
        images = answer.samples_per_round * edge_rounds / answer.client_rounds
        images = min(images, self._census.most_images)
        weights = update_norm(result.part(parts), sent) / self.config.training.usual_steps(images)
        if result.change is None:
            return (weights,)
        # A sum over clients, so that of many is long.
        return weights, norm_of(result.change) / answer.client_rounds

    def _average(self, trained: list[EdgeUpdate], stats: IntervalStats) -> None:
        answers = [result.answer for result in trained]
        target = self.config.target_distribution
        scores = [homogeneity_score(answer.label_distribution, target) for answer in answers]
        sizes = [answer.samples_per_round for answer in answers]
        # The factors are in mean samples per client, so that one setting serves any data set.
        mean_samples = self._census.mean_images
        aggregation = self.config.aggregation
        shares = aggregation_weights(
            sizes, scores, a=aggregation.factor * mean_samples, b=aggregation.offset * mean_samples
        )
        if self._trims(len(trained)):
            shares = np.full(len(trained), 1 / len(trained))
        # Else an edge that claims many would end the moving average.
        a_round = self.config.training.usual_steps(self._census.most_images)
        most_steps = self.config.schedule.edge_rounds * a_round
        for share, score, answer in zip(shares, scores, answers, strict=True):
            stats.edge_weights[answer.edge_id] = float(share)
            stats.edge_homogeneity[answer.edge_id] = float(score)
            stats.mean_steps += float(share) * min(answer.mean_steps, most_steps)
            stats.client_rounds += answer.client_rounds
            stats.images += answer.images
        stats.num_samples = sum(sizes)
        stats.metrics = TrainMetrics.merge(answer.metrics for answer in answers)
        stats.clients = sorted({name for answer in answers for name in answer.clients})
        self._census.note_trained(stats.clients)
        stats.edge_weights = dict(sorted(stats.edge_weights.items()))
        average = self._averaged(trained, [float(share) for share in shares])
        if aggregation.step_size != 1:
            average = torch.lerp(self.weights(), average, aggregation.step_size)
        stats.update_norm = update_norm(average, self.weights())
        self.unet.load_state_dict(self.layout.unpack(average))
        self._weights = average
        for result in trained:
            if self.variate is not None and result.change is not None:
                self.variate.add_(result.change)
        self.ema.update(self.unet.state_dict(), mean_steps=stats.mean_steps)

    def _averaged(self, trained: list[EdgeUpdate], shares: list[float]) -> torch.Tensor:
        """The current weights with each part set averaged over the edges that sent it.

        By their shares; or as a trimmed mean, where that is asked for and enough edges sent it.
        """
        weights = self.weights()
        for parts in self._part_sets:
            senders = [
                (share, result)
                for share, result in zip(shares, trained, strict=True)
                if result.has(parts)
            ]
            # Shares of all edges sum to 1 already.
            total = sum(share for share, _ in senders) if len(senders) < len(trained) else 1.0
            if not total:
                continue
            place = PartSubset(self.layout, parts)
            if self._trims(len(senders)):
                came = [result.part(parts) for _, result in senders]
                weights = place.put(weights, trimmed_mean(came, self.config.aggregation.trim))
                continue
            average = torch.zeros(place.chosen.numel)
            for share, result in senders:
                average.add_(result.part(parts), alpha=share / total)
            weights = place.put(weights, average)
        return weights

    def _trims(self, num_edges: int) -> bool:
        """Whether so many edges are averaged by the trimmed mean: fewer than 3 never are."""
        aggregation = self.config.aggregation
        return aggregation.method == "trimmed_mean" and can_trim(num_edges, aggregation.trim)

    def _count_clients(self) -> None:
        """Note how many clients there have been; the variate is the sum of theirs over that.

        Whoever is new has none yet, that is 0; that of one who is gone goes on to count.
        """
        before = self.num_clients
        self.num_clients = max(1, before, self._census.num_clients)
        if self.variate is not None and before not in (0, self.num_clients):
            self.variate = self.variate * (before / self.num_clients)

    def _prunes_after(self, interval: int) -> bool:
        pruning, edge_rounds = self.config.pruning, self.config.schedule.edge_rounds
        return pruning.mode == "scheduled" and interval * edge_rounds == pruning.sparse_rounds

    def _prune(self, interval: int) -> None:
        pruned = prune_unet(self.unet, ratio=self.config.pruning.ratio)
        self.unet, self.cut, self._weights = pruned.unet, pruned.cut, None
        self.ema.cut(pruned.cut)
        if self.variate is not None:
            self.variate = pruned.cut.apply_flat(self.variate, self.layout, power=-1)
        self.broadcast.cut(pruned.cut, self.layout)
        self._on_pruned(interval, pruned.report)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: the cloud samples and compares by itself."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing: the cloud samples and compares by itself."""
        return None

    def summary(self) -> None:
        """Nothing to add to the event log."""


def _figures(answer: IntervalReply) -> EdgeFigures:
    return EdgeFigures(
        trained=[[*one.clients] for one in answer.rounds],
        left_out=[[*one.left_out] for one in answer.rounds],
        label_distribution=[round(share, 4) for share in answer.label_distribution],
    )
