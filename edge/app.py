"""The edge's ServerApp: serves its clients, and is at the same time a node of the cloud."""

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from statistics import median_low

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from fedphd.common.config.roles import EdgeConfig
from fedphd.common.config.run import ScheduleConfig
from fedphd.common.config.waits import WaitConfig
from fedphd.common.events import EventLog, Verdict
from fedphd.common.history.events import LinkChanged, PeerChanged, RoundEnded
from fedphd.common.homogeneity import homogeneity_score
from fedphd.common.robust import UpdateBound
from fedphd.common.stores import FileStore, StateStore
from fedphd.common.timing import stop_soon
from fedphd.common.wire import messages, records
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.grid import StreamingGrid, streaming_grid
from fedphd.common.wire.node import Node
from fedphd.common.wire.payload import shown
from fedphd.common.wire.roster import Acquaintances, Bound, Peer, Roster
from fedphd.edge.interval import run_interval
from fedphd.edge.link import CloudLink
from fedphd.edge.round import RoundStats
from fedphd.edge.statistics import collect_statistics
from fedphd.edge.strategy import EdgeAverage, Update, update_bounds

logger = logging.getLogger(__name__)

# In the edge's state folder.
STATE = "edge.safetensors"
FINISH_S = 5.0
FAREWELL_S = 1.0


