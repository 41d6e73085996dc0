"""An edge's part of the reference statistics: it asks its clients and adds what they answer."""

import logging

import torch
from flwr.app import Message

from fedphd.common.errors import ReplyError
from fedphd.common.quality.moments import FeatureStatistics, read_statistics
from fedphd.common.wire.grid import StreamingGrid
from fedphd.common.wire.messages import STATISTICS, StatisticsReply, StatisticsTask
from fedphd.common.wire.payload import shown
from fedphd.common.wire.records import read_payload, to_records
from fedphd.common.wire.roster import Peer, Roster

logger = logging.getLogger(__name__)


def collect_statistics(
    task: StatisticsTask,
    weights: torch.Tensor,
    *,
    edge_id: str,
    grid: StreamingGrid,
    roster: Roster,
) -> tuple[StatisticsReply, torch.Tensor]:
    """Ask the clients that ``task`` names and add their statistics, one reply at a time.

    ``weights`` are the extractor's, (numel,), float32.

    Returns:
        The reply to the cloud, which names clients that failed, and the packed sums, float64.
    """
    traffic_before = grid.traffic
    known = roster.everyone
    asked = {known[name].node_id: known[name] for name in sorted(task.clients) if name in known}
    missing = [name for name in task.clients if name not in known]
    failures = [f"{name}: is not connected to {edge_id}" for name in missing]
    records = to_records(task.model_copy(update={"clients": ()}), weights)
    messages = [Message(records, node_id, STATISTICS) for node_id in asked]
    total = FeatureStatistics.zeros(task.extractor.num_features, task.num_classes)
    names = []
    # In order: sums of floating-point numbers depend on it, and their hash is in every report.
    for reply in grid.send_and_receive(messages, timeout=task.wait_s, in_order=True):
        peer = asked[reply.metadata.src_node_id]
        try:
            total += _check(peer, task, reply, roster)
        except ReplyError as error:
            why = shown(str(error))
            failures.append(f"{peer.name}: {why}")
            logger.warning("%s is left out of the statistics: %s", peer.name, why)
            roster.rest(peer.name, why, error.kind)
        else:
            names.append(peer.name)
    reply_to_cloud = StatisticsReply(
        name=edge_id,
        count=total.count,
        label_counts=total.label_counts,
        clients=tuple(names),
        failures=tuple(failures),
        traffic=grid.traffic.minus(traffic_before),
    )
    return reply_to_cloud, total.pack()


def _check(peer: Peer, task: StatisticsTask, reply: Message, roster: Roster) -> FeatureStatistics:
    answer = read_payload(reply, StatisticsReply)
    if answer.name != peer.name or answer.count != peer.num_samples:
        raise roster.doubt(
            peer.name,
            f"answers as {answer.name} with {answer.count} images, but registered as {peer.name} "
            f"with {peer.num_samples}",
        )
    num_features, num_classes = task.extractor.num_features, task.num_classes
    return read_statistics(reply, answer, num_features=num_features, num_classes=num_classes)
