"""What a run's folder says about an evaluation and about the run's costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.disk import files_limited_to
from support.metrics import metrics
from support.tiny import events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedphd.common.config.run import FederationConfig
from fedphd.common.config.tracking import TrackingConfig
from fedphd.common.errors import FedPhDError
from fedphd.common.events import EventLog
from fedphd.common.history.evaluation import Anchors, Protocol, Quality
from fedphd.common.history.events import EdgeFigures
from fedphd.common.quality.evaluation import Evaluation
from fedphd.common.quality.moments import FeatureStatistics
from fedphd.common.unet.costs import Costs, PruneReport
from fedphd.common.wire.traffic import Traffic
from fedphd.common.working import Steps, telling, tracked
from fedphd.server.report import Report
from fedphd.server.statistics import ClientStatistics
from fedphd.server.stats import IntervalStats
from fedphd.server.tracking import Followed, Trackers

DENSE = Costs(parameters=10, macs=1000, encoder_macs=300)
PRUNED = Costs(parameters=5, macs=600, encoder_macs=200)
QUALITY = Quality(
    frechet_distance=12.5, kernel_distance=0.5, kernel_distance_std=0.1, precision=0.75,
    recall=0.25, class_shares=(0.9, 0.1), least_class=1, least_class_ratio=0.2,
)  # fmt: skip
PROTOCOL = Protocol(
    features="classifier(digits)", num_samples=4, sampler="DDIM", sampling_steps=5, seed=6,
    num_reference_images=7, reference_sha256="ab", neighbours=3, manifold_images=4,
)  # fmt: skip
EVALUATION = Evaluation(
    samples=torch.zeros(4, 1, 8, 8, dtype=torch.uint8), quality=QUALITY,
    raw=QUALITY.model_copy(update={"frechet_distance": 20.0}), protocol=PROTOCOL, seconds=1.5,
    anchors=Anchors(real=2.0, one_class_missing=9.0),
)  # fmt: skip

PRUNE_REPORT = PruneReport(
    requested_ratio=0.5, achieved_ratio=0.5, achieved_ratios=(0.5,), widths_before=(8,),
    widths_after=(4,), before=DENSE, after=PRUNED,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run with three intervals, pruned after the second."""
    return write_run(tmp_path, '{"topology": "hierarchical"}')


def write_run(tmp_path: Path, settings: str) -> Path:
    """Three intervals, pruned after the second."""
    config = FederationConfig.model_validate_json(settings)
    log = EventLog(tmp_path / "metrics.jsonl", role="cloud", node="cloud")
    run = Followed(name="r", run_dir=tmp_path, out_dir=tmp_path, settings={})
    report = Report(tmp_path, config, log, DENSE, Trackers.of(TrackingConfig(), run, print))
    asked = ClientStatistics(
        FeatureStatistics.zeros(2, 2), ["client-0"], ["client-1: late"], Traffic(sent_bytes=3), 0.5
    )
    report.client_statistics(asked, edge_cloud=Traffic(received_bytes=10))
    for interval, edge_cloud in ((1, 110), (2, 310), (3, 360)):
        stats = IntervalStats(
            interval=interval,
            metrics=metrics(validation_loss=1.0 / interval),
            images=20,
            client_rounds=4,
            client_edge=Traffic(sent_bytes=1000 * interval),
            ema_steps=10.0 * interval,
            ema_span=1.5 * interval,
        )
        moved = Traffic(sent_bytes=edge_cloud - 10, received_bytes=10)
        report.interval(stats, sparse=False, edge_cloud=moved)
        if interval == 2:
            report.pruned(2, PRUNE_REPORT)
    report.evaluated(3, EVALUATION)
    report.summary(seconds=9.0)
    report.close()
    log.close()
    return tmp_path