@dataclass
class EdgeService:
    """Answers the cloud's messages by working with the clients on ``grid``.

    Args:
        stop: set when the cloud says that the run is over.
        shared_questions: as in ``edge/questions.py: Questions``.
        known, place: where several edges are in one process, whom they know together, and which
            of them this one is: (its number, how many there are). It then speaks for its share.
        bound: as in ``Roster``.
        store: keeps what must outlive this process; None: nothing does.
        farewell_s: seconds after the answer to the cloud until ``stop`` is set.
    """

    edge_id: str
    grid: StreamingGrid
    events: EventLog
    stop: threading.Event
    shared_questions: bool = False
    known: Acquaintances = field(default_factory=Acquaintances)
    place: tuple[int, int] = (0, 1)
    bound: Bound | None = None
    store: StateStore | None = None
    farewell_s: float = FAREWELL_S

    def __post_init__(self) -> None:
        waits, schedule = WaitConfig(), ScheduleConfig()
        self.verdict = Verdict()
        self._link = CloudLink(self.edge_id)
        self._run_name: str | None = None
        self._rounds_done = 0
        self._rounds_s = 0.0
        # Kept from interval to interval: an interval may be a single round.
        self._bounds: list[UpdateBound[Update]] = []
        self.roster = Roster(
            self.grid,
            asking=self.edge_id,
            kind="client",
            hello_s=waits.query_s,
            retry_s=waits.retry_s,
            max_samples=schedule.max_client_samples,
            bound=self.bound,
            on_change=self._on_change,
            known=self.known,
        )

    def handle(self, message: Message) -> Message:
        """Answer one message of the cloud; raises ReplyError for what cannot be read."""
        kind = message.metadata.message_type
        answers = {
            messages.HELLO: self._hello,
            messages.TRAIN: self._interval,
            messages.STATISTICS: self._statistics,
            messages.FINISH: self._finish,
        }
        if kind not in answers:
            raise ValueError(f"an edge does not answer {kind!r}; only {', '.join(answers)}")
        return answers[kind](message)

    def _hello(self, message: Message) -> Message:
        hello = records.read_payload(message, messages.Hello)
        if problem := hello.mismatch(hello.asking):
            logger.warning("%s", shown(problem))
        self.roster.hello_s = hello.wait_s
        peers: Iterable[Peer] = self.roster.refresh().values()
        if self.place[1] > 1:
            peers = self._share()
        clients = {peer.name: peer.num_samples for peer in peers}
        reply = messages.HelloReply(
            kind="edge", name=self.edge_id, clients=clients, holds=self._link.holds
        )
        return Message(records.to_records(reply), reply_to=message)

    def _share(self) -> Iterable[Peer]:
        """Those whom this edge speaks for; all, where it is alone in its process.

        Also those that it leaves alone for a while: others know nothing of that, and without them
        the edges' shares would overlap, or leave somebody out.
        """
        number, num_edges = self.place
        return islice(self.roster.everyone.values(), number, None, num_edges)

    def _interval(self, message: Message) -> Message:
        task = records.read_payload(message, messages.IntervalTask)
        waits = task.plan.waits
        self.roster.configure(
            hello_s=waits.query_s,
            retry_s=waits.retry_s,
            max_samples=task.plan.schedule.max_client_samples,
        )
        self._begin(task)
        corrects = task.plan.objective.method == "scaffold"
        codec = Codec(task.plan.codecs.cloud_variate_down, task.network.tensor_layout())
        # What is read and written then is of no use where nothing is rounded.
        store = None if task.plan.codecs.cloud_up == "fp32" else self.store
        if store is not None:
            store.restore(self._link, task)
        reply, weights, change = run_interval(
            task,
            records.weights_array(message),
            records.read_variate(message, codec) if corrects else None,
            edge_id=self.edge_id,
            link=self._link,
            grid=self.grid,
            roster=self.roster,
            on_round=lambda strategy, stats: self._on_round(task, strategy, stats),
            on_event=self.events.write,
            shared_questions=self.shared_questions,
            bounds=self._bounds,
        )
        if store is not None:
            store.store(self._link, task)
        return Message(records.to_records(reply, weights, change), reply_to=message)

    def _begin(self, task: messages.IntervalTask) -> None:
        """Forget what was of another run, which the same processes may have served."""
        if task.run_name != self._run_name:
            self._run_name, self._bounds = task.run_name, update_bounds(task.plan)
            self._rounds_done, self._rounds_s = 0, 0.0
            self.roster.label_counts.clear()

    def _statistics(self, message: Message) -> Message:
        task = records.read_payload(message, messages.StatisticsTask)
        weights = records.read_weights(message)
        reply, sums = collect_statistics(
            task, weights, edge_id=self.edge_id, grid=self.grid, roster=self.roster
        )
        return Message(records.to_records(reply, sums), reply_to=message)

    def _finish(self, message: Message) -> Message:
        finish = records.read_payload(message, messages.Finish)
        self.verdict = Verdict(finish.exit_code, finish.message)
        content, peers = records.to_records(finish), self._share()
        farewells = [Message(content, peer.node_id, messages.FINISH) for peer in peers]
        for reply in self.grid.send_and_receive(farewells, timeout=FINISH_S):
            if reply.has_error():
                name = self.roster.name_of(reply.metadata.src_node_id)
                why = shown(str(reply.error.reason))
                logger.warning("%s was not told that the run is over: %s", name, why)
        stop_soon(self.stop, self.farewell_s)
        return Message(records.to_records(messages.Ack(name=self.edge_id)), reply_to=message)

    def _on_change(self, name: str, change: str, detail: str) -> None:
        self.events.write(PeerChanged(peer=name, change=change, detail=detail))

    def _on_round(
        self, task: messages.IntervalTask, strategy: EdgeAverage, stats: RoundStats
    ) -> None:
        schedule = task.plan.schedule
        self._rounds_done += 1
        self._rounds_s += stats.seconds
        done = (task.interval - 1) * schedule.edge_rounds + stats.edge_round
        shares, target = strategy.offer.label_distribution, task.plan.target_distribution
        norms = stats.update_norms
        ended = RoundEnded(
            interval=task.interval,
            edge_round=stats.edge_round,
            round=done,
            rounds=schedule.total_edge_rounds,
            **stats.metrics.values(),
            clients=stats.clients,
            num_samples=stats.num_samples,
            label_distribution=[round(share, 4) for share in shares],
            target_distribution=[round(share, 4) for share in target],
            homogeneity=homogeneity_score(shares, target) if strategy.offer.num_samples else None,
            failures=stats.failures,
            failed=dict(stats.failed),
            update_norm=median_low(norms) if norms else None,
            largest_update_norm=max(norms, default=None),
            phases=stats.phases,
            sent_bytes=self.grid.traffic.sent_bytes,
            received_bytes=self.grid.traffic.received_bytes,
            seconds=stats.seconds,
            left_s=self._rounds_s / self._rounds_done * (schedule.total_edge_rounds - done),
        )
        self.events.write(ended)


def main(grid: Grid, config: EdgeConfig, events: EventLog, bound: Bound | None = None) -> Verdict:
    """Serve until the cloud says that the run is over; ``bound`` as in ``Roster``.

    Raises:
        ConnectionLostError: the cloud stayed away for longer than ``node.lost_after_s``.
    """
    torch.set_num_threads(config.num_threads)
    stop = threading.Event()
    clients = streaming_grid(grid, upload_stall_s=WaitConfig().upload_stall_s, in_order=False)
    store = FileStore(config.state_folder / STATE, resident=True)
    service = EdgeService(config.edge_id, clients, events, stop, bound=bound, store=store)
    node = Node(
        config.cloud,
        config.node,
        service.handle,
        stop=stop,
        on_change=lambda change: events.write(LinkChanged(server=config.cloud, change=change)),
    )
    node.run()
    return service.verdict
