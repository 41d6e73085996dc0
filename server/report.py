"""What a run leaves behind: events, sample grids, the summary, and what trackers get."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fedphd.common.config.run import FederationConfig
from fedphd.common.data.partition import PARTITION_FILE
from fedphd.common.errors import FedPhDError
from fedphd.common.events import EventLog
from fedphd.common.history.events import (
    Drawn,
    Evaluated,
    IntervalEnded,
    Pruned,
    Said,
    StatisticsCollected,
    StatisticsFigures,
    Working,
)
from fedphd.common.history.progress import Reported
from fedphd.common.history.summary import (
    SAMPLES,
    SUMMARY,
    Change,
    IntervalCosts,
    LinkBytes,
    Summary,
    TrainingCost,
)
from fedphd.common.quality.evaluation import Evaluation
from fedphd.common.quality.sampling import save_grid
from fedphd.common.unet.costs import (
    ENCODER_PASSES,
    FLOPS_CONVENTION,
    Costs,
    PruneReport,
    training_flops,
)
from fedphd.common.wire.messages import PACKAGE_VERSION
from fedphd.common.wire.metrics import MetricValues
from fedphd.common.wire.traffic import Traffic
from fedphd.server.census import MOST_NAMES, remember
from fedphd.server.statistics import ClientStatistics
from fedphd.server.stats import IntervalStats
from fedphd.server.tracking import Trackers

FLOAT_BYTES = 4
WORKING_S = 5.0


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turn what keeps ``path`` from being written into a FedPhDError that says it."""
    try:
        yield
    except OSError as error:
        raise FedPhDError(f"{path} cannot be written: {error.strerror}; make room there") from error


