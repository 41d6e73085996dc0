"""Runs one interval over a grid of clients; the same code for processes and for simulation."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fedphd.common.grid import StreamingGrid
from fedphd.common.messages import (
    IntervalReply,
    IntervalTask,
    check_reply_weights,
    read_array,
    weights_record,
)
from fedphd.common.roster import Roster
from fedphd.edge.strategy import EdgeAverage, RoundStats


def run_interval(
    task: IntervalTask,
    weights: torch.Tensor,
    *,
    edge_id: str,
    grid: StreamingGrid,
    roster: Roster,
    on_round: Callable[[EdgeAverage, RoundStats], None],
) -> tuple[IntervalReply, torch.Tensor]:
    """Run ``edge_rounds`` edge rounds from ``weights``.

    Args:
        task: the cloud's order.
        weights: (numel,), float32, the cloud's model.
        edge_id: this edge.
        grid: reaches the clients.
        roster: the clients that this edge sees.
        on_round: told about each finished round.

    Returns:
        The reply to the cloud, and the weights (numel,): the cloud's own where no client
        trained here.

    Raises:
        ReplyError: the cloud's weights do not fit its own description of the network.
    """
    started_s = time.monotonic()
    check_reply_weights(weights, task.network, task.network.tensor_layout())
    traffic_before = grid.traffic
    grid.configure(in_order=task.plan.reproducible, upload_stall_s=task.plan.waits.upload_stall_s)
    strategy = EdgeAverage(edge_id, task, roster, on_round=lambda stats: on_round(strategy, stats))
    result = strategy.start(
        grid,
        weights_record(weights),
        num_rounds=task.plan.schedule.edge_rounds,
        timeout=task.plan.waits.round_s,
    )
    trained = len(result.arrays) > 0
    if trained:
        weights = read_array(next(iter(result.arrays.values())))
    rounds = strategy.rounds
    samples = sum(stats.num_samples for stats in rounds)
    reply = IntervalReply(
        edge_id=edge_id,
        interval=task.interval,
        network=task.network,
        samples_per_round=samples / len(rounds),
        client_rounds=sum(len(stats.clients) for stats in rounds),
        label_distribution=tuple(float(share) for share in strategy.holdings.label_distribution),
        loss=sum(stats.loss_sum for stats in rounds) / samples if samples else 0.0,
        mean_steps=strategy.interval_mean_steps(),
        images=sum(stats.images_sum for stats in rounds),
        traffic=grid.traffic.minus(traffic_before),
        seconds=time.monotonic() - started_s,
        clients=tuple(sorted({name for stats in rounds for name in stats.clients})),
        failures=tuple(text for stats in rounds for text in stats.failures),
    )
    return reply, weights
