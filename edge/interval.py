"""Runs one interval over a grid of clients; the same code for processes and for simulation."""

from collections.abc import Callable, Sequence

import torch
from flwr.app import Array

from fedphd.common.config.run import FederationConfig
from fedphd.common.events import Event
from fedphd.common.robust import UpdateBound
from fedphd.common.unet.parts import PARTS, PartSubset, joined
from fedphd.common.wire import records
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.exchange import Quorum
from fedphd.common.wire.grid import StreamingGrid
from fedphd.common.wire.messages import (
    TRAIN,
    IntervalReply,
    IntervalTask,
    RoundMembers,
    UNetSpec,
)
from fedphd.common.wire.metrics import TrainMetrics
from fedphd.common.wire.roster import Roster
from fedphd.edge.averaging import ServerVariate
from fedphd.edge.link import VARIATE, WEIGHTS, CloudLink
from fedphd.edge.round import RoundStats
from fedphd.edge.strategy import EdgeAverage, Update


def run_interval(
    task: IntervalTask,
    came: Array,
    variate: torch.Tensor | None = None,
    *,
    edge_id: str,
    link: CloudLink,
    grid: StreamingGrid,
    roster: Roster,
    on_round: Callable[[EdgeAverage, RoundStats], None],
    on_event: Callable[[Event], None] = lambda event: None,
    shared_questions: bool = False,
    bounds: list[UpdateBound[Update]] | None = None,
) -> tuple[IntervalReply, Array | torch.Tensor, torch.Tensor | None]:
    """Run ``edge_rounds`` edge rounds from the cloud's weights.

    Args:
        task: the cloud's order.
        came: the cloud's model, or the parts of it that travel, as ``CloudLink.receive`` takes it.
        variate: SCAFFOLD's server variate, (numel,), float32; None for other methods.
        link: what the edge keeps of the cloud's weights and of its own changes.
        on_round: told about each finished round.
        on_event: told about what happens within a round.
        shared_questions: as in ``edge/questions.py: Questions``.
        bounds: as in ``EdgeAverage``.

    Returns:
        The reply to the cloud; the weights of its ``parts`` as the codec upwards packs them: the
        cloud's own where no client trained here; and by how much the variate changed, packed.

    Raises:
        ReplyError: the cloud's weights do not fit its own description of the network.
    """
    layout = task.network.tensor_layout()
    start = link.receive(task, came)
    # Serialised already where they came whole: then they are in memory once.
    begin = came if task.base is None else records.to_array(start)
    server = None
    if variate is not None:
        server = ServerVariate(records.check_variate(variate, layout), task.num_clients)
    traffic_before = grid.traffic
    _configure(grid, task.plan)
    grid.expect(layout.numel)
    strategy = EdgeAverage(
        edge_id,
        task,
        roster,
        on_round=lambda stats: on_round(strategy, stats),
        on_event=on_event,
        shared_questions=shared_questions,
        variate=server,
        bounds=bounds,
    )
    result = strategy.start(
        grid,
        records.weights_record(begin),
        num_rounds=task.plan.schedule.edge_rounds,
        timeout=task.plan.waits.round_s,
    )
    # Part sets that nobody sent are still the cloud's own: they need not go back.
    numbers = strategy.averaged or range(len(strategy.part_sets))
    sent = PartSubset(layout, joined(strategy.part_sets[number] for number in numbers))
    rounds = strategy.rounds
    reply = IntervalReply(
        edge_id=edge_id,
        interval=task.interval,
        network=UNetSpec(unet=task.network.unet, layout=sent.chosen.to_json()),
        parts=sent.parts,
        samples_per_round=sum(stats.num_samples for stats in rounds) / len(rounds),
        client_rounds=sum(len(stats.clients) for stats in rounds),
        label_distribution=strategy.offer.label_distribution,
        metrics=_metrics(rounds),
        mean_steps=strategy.interval_mean_steps(),
        images=sum(stats.images for stats in rounds),
        traffic=grid.traffic.minus(traffic_before),
        clients=tuple(sorted({name for stats in rounds for name in stats.clients})),
        rounds=tuple(
            RoundMembers(clients=tuple(stats.clients), left_out=tuple(stats.left_out))
            for stats in rounds
        ),
        failures=tuple(text for stats in rounds for text in stats.failures),
    )
    up = Codec(task.plan.codecs.cloud_up, sent.chosen)
    # Empty where no client trained.
    trained = next(iter(result.arrays.values()), begin)
    # The cloud takes nothing of an edge without clients.
    counts, whole = bool(strategy.averaged), PartSubset(layout, PARTS)
    change = None
    if server:
        change = link.pack(VARIATE, Codec(up.name, layout), whole, server.change, counts=counts)
    if up.is_exact:
        # Serialised already where it is whole.
        return reply, trained if sent.is_whole else sent.take(records.read_array(trained)), change
    moved = sent.take(records.read_array(trained)) - sent.take(start)
    return reply, link.pack(WEIGHTS, up, sent, moved, counts=counts), change


def _configure(grid: StreamingGrid, plan: FederationConfig) -> None:
    """Set how the grid waits for clients in this run."""
    waits, schedule = plan.waits, plan.schedule
    quorum = Quorum(schedule.quorum, waits.straggler_s)
    grid.configure(
        in_order=plan.reproducible,
        upload_stall_s=waits.upload_stall_s,
        quorums={TRAIN: quorum} if schedule.quorum < 1 else {},
    )


def _metrics(rounds: Sequence[RoundStats]) -> TrainMetrics:
    """The interval's means, weighed as a mean edge round."""
    merged = TrainMetrics.merge(stats.metrics for stats in rounds)
    # Only the first round begins with the cloud's own weights, which are validated.
    validation = rounds[0].metrics.validation_loss
    return merged.model_copy(update={"validation_loss": validation}).per(len(rounds))
