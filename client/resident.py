"""One client process that serves all its edges; data, model and optimiser stay loaded."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import torch
from flwr.app import Context, Message, RecordDict

from fedphd.client.app import ClientRuntime, build_app
from fedphd.common.config.roles import ClientConfig
from fedphd.common.data.apart import Opening
from fedphd.common.errors import ConnectionLostError, FedPhDError, exit_code_of
from fedphd.common.events import Verdict
from fedphd.common.history.status import CONNECTED, StatusBoard
from fedphd.common.stores import FileStore
from fedphd.common.timing import stop_soon
from fedphd.common.wire.messages import TRAIN, Finish
from fedphd.common.wire.node import Node
from fedphd.common.wire.offers import CHOOSE, Choose, OfferBook
from fedphd.common.wire.records import read_payload, to_records

logger = logging.getLogger(__name__)

LEAVE_S = 1.5
STATE = "training.safetensors"
# Long enough for the other edges to say the same.
FAREWELL_S = 2.5


class OfferBoard:
    """Brings together the offers of the edges that a client serves: each knows only its own."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # An edge may be late by an interval: it still asks about the one before.
        self._book = OfferBook(past_intervals=1)
        self.connected: set[str] = set()
        # Names by address, as the edges' questions tell them.
        self._edge_at: dict[str, str] = {}

    def merge(
        self, asked: Choose, *, address: str = "", on_wait: Callable[[], None] = lambda: None
    ) -> Choose:
        """Add the other edges' offers to the question of the edge at ``address``.

        Waits at most ``offer_wait_s`` seconds for edges that have made no offer in this edge round
        yet, as many as have an order and are connected, and says ``on_wait`` before it does. Those
        that are still silent then count as ``OfferBook.merged`` says.
        """
        deadline_s, told = time.monotonic() + asked.offer_wait_s, False
        with self._changed:
            self._edge_at[address] = asked.asking
            self._book.note(asked)
            self._changed.notify_all()
            while len(made := self._book.of_round(asked)) < self._num_awaited(asked):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    logger.info(
                        "interval %d round %d: %d edges have made an offer, the others are silent",
                        asked.interval, asked.edge_round, len(made),
                    )  # fmt: skip
                    break
                if not told:
                    told = True
                    on_wait()
                self._changed.wait(left_s)
            # Its own is forgotten where it was lost meanwhile.
            return self._book.merged(asked, [*asked.offers, *made.values()])

    def _num_awaited(self, asked: Choose) -> int:
        # One that joined in mid-interval is connected, and makes no offer until the next.
        return min(asked.num_edges, len(self.connected))

    def set_connected(self, address: str, connected: bool) -> None:
        """Remember which edges are there, so that nobody waits for one that is not.

        Nor is one chosen by what it offered before it was lost: it would hold ever less than the
        others, and draw all clients to itself.
        """
        with self._changed:
            (self.connected.add if connected else self.connected.discard)(address)
            if not connected and (edge_id := self._edge_at.get(address)) is not None:
                self._book.forget(edge_id)
            self._changed.notify_all()


