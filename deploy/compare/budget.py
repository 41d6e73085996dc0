"""What each method may spend: equal local work and cloud rounds, or equal bytes at the cloud.

The common settings describe a hierarchical method: ``schedule.intervals`` cloud rounds of
``schedule.edge_rounds`` edge rounds with ``training.local_amount`` of local work each. A flat
method does the local work of all these edge rounds in one go, as in arXiv:2507.06449 (E = 5 local
epochs against 5 edge rounds of one epoch).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from fedphd.common.config.roles import CloudConfig
from fedphd.common.errors import ConfigError
from fedphd.common.rng import sample_participants
from fedphd.deploy.compare.methods import PLAIN, Method, default_settings

# The local work of a run.
_WORK = {
    "schedule.edge_rounds", "schedule.intervals", "schedule.participation",
    "training.local_amount", "training.local_unit",
}  # fmt: skip


class Budget(StrEnum):
    """What every method gets the same amount of."""

    rounds = "rounds"
    cloud_bytes = "cloud-bytes"


def method_settings(method: Method, base: CloudConfig, *, intervals: int) -> dict[str, Any]:
    """Dotted settings that make ``base`` a run of ``method`` over ``intervals`` cloud rounds.

    Raises ConfigError if the method prunes half way, and there is only one cloud round.
    """
    edge_rounds, local_amount = base.schedule.edge_rounds, base.training.local_amount
    if method.topology == "flat":
        edge_rounds, local_amount = 1, local_amount * edge_rounds
    settings = {
        "topology": method.topology,
        "schedule.intervals": intervals,
        "schedule.edge_rounds": edge_rounds,
        "training.local_amount": local_amount,
        **{key: default_settings()[key] for key in PLAIN},
        **method.settings,
    }
    if method.prunes_half_way:
        if intervals < 2:
            raise ConfigError(
                f"method {method.name!r} prunes after half of the cloud rounds, but there is "
                f"only {intervals}; set schedule.intervals to 2 or more"
            )
        # A method may have edge rounds of its own.
        per_interval = settings["schedule.edge_rounds"]
        settings.setdefault("pruning.sparse_rounds", per_interval * (intervals // 2))
    return settings


def own_work(method: Method) -> list[str]:
    """What a method sets itself of the amount of training, which need not be equal then."""
    return sorted(_WORK & method.settings.keys())


def evaluation_period(base: CloudConfig, *, intervals: int) -> int:
    """Cloud rounds between two evaluations, so that all methods are evaluated about as often."""
    scaled = base.evaluation.every_intervals * intervals / base.schedule.intervals
    return max(1, math.floor(scaled + 0.5))


@dataclass(frozen=True)
class Workload:
    """How much local training a run asks for; local work is in ``training.local_unit``.

    Attributes:
        participants: clients that train in an edge round.
        steps_per_round: optimiser steps of one of them in an edge round, mean over all clients.
        local_per_cloud_round: local work of all clients between two visits to the cloud.
        total_local: local work of all clients in the whole run.
        total_steps: their optimiser steps, expected over who takes part.
    """

    participants: int
    steps_per_round: float
    local_per_cloud_round: int
    total_local: int
    total_steps: float

    @classmethod
    def of(cls, config: CloudConfig, part_sizes: Sequence[int]) -> Self:
        """The workload of ``config`` with clients that train on ``part_sizes`` images."""
        schedule, training = config.schedule, config.training
        names, fraction = map(str, range(len(part_sizes))), schedule.participation
        # Who they are differs from round to round, how many does not.
        first = sample_participants(names, fraction=fraction, seed=0, interval=1, edge_round=1)
        per_epoch = sum(-(-size // training.batch_size) for size in part_sizes) / len(part_sizes)
        steps = training.local_amount * (per_epoch if training.local_unit == "epochs" else 1)
        client_rounds = len(first) * schedule.edge_rounds
        local = client_rounds * training.local_amount
        return cls(
            participants=len(first),
            steps_per_round=steps,
            local_per_cloud_round=local,
            total_local=schedule.intervals * local,
            total_steps=schedule.intervals * client_rounds * steps,
        )


@dataclass(frozen=True)
class RoundBytes:
    """Bytes that a method moves over the cloud's links in a cloud round.

    Attributes:
        first: in the first one, in which weights may go whole that later go as differences, or
            clients tell of their data.
        later: in every other one.
        pruned: in those of the second half, if the network is pruned after the first; else None.
    """

    first: int
    later: int
    pruned: int | None = None

    def total(self, cloud_rounds: int) -> int:
        """Bytes of a run of so many cloud rounds, of two at least if it prunes."""
        dense = cloud_rounds if self.pruned is None else cloud_rounds // 2
        return self.first + self.later * (dense - 1) + (self.pruned or 0) * (cloud_rounds - dense)

    def rounds_within(self, num_bytes: int) -> int:
        """The most cloud rounds that move at most ``num_bytes``; 0 if the method cannot run."""
        # No more than if every round were the cheapest one: go down from there.
        rounds = num_bytes // min(self.first, self.later, self.pruned or self.later) + 1
        while rounds > 0 and self.total(rounds) > num_bytes:
            rounds -= 1
        # Without a second half there is nothing to prune for.
        return 0 if self.pruned is not None and rounds < 2 else rounds
