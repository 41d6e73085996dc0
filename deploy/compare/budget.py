"""What each method may spend: equal local work and cloud rounds, or equal bytes at the cloud.

The common settings say what a hierarchical method does: ``schedule.intervals`` cloud rounds of
``schedule.edge_rounds`` edge rounds with ``training.local_amount`` of local work each. A flat
method does the same local work between two visits to the cloud in one go, as in
arXiv:2507.06449 (E = 5 local epochs against 5 edge rounds of one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedphd.common.config.roles import CloudConfig
from fedphd.common.errors import ConfigError
from fedphd.deploy.compare.methods import Method, plain_settings


def method_settings(method: Method, base: CloudConfig, *, intervals: int) -> dict[str, Any]:
    """Dotted settings that make ``base`` a run of ``method`` over ``intervals`` cloud rounds.

    Raises:
        ConfigError: the method prunes half way, and there is no half.
    """
    flat = method.topology == "flat"
    edge_rounds = 1 if flat else base.schedule.edge_rounds
    local_amount = base.training.local_amount * (base.schedule.edge_rounds if flat else 1)
    settings = {
        "topology": method.topology,
        "schedule.intervals": intervals,
        "schedule.edge_rounds": edge_rounds,
        "training.local_amount": local_amount,
        **plain_settings(),
        **method.settings,
    }
    if settings.get("pruning.mode") == "scheduled":
        if intervals < 2:
            raise ConfigError(
                f"method {method.name!r} prunes after half of the cloud rounds, but there is "
                f"only {intervals}; set schedule.intervals to 2 or more"
            )
        settings.setdefault("pruning.sparse_rounds", edge_rounds * (intervals // 2))
    return settings


def evaluation_period(base: CloudConfig, *, intervals: int) -> int:
    """Cloud rounds between two evaluations, so that all methods are measured about as often."""
    scaled = base.evaluation.every_intervals * intervals / base.schedule.intervals
    return max(1, math.floor(scaled + 0.5))


@dataclass(frozen=True)
class Work:
    """The arithmetic of one run.

    Attributes:
        cloud_rounds: visits to the cloud.
        rounds_per_cloud_round: rounds of local training between two visits.
        participants: clients that train in a round.
        local_amount: local work of a client in a round, in ``local_unit``.
        local_unit: "epochs" or "steps".
        steps_per_visit: optimiser steps of a client in a round, mean over the clients.
    """

    cloud_rounds: int
    rounds_per_cloud_round: int
    participants: int
    local_amount: int
    local_unit: str
    steps_per_visit: float

    @property
    def local_per_cloud_round(self) -> int:
        """Local work of all clients between two visits to the cloud, in ``local_unit``."""
        return self.participants * self.rounds_per_cloud_round * self.local_amount

    @property
    def total_local(self) -> int:
        """Local work of all clients in the whole run, in ``local_unit``."""
        return self.cloud_rounds * self.local_per_cloud_round

    @property
    def total_steps(self) -> float:
        """Optimiser steps of all clients in the whole run, expected over who takes part."""
        visits = self.cloud_rounds * self.rounds_per_cloud_round * self.participants
        return visits * self.steps_per_visit


def work_of(config: CloudConfig, part_sizes: Sequence[int]) -> Work:
    """What a run of ``config`` comes to with clients that hold ``part_sizes`` images."""
    schedule, training = config.schedule, config.training
    passes = [-(-size // training.batch_size) for size in part_sizes]
    mean_pass = sum(passes) / len(passes)
    steps = training.local_amount * (mean_pass if training.local_unit == "epochs" else 1)
    return Work(
        cloud_rounds=schedule.intervals,
        rounds_per_cloud_round=schedule.edge_rounds,
        # As common/rng.py samples them.
        participants=max(1, math.floor(schedule.participation * len(part_sizes) + 0.5 + 1e-9)),
        local_amount=training.local_amount,
        local_unit=training.local_unit,
        steps_per_visit=steps,
    )


@dataclass(frozen=True)
class RoundBytes:
    """Bytes over the cloud's links of a method's first and of a later cloud round, measured.

    ``scheduled`` methods prune after half of their rounds: the first then stands for every round
    of the dense network, the later one for every round of the pruned network.
    """

    first: int
    later: int
    scheduled: bool

    def total(self, cloud_rounds: int) -> int:
        """Bytes of a run of so many cloud rounds."""
        dense = cloud_rounds // 2 if self.scheduled else 1
        return self.first * dense + self.later * (cloud_rounds - dense)

    def rounds_within(self, num_bytes: int) -> int:
        """The most cloud rounds whose bytes do not exceed ``num_bytes``; 0 if none fit."""
        # Not fewer than all rounds at the cheaper price: go down from there.
        rounds = num_bytes // min(self.first, self.later) + 1
        while rounds > 0 and self.total(rounds) > num_bytes:
            rounds -= 1
        return rounds