class Resident:
    """Serves every configured edge from one process until the run ends, or ``stop`` is set.

    ``say`` shows a line to the user when a connection changes, ``status`` keeps what others may
    ask, ``opening`` may have begun to open the data.

    Attributes:
        verdict: what an edge said of the run's end; None before.
        board: brings the edges' offers together.
        nodes: this client at each of its edges, by address.

    Raises ConfigError if the data, certificates or the key cannot be read.
    """

    def __init__(
        self,
        config: ClientConfig,
        *,
        stop: threading.Event,
        say: Callable[[str], None] = logger.info,
        status: StatusBoard | None = None,
        opening: Opening | None = None,
    ) -> None:
        torch.set_num_threads(config.num_threads)
        self.verdict: Verdict | None = None
        self._config = config
        self._say = say
        self._stop = stop
        self._status = status or StatusBoard("client", config.client_id)
        self.board = OfferBoard()
        self._runtime = ClientRuntime(
            config, on_finish=self._finish, opening=opening, on_event=self._status.event
        )
        self._runtime.check_images()
        store = FileStore(config.state_folder / STATE, resident=True)
        self._app = build_app(lambda context: self._runtime, state_of=lambda context: store)
        self.nodes = {address: self._node(address) for address in config.edges}
        # Edges that have been out of reach for too long, and why.
        self._lost: dict[str, ConnectionLostError] = {}
        self._failure: Exception | None = None
        self._has_trained = False
        # Why it could not, the last time.
        self._could_not: Exception | None = None
        self._say(self._runtime.describe_data())

    def run(self) -> Verdict:
        """Serve until the run is over or ``stop`` is set.

        Raises:
            ConnectionLostError: every edge is out of reach.
        """
        threads = [
            threading.Thread(target=self._serve, args=(address, node), name=address, daemon=True)
            for address, node in self.nodes.items()
        ]
        for thread in threads:
            thread.start()
        # Short joins, so that signals are handled in between.
        while not (self._stop.is_set() or self._failure or len(self._lost) == len(threads)):
            self._status.beat()
            for thread in threads:
                thread.join(0.1)
        lost = dict(self._lost)
        # Where nobody said stop, they would not end.
        deadline_s = time.monotonic() + (LEAVE_S if self._stop.is_set() else 0.0)
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        for node in self.nodes.values():
            node.leave()
        if self._failure is not None:
            raise self._failure
        if self.verdict is None and len(lost) == len(threads):
            raise next(iter(lost.values()))
        return self._own_verdict() or Verdict(message="stopped")

    def _own_verdict(self) -> Verdict | None:
        """The run's; or, where that went well without this client, what kept it from training."""
        error, verdict = self._could_not, self.verdict
        if verdict is None or verdict.exit_code or error is None or self._has_trained:
            return verdict
        why = str(error) or type(error).__name__
        text = f"{verdict.message}, but this client never trained: {why}"
        return Verdict(exit_code_of(error), text)

    def _node(self, address: str) -> Node:
        """The node at an edge; raises ConfigError for certificates or keys that cannot be read."""

        def on_change(change: str) -> None:
            if change == CONNECTED:
                self._lost.pop(address, None)
            self.board.set_connected(address, change == CONNECTED)
            self._status.linked(address, change)
            self._say(f"{address} {change}")

        answer = partial(self.answer, address=address)
        return Node(address, self._config.node, answer, stop=self._stop, on_change=on_change)

    def _serve(self, address: str, node: Node) -> None:
        """Serve an edge, and go on looking for one that is lost as long as there is another."""
        try:
            while not self._stop.is_set() and len(self._lost) < len(self.nodes):
                try:
                    node.run()
                except ConnectionLostError as error:
                    if address not in self._lost:
                        self._say(str(error))
                    self._lost[address] = error
        except FedPhDError as error:
            # Who runs this says it.
            self._failure = error
        except Exception as error:
            if self._stop.is_set():
                # It has left, and what it was about to answer cannot be sent any more.
                logger.debug("the node at %s ends", address, exc_info=True)
                return
            logger.exception("the node at %s failed", address)
            self._failure = error

    def answer(self, message: Message, *, address: str = "") -> Message:
        """Answer one message of the edge at ``address``."""
        if message.metadata.message_type == CHOOSE:
            hurry = partial(self._hurry_others, address)
            asked = read_payload(message, Choose)
            asked = self.board.merge(asked, address=address, on_wait=hurry)
            message.content = to_records(asked)
        run_id, node_id = message.metadata.run_id, message.metadata.dst_node_id
        try:
            reply = self._app(message, Context(run_id, node_id, {}, RecordDict(), {}))
        except Exception as error:
            # Also what nobody foresaw, such as a GPU without memory.
            if message.metadata.message_type in (CHOOSE, TRAIN):
                self._could_not = error
            raise
        if message.metadata.message_type == TRAIN:
            self._has_trained = True
        return reply

    def _hurry_others(self, address: str) -> None:
        """Edges ask in the same order: when one has, the others' questions are due."""
        for other, node in list(self.nodes.items()):
            if other != address:
                node.hurry()

    def _finish(self, finish: Finish) -> None:
        # The first edge decides: they all pass on the same verdict of the cloud.
        self.verdict = self.verdict or Verdict(finish.exit_code, finish.message)
        stop_soon(self._stop, FAREWELL_S)
