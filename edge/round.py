"""One edge round: who trains here, what the edge holds with them, and the round's figures."""

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fedphd.common.errors import FailureKind
from fedphd.common.timing import Stopwatch
from fedphd.common.unet.costs import images_of_steps
from fedphd.common.wire.messages import TrainReply
from fedphd.common.wire.metrics import TrainMetrics
from fedphd.common.wire.offers import Offer
from fedphd.common.wire.payload import shown
from fedphd.common.wire.roster import Peer, Roster

logger = logging.getLogger(__name__)


@dataclass
class RoundStats:
    """An edge round's figures; ``metrics`` weigh each client by its registered images.

    Attributes:
        failures, failed: who is left out and why, for people; how many, by why.
        update_norms: of all replies that were measured, per optimiser step.
        phases: seconds of the round's phases.
    """

    edge_round: int
    clients: list[str] = field(default_factory=list)
    num_samples: int = 0
    metrics: TrainMetrics = field(default_factory=TrainMetrics)
    steps: int = 0
    images: int = 0
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: Counter[FailureKind] = field(default_factory=Counter)
    update_norms: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Trainee:
    """A client that chose this edge, and its images per class."""

    peer: Peer
    label_counts: tuple[int, ...]


class EdgeRound:
    """What an edge knows of a round that is under way.

    Args:
        number: of the edge round in its interval, from 1.
        weights: what the clients train, (numel,), float32.

    Attributes:
        offer: what the edge holds with the clients that have chosen it; at first, as given.
        trainees: these clients, by node id.
        part_set_of: the number of the part set that each sends back, by node id.
        watch: times the round's phases; whoever works on the round says which that was.
        others_silent: a client waited in vain for the other edges' offers of this round.
    """

    def __init__(self, number: int, weights: Tensor, offer: Offer, roster: Roster) -> None:
        self.weights = weights
        self.stats = RoundStats(number)
        self.offer = offer
        self.trainees: dict[int, Trainee] = {}
        self.part_set_of: dict[int, int] = {}
        self.others_silent = False
        self._offer_before = offer
        self._roster = roster
        self.watch = Stopwatch()
        self._handed_out_s: dict[int, float] = {}

    def attach(self, peer: Peer, label_counts: tuple[int, ...]) -> None:
        """Count a client that chose this edge, in the very next offer."""
        self.offer = self.offer.with_client(label_counts)
        self.trainees[peer.node_id] = Trainee(peer, label_counts)

    def hand_out(self, peer: Peer, part_set: int) -> None:
        """A client gets its order now, to send back the part set of this number."""
        self.part_set_of[peer.node_id] = part_set
        self._handed_out_s[peer.node_id] = time.monotonic()

    def handed_out_for_s(self, node_id: int) -> float:
        """Seconds since a client got its order."""
        return time.monotonic() - self._handed_out_s[node_id]

    def leave_out(self, peer: Peer, reason: str, kind: FailureKind) -> None:
        """Continue without a client that failed, and leave it alone for a while."""
        reason = shown(reason)
        self.stats.failed[kind] += 1
        self.stats.failures.append(f"{peer.name}: {reason}")
        self.stats.left_out.append(peer.name)
        logger.warning("round %d: %s is left out: %s", self.stats.edge_round, peer.name, reason)
        self._roster.rest(peer.name, reason, kind)

    def ignore(self, peer: Peer, reason: str) -> None:
        """Report an answer that does not count, of a client that stays in the round."""
        self.stats.failures.append(f"{peer.name}: {reason}")
        logger.warning("round %d: %s: %s", self.stats.edge_round, peer.name, reason)

    def finish(self, trained: Iterable[Trainee]) -> None:
        """Close the round with those that delivered; the others must not weigh in later offers."""
        self.offer = self._offer_before
        for trainee in sorted(trained, key=lambda trainee: trainee.peer.name):
            self.offer = self.offer.with_client(trainee.label_counts)
            self.stats.clients.append(trainee.peer.name)
        self.watch.lap("averaging")
        self.stats.phases = self.watch.phases
        self.stats.seconds = sum(self.stats.phases.values())
