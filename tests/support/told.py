"""The folder of a run with everything that a page can show, as cloud and edges would leave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.data.partition import PARTITION_FILE
from fedphd.common.events import EventLog, Verdict, write_json, write_verdict
from fedphd.common.history.evaluation import Anchors, Protocol, Quality
from fedphd.common.history.events import EdgeFigures, Ended, PeerChanged, RoundEnded, Started
from fedphd.common.quality.evaluation import Evaluation
from fedphd.common.unet.costs import Costs, LayerChange, PruneReport
from fedphd.common.wire.metrics import Mean, TrainMetrics
from fedphd.common.wire.traffic import Traffic
from fedphd.deploy.launch.runs import CLIENTS, CONFIG, EVENTS, VERDICT
from fedphd.server.report import Report
from fedphd.server.stats import IntervalStats
from fedphd.server.tracking import Trackers

FINISHED = Verdict()
DENSE, PRUNED = Costs(parameters=1000, macs=8000), Costs(parameters=600, macs=5000)
LAYERS = (
    LayerChange(name="conv_in", channels=(32, 24), parameters=(320, 240), macs=(700, 500)),
    LayerChange(name="up_blocks.0.conv", channels=(64, 48), parameters=(440, 260), macs=(1, 1)),
    LayerChange(name="mid_block.conv", channels=(64, 48), parameters=(240, 100), macs=(1, 1)),
)
SETTINGS: dict[str, Any] = {
    "num_classes": 4,
    "schedule.intervals": 3,
    "schedule.edge_rounds": 2,
    "pruning.sparse_rounds": 2,
    "evaluation.reference": None,
}
DISTANCES = (300.0, 80.0, 60.0, 20.0)
# By interval: at each edge, by edge round, who trained; client-2 was left out of one of edge-1's.
TRAINED: dict[int, dict[str, list[list[str]]]] = {
    1: {"edge-0": [["client-0", "client-1"], ["client-0"]], "edge-1": [[], ["client-1"]]},
    2: {"edge-0": [["client-0"], []], "edge-1": [["client-1"], ["client-0", "client-2"]]},
    3: {"edge-0": [["client-0"], ["client-2"]], "edge-1": [["client-1", "client-2"], []]},
}
LEFT_OUT = {(1, "edge-1"): [["client-2"], []]}


def write_told(folder: Path, *, intervals: int = 3, verdict: Verdict | None = FINISHED) -> Path:
    """Write a run of which ``intervals`` of 3 are done, each evaluated; returns ``folder``."""
    config = load_config(CloudConfig, None, SETTINGS)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config.model_dump(mode="json"))
    write_json(folder / PARTITION_FILE, {"name": "digits-split-7f", "sizes": [10, 20, 30]})
    write_json(folder / CLIENTS, {"data.source": "digits"})
    log = EventLog(folder / EVENTS, role="cloud", node="cloud")
    log.write(Started(pid=1, origin={"fedphd_version": "9.9", "commit": "abc123"}))
    for name in TRAINED[1]:
        log.write(PeerChanged(peer=name, change="joined", detail=""))
        log.write(PeerChanged(peer=name, change="serves", detail="client-0,client-1,client-2"))
    report = Report(folder, config.federation(), log, DENSE, Trackers({}, print))
    report.evaluated(0, evaluation(0))
    for interval in range(1, intervals + 1):
        _write_interval(report, folder, interval)
        if interval == 1:
            report.pruned(1, prune_report())
        report.evaluated(interval, evaluation(interval))
    if verdict is not None:
        if not verdict.exit_code:
            report.spent("waiting_for_evaluation", 1.5)
            report.summary(seconds=75.0)
        log.write(Ended(exit_code=verdict.exit_code, message=verdict.message))
        write_verdict(folder / VERDICT, verdict)
    report.close()
    log.close()
    return folder


def _write_interval(report: Report, folder: Path, interval: int) -> None:
    trained = TRAINED[interval]
    none = [[] for _ in range(2)]
    edges = {
        edge: EdgeFigures(
            trained=rounds,
            left_out=LEFT_OUT.get((interval, edge), none),
            label_distribution=[0.4, 0.3, 0.2, 0.1] if edge == "edge-0" else [0.25] * 4,
        )
        for edge, rounds in trained.items()
    }
    means = {"loss": 0.5 / interval, "validation_loss": 0.6 / interval}
    stats = IntervalStats(
        interval=interval,
        images=60,
        client_rounds=sum(len(names) for rounds in trained.values() for names in rounds),
        client_edge=Traffic(sent_bytes=9000),
        edges=edges,
        edge_weights={"edge-0": 0.75, "edge-1": 0.25},
        edge_homogeneity={"edge-0": 0.9, "edge-1": 1.0},
        failures=["client-2: reply <b>late</b>"] if interval == 1 else [],
        seconds=20.0,
        metrics=TrainMetrics(**{n: Mean(total=v, weight=1.0) for n, v in means.items()}),
    )
    report.interval(stats, sparse=interval == 1, edge_cloud=Traffic(sent_bytes=4000 * interval))
    for edge, rounds in trained.items():
        log = EventLog(folder / "state" / edge / "events.jsonl", role="edge", node=edge)
        for number, names in enumerate(rounds, 1):
            log.write(_round(interval, number, names))
        log.close()


def _round(interval: int, number: int, names: list[str]) -> RoundEnded:
    return RoundEnded(
        interval=interval, edge_round=number, round=2 * (interval - 1) + number, rounds=6,
        clients=names, num_samples=20, label_distribution=[0.25] * 4, failures=[], sent_bytes=0,
        received_bytes=0, seconds=5.0, left_s=0.0, loss=0.4 if names else None,
    )  # fmt: skip


def evaluation(interval: int) -> Evaluation:
    """Four samples, the brighter the later."""
    samples = torch.full((4, 1, 8, 8), 60 * interval, dtype=torch.uint8)
    samples[:, :, 2:6, 2:6] = 255
    return Evaluation(
        samples=samples,
        quality=Quality(
            frechet_distance=DISTANCES[interval], class_shares=(0.4, 0.3, 0.2, 0.1),
            least_class=3, least_class_ratio=0.4,
            class_distances=(30.0, 40.5, None, 70.0), class_coverages=(0.9, 0.75, None, 0.5),
        ),
        raw=Quality(frechet_distance=DISTANCES[interval] + 5),
        protocol=Protocol(
            features="classifier(digits)", num_samples=4, sampler="DDIM", sampling_steps=2,
            seed=1234, num_reference_images=30,
        ),
        seconds=0.5,
        anchors=Anchors(real=2.0, one_class_missing=9.0, half_of_the_classes=15.0),
    )  # fmt: skip


def prune_report() -> PruneReport:
    """From 1000 parameters to 600."""
    return PruneReport(
        requested_ratio=0.25, achieved_ratio=0.25, achieved_ratios=(0.25, 0.25),
        widths_before=(32, 64), widths_after=(24, 48), before=DENSE, after=PRUNED, layers=LAYERS,
    )  # fmt: skip
