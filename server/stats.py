"""What the cloud knows of an interval that is done, and what it is where nobody trained in it."""

from collections.abc import Sequence

from pydantic import Field

from fedphd.common.history.events import IntervalFigures
from fedphd.common.wire.metrics import TrainMetrics


class IntervalStats(IntervalFigures):
    """An interval's figures; the validation loss is of the weights that it began with.

    ``failed_before`` are clients that were left out of tries in which nobody trained.
    """

    metrics: TrainMetrics = TrainMetrics()
    failed_before: set[str] = Field(default_factory=set)

    def add_tries(self, tries: Sequence[IntervalFigures]) -> None:
        """Add what failed, and what went over the links, in tries in which nobody trained."""
        self.failures = [text for vain in tries for text in vain.failures] + self.failures
        for vain in tries:
            self.client_edge += vain.client_edge
            for kind, number in vain.failed.items():
                self.failed[kind] = self.failed.get(kind, 0) + number
            for edge in vain.edges.values():
                self.failed_before.update(*edge.left_out)


class NobodyTrained(Exception):  # noqa: N818 - the interval is run again
    """No client trained in an interval: there is nothing to average, and it does not count.

    ``tries`` counts how often that was so in a row, this one among them.
    """

    def __init__(self, stats: IntervalStats, tries: int) -> None:
        super().__init__(f"no client trained in interval {stats.interval}")
        self.stats, self.tries = stats, tries
