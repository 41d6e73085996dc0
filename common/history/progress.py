"""How far a run is: what its checkpoint holds beside the weights, so that it can go on."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from fedphd.common.config.roles import explain
from fedphd.common.errors import ConfigError
from fedphd.common.history.evaluation import EvaluationRecord
from fedphd.common.history.events import StatisticsFigures
from fedphd.common.history.summary import IntervalCosts
from fedphd.common.unet.checkpoint import kept_checkpoints, read_state, update_state
from fedphd.common.unet.costs import Costs, PruneReport
from fedphd.common.wire.traffic import Traffic


class Reported(BaseModel):
    """What ``server/report.py: Report`` has gathered; times in seconds.

    Bytes count from the run's start, over all its processes; ``elapsed_s`` likewise. ``trained``
    are the clients that did, ``failing`` what is known of those that did not, by name.
    """

    dense: Costs
    costs: Costs
    client_edge: Traffic = Traffic()
    cloud: Traffic = Traffic()
    evaluations: list[EvaluationRecord] = Field(default_factory=list)
    pruning: PruneReport | None = None
    phases: dict[str, float] = Field(default_factory=dict)
    intervals_s: float = 0.0
    rounds: list[IntervalCosts] = Field(default_factory=list)
    client_statistics: StatisticsFigures | None = None
    ema_steps: float = 0.0
    ema_span: float = 0.0
    trained: set[str] = Field(default_factory=set)
    failing: dict[str, str] = Field(default_factory=dict)


class Progress(BaseModel):
    """The content of a checkpoint's ``state.json``.

    Attributes:
        interval: number of finished intervals, of ``intervals``.
        run: name of the run, drawn once; clients keep their state under it.
        resumed: of each time that the run was resumed, after how many intervals it went on; also
            where that came to no interval.
        events: events of the cloud by then; later ones in the log are of work that was lost, but
            for those of ``reported.evaluations``, which come beside the next interval.
        elapsed_s: wall time of all processes so far.
        num_clients: over so many SCAFFOLD's variate is a mean; None in older checkpoints.
    """

    interval: int
    intervals: int
    ema_steps: float
    config: dict[str, Any]
    run: str
    resumed: tuple[int, ...]
    events: int
    elapsed_s: float
    reported: Reported
    num_clients: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _counted_only(cls, state: Any) -> Any:
        """Older checkpoints say only how often the run was resumed."""
        if not isinstance(state, dict) or "resumed" in state:
            return state
        interval, times = state.get("interval"), state.get("attempt")
        # Anything else is an error, and said by the field's own check.
        return {**state, "resumed": [interval] * times} if isinstance(times, int) else state

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """The progress in a checkpoint; raises ConfigError if it is damaged, or is not there."""
        return cls.of(read_state(checkpoint), checkpoint)

    @classmethod
    def of(cls, state: dict[str, Any], checkpoint: Path) -> Self:
        """The progress that the ``state`` of ``checkpoint`` is; raises ConfigError."""
        try:
            return cls.model_validate(state)
        except ValidationError as error:
            text = explain(cls, error, f"checkpoint {checkpoint}")
            raise ConfigError(f"{text}\n  it cannot be resumed; start a new run") from error

    def next_attempt(self, checkpoint: Path) -> None:
        """Count a resumption, in the checkpoint too, before anybody works for it.

        If it counted with its first interval only, one that ends before that would be followed by
        one of the same number, and whoever had worked for the first would go on where it was. So it
        counts in the checkpoints of intervals before too, which may take this one's place.

        Raises FedPhDError if it cannot be written.
        """
        self.resumed += (self.interval,)
        update_state(checkpoint, self.model_dump(mode="json"))
        for past in kept_checkpoints(checkpoint):
            # One that is damaged is of no use to anybody.
            with suppress(ConfigError):
                update_state(past, read_state(past) | {"resumed": self.resumed})
