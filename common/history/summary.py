"""``summary.json``: what a run achieved and what it cost."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from fedphd.common.events import write_json
from fedphd.common.history.evaluation import EvaluationRecord
from fedphd.common.history.events import StatisticsFigures
from fedphd.common.unet.costs import PruneReport

SUMMARY = "summary.json"
SAMPLES = "samples.png"


class Change(BaseModel):
    """A quantity of the network before and after pruning."""

    before: int
    after: int


class LinkBytes(BaseModel):
    """Bytes over each kind of link, and what flat FedAvg would have moved over the cloud's.

    Attributes:
        flat_fedavg_client_cloud: if FedAvg averaged at the cloud in every edge round.
        cloud_saving: share of these that was not moved.
        flat_fedavg_equal_cloud_rounds: if FedAvg averaged at the cloud once per interval, after
            the local work of all its edge rounds.
        cloud_saving_equal_cloud_rounds: share of these that was not moved.
    """

    client_edge: int
    edge_cloud: int
    flat_fedavg_client_cloud: int
    cloud_saving: float | None
    flat_fedavg_equal_cloud_rounds: int = 0
    cloud_saving_equal_cloud_rounds: float | None = None


class IntervalCosts(BaseModel):
    """What one interval cost."""

    interval: int
    client_rounds: int
    client_edge_bytes: int
    edge_cloud_bytes: int
    images: int
    training_flops: float


class TrainingCost(BaseModel):
    """Arithmetic of all clients together, and how it is counted."""

    flops: float
    images: int
    convention: str


class Summary(BaseModel):
    """A run from end to end; the times of its phases are in seconds.

    The moving average has seen ``ema_steps`` client steps, and covers the last ``ema_span``.
    """

    fedphd_version: str
    topology: str
    frechet_distance: float | None
    evaluation: EvaluationRecord | None
    evaluations: list[EvaluationRecord]
    parameters: Change
    macs: Change
    pruning: PruneReport | None
    bytes: LinkBytes
    client_rounds: int
    training_cost: TrainingCost
    rounds: list[IntervalCosts]
    ema_steps: float = 0.0
    ema_span: float = 0.0
    client_statistics: StatisticsFigures | None = None
    partition: dict[str, Any] | None = None
    seconds: dict[str, float]

    def write(self, run_dir: Path) -> None:
        """Store it in a run's folder."""
        write_json(run_dir / SUMMARY, self.model_dump(mode="json"))

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Load what ``write`` stored; raises OSError, or ValueError if it is something else."""
        return cls.model_validate_json((run_dir / SUMMARY).read_text("utf-8"))