def test_who_never_trained_is_said_with_the_reason(tmp_path: Path) -> None:
    config = FederationConfig.model_validate({"schedule": {"intervals": 5}})
    log = EventLog(tmp_path / "metrics.jsonl", role="cloud", node="cloud")
    run = Followed(name="r", run_dir=tmp_path, out_dir=tmp_path, settings={})
    report = Report(tmp_path, config, log, DENSE, Trackers.of(TrackingConfig(), run, print))
    rounds = [
        (["a"], ["b", "c", "d"], ["b: late", "c: disk full: 3 MB", "something else"]),
        (["b"], ["a"], ["a: late"]),
    ]
    for interval, (clients, left_out, failures) in enumerate(rounds, start=1):
        edges = {"edge-0": EdgeFigures(left_out=[left_out])}
        stats = IntervalStats(interval=interval, clients=clients, failures=failures, edges=edges)
        report.interval(stats, sparse=False, edge_cloud=Traffic())
    report.never_trained()
    report.close()
    log.close()
    said = [event["text"] for event in lines(tmp_path) if event["event"] == "message"]
    assert said == ["never trained: c (disk full: 3 MB), d"]


def test_what_cannot_be_written_is_named(folder: Path) -> None:
    log = EventLog(folder / "more.jsonl", role="cloud", node="cloud")
    report = Report(folder, FederationConfig(), log, DENSE, Trackers({}, print))
    samples = torch.randint(0, 255, (64, 1, 8, 8), dtype=torch.uint8)
    grid = folder / "grids" / "interval-0009.png"
    with files_limited_to(300):
        with pytest.raises(FedPhDError, match=f"{grid} cannot be written: File too large"):
            report.drawn(9, samples)
        with pytest.raises(FedPhDError, match=r"summary\.json cannot be written: File too large"):
            report.summary(1.0)
    log.close()


def test_names_without_number_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("census", "report"):
        monkeypatch.setattr(f"fedphd.server.{module}.MOST_NAMES", 3)
    log = EventLog(tmp_path / "metrics.jsonl", role="cloud", node="cloud")
    report = Report(tmp_path, FederationConfig(), log, DENSE, Trackers({}, print))
    for interval in (1, 2):
        names = [f"{interval}-{number}" for number in range(2)]
        edges = {"edge-0": EdgeFigures(left_out=[[f"left-{name}" for name in names]])}
        stats = IntervalStats(interval=interval, clients=names, edges=edges)
        report.interval(stats, sparse=False, edge_cloud=Traffic())
    log.close()
    assert report.so_far.trained == {"1-0", "1-1", "2-0"}
    assert list(report.so_far.failing) == ["left-1-0", "left-1-1", "left-2-0"]


def test_time_left_counts_waits_for_evaluations_too(tmp_path: Path) -> None:
    config = FederationConfig.model_validate({"schedule": {"intervals": 5}})
    log = EventLog(tmp_path / "metrics.jsonl", role="cloud", node="cloud")
    run = Followed(name="r", run_dir=tmp_path, out_dir=tmp_path, settings={})
    report = Report(tmp_path, config, log, DENSE, Trackers.of(TrackingConfig(), run, print))
    for interval, waited_s in ((1, 0.0), (2, 6.0)):
        report.spent("waiting_for_evaluation", waited_s)
        stats = IntervalStats(interval=interval, seconds=10.0)
        report.interval(stats, sparse=False, edge_cloud=Traffic())
    report.close()
    log.close()
    told = [event["left_s"] for event in lines(tmp_path) if event["event"] == "interval"]
    # Four times 10 s; three times the mean of 10 and 16 s.
    assert told == [40.0, 39.0]


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return content


def test_an_evaluation_is_told_whole_with_its_protocol(folder: Path) -> None:
    expected = {
        "interval": 3, "frechet_distance": 12.5, "kernel_distance": 0.5,
        "kernel_distance_std": 0.1, "inception_score": None, "precision": 0.75, "recall": 0.25,
        "class_shares": [0.9, 0.1], "least_class": 1, "least_class_ratio": 0.2,
        "features": "classifier(digits)", "num_samples": 4, "sampler": "DDIM",
        "sampling_steps": 5, "seed": 6, "num_reference_images": 7, "reference_sha256": "ab",
        "neighbours": 3, "manifold_images": 4, "guidance": None, "seconds": 1.5,
        "class_distances": None, "class_coverages": None,
        "anchors": {"real": 2.0, "one_class_missing": 9.0, "half_of_the_classes": None},
    }  # fmt: skip
    told = summary(folder)["evaluation"]
    raw = told.pop("raw")
    assert told == expected
    assert (raw["frechet_distance"], raw["precision"]) == (20.0, 0.75)
    (event,) = [e for e in lines(folder) if e["event"] == "evaluated"]
    assert {key: event[key] for key in expected} == expected
    assert (event["weights"], event["raw"]["frechet_distance"]) == ("ema", 20.0)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The run's events."""
    return events(folder / "metrics.jsonl")


