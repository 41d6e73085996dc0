"""Reference statistics without central data: the clients compute them, the edges add them."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message

from fedphd.common.config.roles import CloudConfig
from fedphd.common.errors import ParticipantsError, ReplyError
from fedphd.common.quality.extractor import Extractor
from fedphd.common.quality.moments import FeatureStatistics, read_statistics
from fedphd.common.wire.grid import StreamingGrid
from fedphd.common.wire.messages import STATISTICS, StatisticsReply, StatisticsTask
from fedphd.common.wire.payload import shown
from fedphd.common.wire.records import read_payload, to_records
from fedphd.common.wire.roster import Peer, Roster
from fedphd.common.wire.traffic import Traffic

logger = logging.getLogger(__name__)


@dataclass
class ClientStatistics:
    """What the clients gave.

    Attributes:
        statistics: of all their training images.
        clients: whose images these are.
        failures: who is left out, and why.
        client_edge: traffic between clients and edges.
    """

    statistics: FeatureStatistics
    clients: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    client_edge: Traffic = field(default_factory=Traffic)
    seconds: float = 0.0


def assign_clients(edges: Mapping[str, Peer]) -> dict[str, list[str]]:
    """One edge for each client that any edge sees, so that no image counts twice.

    Returns the clients by edge, all sorted; each client is with the edge that has fewest so far.
    """
    assigned: dict[str, list[str]] = {name: [] for name in sorted(edges)}
    for client in sorted({name for edge in edges.values() for name in edge.clients}):
        seen_by = [name for name in assigned if client in edges[name].clients]
        assigned[min(seen_by, key=lambda name: len(assigned[name]))].append(client)
    return assigned


def collect_statistics(
    config: CloudConfig, extractor: Extractor, grid: StreamingGrid, roster: Roster
) -> ClientStatistics:
    """Send the extractor to every client, through one edge each, and add what comes back.

    Raises:
        ParticipantsError: no client gave anything; says why.
    """
    started_s = time.monotonic()
    edges = roster.peers
    assigned = {name: clients for name, clients in assign_clients(edges).items() if clients}
    weights = extractor.weights()
    messages = []
    for edge_id, names in assigned.items():
        records = to_records(_task(config, extractor, names), weights)
        messages.append(Message(records, edges[edge_id].node_id, STATISTICS))
    edge_of = {edges[name].node_id: name for name in assigned}
    zero = FeatureStatistics.zeros(extractor.spec.num_features, config.num_classes)
    result, timeout_s = ClientStatistics(zero), config.waits.interval_s
    # In order: sums of floating-point numbers depend on it, and their hash is in every report.
    for reply in grid.send_and_receive(messages, timeout=timeout_s, in_order=True):
        edge = edges[edge_of[reply.metadata.src_node_id]]
        _add(result, edge, assigned[edge.name], reply)
    if not result.clients:
        raise ParticipantsError(
            "no client gave reference statistics (evaluation.reference_clients): "
            f"{'; '.join(result.failures) or 'no edge sees a client'}"
        )
    result.clients.sort()
    result.seconds = time.monotonic() - started_s
    return result


def _task(config: CloudConfig, extractor: Extractor, names: list[str]) -> StatisticsTask:
    return StatisticsTask(
        extractor=extractor.spec,
        image_size=config.model.image_size,
        channels=config.model.channels,
        num_classes=config.num_classes,
        batch_size=config.evaluation.batch_size,
        wait_s=config.waits.round_s,
        clients=tuple(names),
    )


def _add(result: ClientStatistics, edge: Peer, asked: list[str], reply: Message) -> None:
    """Add an edge's sums; an edge whose answer is unusable is left out with all its clients."""
    try:
        answer = read_payload(reply, StatisticsReply)
        if answer.traffic.is_absurd:
            raise ReplyError(f"claims {answer.traffic.total_bytes:.3g} bytes over its links")
        result.client_edge += answer.traffic
        if answer.clients:
            result.statistics += _check(edge, asked, answer, reply, result.statistics)
            result.clients += answer.clients
        result.failures += answer.failures
    except ReplyError as error:
        why = shown(str(error))
        logger.warning("%s is left out of the statistics: %s", edge.name, why)
        result.failures.append(f"{edge.name} with {', '.join(asked)}: {why}")


def _check(
    edge: Peer, asked: list[str], answer: StatisticsReply, reply: Message, like: FeatureStatistics
) -> FeatureStatistics:
    strangers = sorted(set(answer.clients) - set(asked))
    expected = sum(edge.clients[name] for name in set(answer.clients) - set(strangers))
    if strangers or len(set(answer.clients)) < len(answer.clients) or answer.count != expected:
        raise ReplyError(
            f"claims {answer.count} images of {', '.join(answer.clients)}; expected {expected}, of "
            f"only {', '.join(asked)} or some of them"
        )
    return read_statistics(
        reply, answer, num_features=len(like.sums), num_classes=len(like.label_counts)
    )