class Report:
    """Writes a run's folder while it runs.

    Args:
        costs: those of the dense U-Net.
        trackers: that follow the run; ``close`` closes them.
        resumed: what was gathered before the run was resumed.
    """

    def __init__(
        self,
        run_dir: Path,
        config: FederationConfig,
        events: EventLog,
        costs: Costs,
        trackers: Trackers,
        resumed: Reported | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._events = events
        self._trackers = trackers
        self._working, self._silent_until_s = "", 0.0
        self._so_far = resumed or Reported(dense=costs, costs=costs)
        # Bytes of the edges' links in this process count on from there.
        self._cloud_before = self._so_far.cloud
        self._finished = False

    @property
    def so_far(self) -> Reported:
        """All that was gathered, for a run that goes on later."""
        return self._so_far

    def message(self, text: str) -> None:
        """Say something to people."""
        self._events.write(Said(text=text))

    def working(self, what: str, done: int, total: int) -> None:
        """Say how far something is that takes long, seldom; as a ``working.Listener``."""
        now_s = time.monotonic()
        # Its beginning and its end in any case.
        if now_s >= self._silent_until_s or what != self._working or done >= total:
            self._working, self._silent_until_s = what, now_s + WORKING_S
            self._events.write(Working(what=what, done=done, total=total))

    def spent(self, phase: str, seconds: float) -> None:
        """Add wall time to a phase of the run."""
        self._so_far.phases[phase] = self._so_far.phases.get(phase, 0.0) + seconds

    def interval(self, stats: IntervalStats, *, sparse: bool, edge_cloud: Traffic) -> None:
        """Record a finished interval; ``edge_cloud`` counts from the run's start."""
        so_far = self._so_far
        passes = ENCODER_PASSES.get(self._config.objective.method, 0)
        flops = training_flops(so_far.costs, stats.images, encoder_passes=passes)
        before = so_far.cloud
        so_far.rounds.append(
            IntervalCosts(
                interval=stats.interval,
                client_rounds=stats.client_rounds,
                **self._moved(stats.client_edge, edge_cloud),
                images=stats.images,
                training_flops=flops,
            )
        )
        remember(so_far.trained, stats.clients)
        self._note_failing(stats)
        self.spent("sparse_training" if sparse else "training", stats.seconds)
        so_far.intervals_s += stats.seconds
        so_far.ema_steps, so_far.ema_span = stats.ema_steps, stats.ema_span
        intervals = self._config.schedule.intervals
        # Waits for evaluations between intervals come again, too.
        took_s = so_far.intervals_s + so_far.phases.get("waiting_for_evaluation", 0.0)
        ended = IntervalEnded(
            **stats.model_dump(exclude={"metrics", "failed_before"}),
            **stats.metrics.values(),
            sparse=sparse,
            intervals=intervals,
            parameters=so_far.costs.parameters,
            macs=so_far.costs.macs,
            client_edge_bytes=so_far.client_edge.total_bytes,
            edge_cloud_bytes=so_far.cloud.total_bytes,
            training_flops=flops,
            left_s=(intervals - stats.interval) * took_s / len(so_far.rounds),
            edge_cloud=so_far.cloud.minus(before),
        )
        self._events.write(ended)
        self._track(ended)

    def _note_failing(self, stats: IntervalStats) -> None:
        """Remember who was left out and has not trained yet, and what is known of the reason."""
        why = {name: text for name, _, text in (one.partition(": ") for one in stats.failures)}
        left_out = {name for edge in stats.edges.values() for one in edge.left_out for name in one}
        left_out |= stats.failed_before
        failing = self._so_far.failing | {name: why.get(name, "") for name in sorted(left_out)}
        never = {name: text for name, text in failing.items() if name not in self._so_far.trained}
        self._so_far.failing = dict(islice(never.items(), MOST_NAMES))

    def never_trained(self) -> None:
        """Say which clients were asked, and never trained; a run ends well without them."""
        failing = self._so_far.failing
        if failing:
            named = [f"{name} ({text})" if text else name for name, text in sorted(failing.items())]
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            self.message(f"never trained: {', '.join(named[:3])}{more}")

    def _track(self, ended: IntervalEnded) -> None:
        """An interval's numbers for the trackers."""
        names = ("mean_steps", "ema_span", "num_samples", "seconds", *MetricValues.model_fields)
        found = {f"interval/{name}": getattr(ended, name) for name in names}
        # Validated are the weights that the previous interval ended with; 0: the initial.
        validation = found.pop("interval/validation_loss")
        if validation is not None:
            self._trackers.numbers({"interval/validation_loss": validation}, ended.interval - 1)
        values = {
            **{name: value for name, value in found.items() if value is not None},
            **{f"edge_weight/{edge}": share for edge, share in ended.edge_weights.items()},
            **{f"edge_homogeneity/{edge}": score for edge, score in ended.edge_homogeneity.items()},
            "bytes/client_edge": ended.client_edge_bytes,
            "bytes/edge_cloud": ended.edge_cloud_bytes,
            "network/parameters": ended.parameters,
            "cost/training_flops": self._training_flops,
        }
        self._trackers.numbers(values, ended.interval)

    def client_statistics(self, result: ClientStatistics, *, edge_cloud: Traffic) -> None:
        """Record that the clients gave the reference; ``edge_cloud`` as in ``interval``."""
        self.spent("client_statistics", result.seconds)
        figures = StatisticsFigures(
            num_images=result.statistics.count,
            label_counts=list(result.statistics.label_counts),
            clients=result.clients,
            failures=result.failures,
            **self._moved(result.client_edge, edge_cloud),
        )
        self._so_far.client_statistics = figures
        self._events.write(StatisticsCollected(**figures.model_dump(), seconds=result.seconds))

    @property
    def _training_flops(self) -> float:
        return float(sum(row.training_flops for row in self._so_far.rounds))

    def _moved(self, from_clients: Traffic, edge_cloud: Traffic) -> dict[str, int]:
        """Add to the links' totals; return what each moved since the last time, in bytes."""
        before = self._so_far.client_edge.total_bytes, self._so_far.cloud.total_bytes
        # In a flat federation the clients are at the cloud.
        if self._config.topology == "flat":
            self._so_far.cloud += from_clients
        else:
            self._so_far.client_edge += from_clients
            self._so_far.cloud = self._cloud_before + edge_cloud
        return {
            "client_edge_bytes": self._so_far.client_edge.total_bytes - before[0],
            "edge_cloud_bytes": self._so_far.cloud.total_bytes - before[1],
        }

    def pruned(self, interval: int, report: PruneReport) -> None:
        """Record that the U-Net got smaller after ``interval``."""
        self._so_far.pruning, self._so_far.costs = report, report.after
        self._events.write(Pruned(interval=interval, **report.model_dump()))

    def evaluated(
        self,
        interval: int,
        result: Evaluation,
        gpu_memory: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Record an evaluation, and draw its grid of samples; ``gpu_memory`` as in its event."""
        record = result.record(interval)
        self._so_far.evaluations.append(record)
        what = f"after interval {interval}" if interval else "before training"
        evaluated = Evaluated(
            what=what, weights="ema", gpu_memory=dict(gpu_memory), **record.model_dump()
        )
        self._events.write(evaluated)
        grid = self._save_grids(interval, result.samples)
        values = {
            f"{prefix}/{name}": value
            for prefix, quality in (("quality", result.quality), ("quality_raw", result.raw))
            for name, value in (quality.model_dump().items() if quality else ())
            if isinstance(value, float)
        }
        shares = enumerate(result.quality.class_shares or ())
        values |= {f"class_share/{label}": share for label, share in shares}
        distances = enumerate(result.quality.class_distances or ())
        values |= {f"class_distance/{label}": d for label, d in distances if d is not None}
        self._trackers.numbers(values, interval)
        self._trackers.picture(grid, interval)

    def drawn(self, interval: int, samples: Tensor) -> None:
        """Draw samples that are not measured, (N, C, H, W), uint8, and say where they are."""
        self._save_grids(interval, samples)
        self._events.write(Drawn(interval=interval, path=str(self._run_dir / SAMPLES)))

    def _save_grids(self, interval: int, samples: Tensor) -> Path:
        rows = self._config.evaluation.grid_rows
        grid = self._run_dir / "grids" / f"interval-{interval:04d}.png"
        for path in (grid, self._run_dir / SAMPLES):
            with _written(path):
                save_grid(samples, path, rows)
        return grid

    def summary(self, seconds: float) -> Summary:
        """Write ``summary.json`` and return it."""
        so_far = self._so_far
        last = so_far.evaluations[-1] if so_far.evaluations else None
        client_rounds = sum(row.client_rounds for row in so_far.rounds)
        moved = so_far.cloud.total_bytes
        # Flat FedAvg: each client sends and receives the dense model over the cloud's links in
        # every round in which it trains (the comparison of arXiv:2507.06449, section V). With the
        # local work of an interval in one go it does so once where edges have several rounds.
        flat_bytes = 2 * client_rounds * so_far.dense.parameters * FLOAT_BYTES
        equal_bytes = flat_bytes // self._config.schedule.edge_rounds
        summary = Summary(
            fedphd_version=PACKAGE_VERSION,
            topology=self._config.topology,
            frechet_distance=last.frechet_distance if last else None,
            evaluation=last,
            evaluations=so_far.evaluations,
            parameters=Change(before=so_far.dense.parameters, after=so_far.costs.parameters),
            macs=Change(before=so_far.dense.macs, after=so_far.costs.macs),
            pruning=so_far.pruning,
            bytes=LinkBytes(
                client_edge=so_far.client_edge.total_bytes,
                edge_cloud=moved,
                flat_fedavg_client_cloud=flat_bytes,
                cloud_saving=1 - moved / flat_bytes if flat_bytes else None,
                flat_fedavg_equal_cloud_rounds=equal_bytes,
                cloud_saving_equal_cloud_rounds=1 - moved / equal_bytes if equal_bytes else None,
            ),
            client_rounds=client_rounds,
            training_cost=TrainingCost(
                flops=self._training_flops,
                images=sum(row.images for row in so_far.rounds),
                convention=FLOPS_CONVENTION,
            ),
            rounds=so_far.rounds,
            ema_steps=so_far.ema_steps,
            ema_span=so_far.ema_span,
            client_statistics=so_far.client_statistics,
            partition=self._partition(),
            seconds={**{k: round(v, 2) for k, v in so_far.phases.items()}, "total": seconds},
        )
        with _written(self._run_dir / SUMMARY):
            summary.write(self._run_dir)
        self._finished = True
        return summary

    def _partition(self) -> dict[str, Any] | None:
        """How the clients share a data set, where a launcher that cut it says so."""
        path = self._run_dir / PARTITION_FILE
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else None

    def close(self) -> None:
        """Let the trackers finish."""
        self._trackers.close(finished=self._finished)