def test_tensorboard_gets_every_number(folder: Path) -> None:
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    values = {tag: board.Scalars(tag)[-1].value for tag in board.Tags()["scalars"]}
    for tag, value in {
        "quality/frechet_distance": 12.5, "quality/kernel_distance": 0.5,
        "quality/precision": 0.75, "quality/recall": 0.25, "quality/least_class_ratio": 0.2,
        "quality_raw/frechet_distance": 20.0, "class_share/0": 0.9, "class_share/1": 0.1,
        "cost/training_flops": 312_000,
    }.items():  # fmt: skip
        assert values[tag] == pytest.approx(value), tag
    # Told with the interval that begins with the weights, drawn where they were reached.
    validation = board.Scalars("interval/validation_loss")
    assert [(point.step, point.value) for point in validation] == [
        (0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3)),
    ]  # fmt: skip


def test_costs_per_round_and_link(folder: Path) -> None:
    """Six operations per multiply-accumulate and image: 6 x 1000 x 20, later 6 x 600 x 20."""
    rows = summary(folder)["rounds"]
    assert [row["training_flops"] for row in rows] == [120_000, 120_000, 72_000]
    assert [row["client_edge_bytes"] for row in rows] == [1000, 2000, 3000]
    # The edges' count runs from the start of the run.
    assert [row["edge_cloud_bytes"] for row in rows] == [100, 200, 50]
    told = [e["edge_cloud"] for e in lines(folder) if e["event"] == "interval"]
    assert told == [{"sent_bytes": size, "received_bytes": 0} for size in (100, 200, 50)]
    asked = summary(folder)["client_statistics"]
    assert (asked["client_edge_bytes"], asked["edge_cloud_bytes"]) == (3, 10)
    assert asked["failures"] == ["client-1: late"]
    assert summary(folder)["bytes"]["client_edge"] == 6003
    assert summary(folder)["bytes"]["edge_cloud"] == 360
    cost = summary(folder)["training_cost"]
    assert (cost["flops"], cost["images"]) == (312_000, 60)
    assert cost["convention"].startswith("3 x 2 x MACs x images")


def test_both_comparisons_of_bytes_have_their_names(folder: Path) -> None:
    """Three intervals of four clients' rounds, five edge rounds each: 10 floats there and back."""
    moved = summary(folder)["bytes"]
    assert moved["flat_fedavg_client_cloud"] == 2 * 12 * 40
    assert moved["cloud_saving"] == pytest.approx(1 - 360 / 960)
    assert moved["flat_fedavg_equal_cloud_rounds"] == 192
    assert moved["cloud_saving_equal_cloud_rounds"] == pytest.approx(1 - 360 / 192)


def test_the_summary_says_what_the_moving_average_covers(folder: Path) -> None:
    assert (summary(folder)["ema_steps"], summary(folder)["ema_span"]) == (30.0, 4.5)


def test_moons_further_passes_are_counted(tmp_path: Path) -> None:
    """Two more passes of 300 and later 200 multiply-accumulates: 4 x 300 x 20, 4 x 200 x 20."""
    write_run(tmp_path, '{"topology": "flat", "objective": {"method": "moon"}}')
    rows = summary(tmp_path)["rounds"]
    assert [row["training_flops"] for row in rows] == [144_000, 144_000, 88_000]


def test_long_work_is_told_at_its_beginning_and_end_and_seldom_between(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "metrics.jsonl", role="cloud", node="cloud")
    report = Report(tmp_path, FederationConfig(), log, DENSE, Trackers({}, print))
    with telling(report.working):
        for _ in tracked(range(1000), "sampling", 1000):
            pass
        Steps("features", 2)
    report.close()
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    told = [(e["what"], e["done"], e["total"]) for e in map(json.loads, lines)]
    assert told == [("sampling", 0, 1000), ("sampling", 1000, 1000), ("features", 0, 2)]
