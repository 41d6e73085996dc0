"""Comparisons, and folders of finished runs as the cloud would leave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedphd.common.events import EventLog, write_json
from fedphd.common.history.evaluation import Protocol, Quality
from fedphd.common.quality.evaluation import Evaluation
from fedphd.common.unet.costs import Costs
from fedphd.common.wire.traffic import Traffic
from fedphd.deploy.compare.budget import Budget
from fedphd.deploy.compare.comparison import Comparison
from fedphd.deploy.compare.methods import read_methods
from fedphd.deploy.compare.plan import CommonSettings, Plan, PlannedRun, plan_run
from fedphd.deploy.launch.runs import EVENTS, SIMULATION
from fedphd.server.report import Report
from fedphd.server.stats import IntervalStats
from fedphd.server.tracking import Trackers

ORIGIN = {"fedphd_version": "9.9", "commit": "abc123", "machine": "a test's"}
METHODS = read_methods()


def write_finished(
    run: PlannedRun,
    *,
    distances: Sequence[float | None],
    bytes_per_round: int = 1000,
    images_per_round: int = 60,
    macs: int = 100,
    parameters: int = 5,
    seconds: float = 60.0,
    brightness: int = 200,
    failures: Sequence[str] = (),
) -> None:
    """Write what ``run`` would leave with an evaluation before training and after each interval.

    Args:
        run: the planned run; its folder is made.
        distances: one per evaluation, the first before training.
        bytes_per_round: over the cloud's links in each cloud round.
        images_per_round: images that all clients trained on in a cloud round, with repeats.
        macs, parameters: of the network.
        seconds: the run's wall time.
        brightness: of the sampled images, 0 to 255.
        failures: who was left out of each cloud round, and why.
    """
    run.folder.mkdir(parents=True)
    write_json(run.folder / "config.json", run.config.model_dump(mode="json"))
    record = {"clients": run.clients.record(run.config), "origin": ORIGIN}
    write_json(run.folder / SIMULATION, record)
    events = EventLog(run.folder / EVENTS, role="cloud", node="cloud")
    costs = Costs(parameters=parameters, macs=macs)
    report = Report(run.folder, run.config.federation(), events, costs, Trackers({}, print))
    flat = run.config.topology == "flat"
    for interval, distance in enumerate(distances):
        if interval:
            stats = IntervalStats(interval=interval, images=images_per_round, client_rounds=3)
            moved = Traffic(sent_bytes=bytes_per_round if flat else 10 * bytes_per_round)
            stats.client_edge = moved
            stats.failures = [*failures]
            total = Traffic(sent_bytes=bytes_per_round * interval)
            report.interval(stats, sparse=False, edge_cloud=total)
        report.evaluated(interval, evaluation(distance, brightness))
    report.summary(seconds)
    report.close()
    events.close()


def planned(common: CommonSettings, seeds: Sequence[int] = (0, 1)) -> list[PlannedRun]:
    """Runs of FedAvg and FedPhD, a seed's before the next one's."""
    return [
        plan_run(common, METHODS[name], seed) for seed in seeds for name in ("fedavg", "fedphd")
    ]


def comparison(
    common: CommonSettings, methods: Sequence[str], seeds: Sequence[int], **budget: Any
) -> Comparison:
    """A comparison by rounds, or as ``budget`` has the fields of ``Plan``."""
    asked = {"budget": Budget.rounds, "cloud_bytes": None, **budget}
    plan = Plan(methods=[*methods], seeds=[*seeds], common=common.fixed(), **asked)
    return Comparison(common, METHODS, plan.extending(common.out))


def evaluation(distance: float | None, brightness: int) -> Evaluation:
    """An evaluation of four images of one brightness."""
    return Evaluation(
        samples=torch.full((4, 1, 8, 8), brightness, dtype=torch.uint8),
        quality=Quality(frechet_distance=distance),
        raw=None,
        protocol=Protocol(
            features="classifier(digits)",
            num_samples=4,
            sampler="DDIM",
            sampling_steps=2,
            seed=1234,
        ),
        seconds=0.5,
    )
