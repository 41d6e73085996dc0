"""Events as people read them, and the file they are read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedphd.common.errors import ConfigError
from fedphd.common.history.events import Tail, read_event
from fedphd.common.history.summary import Summary
from fedphd.deploy.launch.render import human_bytes, human_seconds
from fedphd.deploy.launch.render import render as render_event
from fedphd.deploy.launch.render import render_summary as summary_text

ROUND: dict[str, Any] = {
    "event": "round", "node": "edge-0", "interval": 2, "edge_round": 3, "loss": 0.123456,
    "clients": ["client-0", "client-11"], "failures": [], "sent_bytes": 1_000_000,
    "received_bytes": 500_000, "seconds": 2.04, "left_s": 125.0, "round": 8, "rounds": 40,
    "num_samples": 60, "label_distribution": [0.5, 0.5],
}  # fmt: skip
INTERVAL: dict[str, Any] = {
    "event": "interval", "node": "cloud", "interval": 2, "intervals": 8, "loss": 0.5,
    "edge_weights": {"edge-0": 0.625, "edge-1": 0.375}, "parameters": 701_234,
    "edge_cloud_bytes": 12_345_678, "left_s": 30.0, "failures": [], "sparse": False,
    "macs": 1, "client_edge_bytes": 0, "training_flops": 0.0,
}  # fmt: skip


EVALUATED: dict[str, Any] = {
    "event": "evaluated", "node": "cloud", "what": "after interval 2", "weights": "ema",
    "features": "digits", "num_samples": 512, "sampler": "DDIM", "sampling_steps": 50, "seed": 1,
    "frechet_distance": 56.04, "seconds": 9.96,
}  # fmt: skip
SUMMARY: dict[str, Any] = {
    "fedphd_version": "1", "frechet_distance": None, "evaluation": None, "pruning": None,
    "client_rounds": 0, "training_cost": {"flops": 0, "images": 0, "convention": ""}, "rounds": [],
}  # fmt: skip


def render(values: dict[str, Any]) -> str | None:
    event = read_event(values)
    assert event is not None
    return render_event(event)


def render_summary(values: dict[str, Any]) -> str:
    return summary_text(Summary.model_validate({**SUMMARY, **values}))


def test_tail_gives_each_event_once_and_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert list(tail.new_lines()) == []
    path.write_text('{"event": "a"}\n{"event": ', encoding="utf-8")
    assert list(tail.new_lines()) == [{"event": "a"}]
    assert list(tail.new_lines()) == []
    with path.open("a", encoding="utf-8") as file:
        file.write('"b ü"}\n{"event": "c"}\n')
    assert list(tail.new_lines()) == [{"event": "b ü"}, {"event": "c"}]
    assert list(tail.new_lines()) == []


def test_tail_goes_on_where_a_reader_left_off(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(3)), encoding="utf-8")
    tail = Tail(path)
    assert next(tail.new_lines()) == {"n": 0}
    assert list(tail.new_lines()) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("cut", [b'{"event": "b", "ti', b"\0\0\0\n", b'{"event": "b"\n', b"[1]\n"])
def test_what_was_cut_at_the_end_of_a_log_is_passed_over(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "a"}\n' + cut)
    tail = Tail(path)
    assert list(tail.new_lines()) == [{"event": "a"}]
    assert list(tail.new_lines()) == []


@pytest.mark.parametrize("broken", [b"\0\0\0", b'{"event": "b"', b"[1]", b"\xff", b""])
def test_another_line_that_is_no_event_is_named(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "a"}\n{"event": "b"}\n' + broken + b'\n{"event": "c"}\n')
    tail = Tail(path)
    text = rf"^{path}, line 3: is not an event, .*; remove that line, or put the whole file back$"
    with pytest.raises(ConfigError, match=text):
        list(tail.new_lines())
    # So it stays, also for who had read the lines before.
    with pytest.raises(ConfigError, match=text):
        list(tail.new_lines())


def test_first_samples_are_one_line() -> None:
    drawn = {"event": "drawn", "node": "cloud", "interval": 1, "path": "runs/x/samples.png"}
    assert render(drawn) == "cloud     first samples, after interval 1: runs/x/samples.png"


@pytest.mark.parametrize("kind", ["working", "round_began", "replied"])
def test_what_only_a_picture_shows_is_no_line(kind: str) -> None:
    values = {"event": kind, "what": "sampling", "done": 1, "total": 2, "interval": 1,
              "edge_round": 1, "round": 1, "rounds": 2, "clients": [], "client": "client-0",
              "loss": None, "seconds": 1.0}  # fmt: skip
    assert render(values) is None


def test_round_is_one_line() -> None:
    assert render(ROUND) == (
        "edge-0    interval  2 round 3  loss 0.1235 | 2 clients (0,11) | 1.5 MB so far | 2.0 s | "
        "about 2 min 05 s left"
    )
    assert "loss 0.1235, validation before 0.2500 | 2 clients" in str(
        render({**ROUND, "validation_loss": 0.25})
    )
    assert "| 1 client (0) |" in str(render({**ROUND, "clients": ["client-0"]}))
    assert "| 2 clients (site-a, site-b) |" in str(
        render({**ROUND, "clients": ["site-a", "site-b"]})
    )
    failed = {**ROUND, "clients": [], "failures": ["client-0: late", "client-11: NaN"]}
    assert render(failed) == (
        "edge-0    interval  2 round 3  no client here, the model stays as it is | "
        "1.5 MB so far | 2.0 s | about 2 min 05 s left | without client-0: late; client-11: NaN"
    )


def test_interval_is_one_line() -> None:
    assert render(INTERVAL) == (
        "cloud     interval  2 of 8  loss 0.5000 | edges edge-0 62% edge-1 38% | "
        "0.70 M parameters | 12.3 MB edge-cloud | about 30 s left"
    )
    assert "loss 0.5000, validation before 0.2500 | edges" in str(
        render({**INTERVAL, "validation_loss": 0.25})
    )
    more = {**INTERVAL, "edge_weights": {}, "failures": ["edge-1: late"]}
    line = str(render(more))
    assert "| edges none |" in line
    assert line.endswith("about 30 s left | without edge-1: late")


def test_a_flat_federation_has_no_edges() -> None:
    assert render({**INTERVAL, "edge_weights": {"cloud": 1.0}}) == (
        "cloud     interval  2 of 8  loss 0.5000 | 0.70 M parameters | 12.3 MB client-cloud | "
        "about 30 s left"
    )


def test_summary_is_a_table() -> None:
    summary: dict[str, Any] = {
        "topology": "hierarchical",
        "parameters": {"before": 701_234, "after": 395_000},
        "macs": {"before": 12_000_000, "after": 6_700_000},
        "bytes": {
            "client_edge": 90_000_000, "edge_cloud": 12_000_000,
            "flat_fedavg_client_cloud": 100_000_000, "cloud_saving": 0.88,
            "flat_fedavg_equal_cloud_rounds": 20_000_000, "cloud_saving_equal_cloud_rounds": 0.4,
        },
        "ema_steps": 300.0, "ema_span": 33.3,
        "seconds": {"sparse_training": 185.0, "waiting_for_evaluation": 20.0},
        "evaluations": [
            {**EVALUATED, "frechet_distance": distance, "anchors": anchors}
            for distance, anchors in ((482.04, None), (None, None), (56.04, {
                "real": 2.04, "one_class_missing": 9.0, "half_of_the_classes": None,
            }))
        ],
    }  # fmt: skip
    quality = "482.0 -> 56.0 (features of digits, 512 samples, 50 DDIM steps, EMA weights)"
    assert render_summary(summary).split("\n") == [
        f"  Frechet distance   {quality}",
        "                     real images get 2.0, without one class 9.0",
        "  moving average     covers the last 33 of 300 client steps",
        "  parameters         0.70 M -> 0.40 M",
        "  MACs per image     12.00 M -> 6.70 M",
        "  bytes client-edge  90.0 MB",
        "  bytes edge-cloud   12.0 MB",
        "                     -40% against flat FedAvg in fp32, in as many cloud rounds (20.0 MB)",
        "                     -88% against flat FedAvg in fp32, at the cloud in every edge round "
        "(100.0 MB)",
        "  time               sparse training 3 min 05 s, waiting for evaluation 20 s",
    ]
    summary["evaluations"] = []
    summary["bytes"].update(cloud_saving=None, cloud_saving_equal_cloud_rounds=None)
    lines = render_summary(summary).split("\n")
    assert "none: the configuration names no reference data" in lines[0]
    assert lines[4:] == ["  bytes edge-cloud   12.0 MB", lines[-1]]
    summary["topology"] = "flat"
    lines = render_summary(summary).split("\n")
    assert lines[3:] == ["  bytes client-cloud 12.0 MB", lines[-1]]


def test_pruning_and_evaluation() -> None:
    pruned = {
        "event": "pruned", "node": "cloud", "interval": 2, "requested_ratio": 0.3,
        "achieved_ratio": 0.25, "achieved_ratios": [0.25], "widths_before": [8],
        "widths_after": [6],
        "before": {"parameters": 701_234, "macs": 12_000_000},
        "after": {"parameters": 395_000, "macs": 6_700_000},
    }  # fmt: skip
    assert render(pruned) == (
        "cloud     pruned to 75% of the widths: parameters 0.70 M -> 0.40 M, MACs 12.00 M -> 6.70 M"
    )
    evaluated = EVALUATED
    assert render(evaluated) == (
        "cloud     evaluated after interval 2: Frechet distance 56.0 in features of digits "
        "(512 samples, 50 DDIM steps, 10.0 s)"
    )
    assert "2: no reference data, no distance (512" in str(
        render({**evaluated, "frechet_distance": None})
    )


FULL: dict[str, Any] = {
    **EVALUATED, "kernel_distance": 0.01234, "kernel_distance_std": 0.1, "inception_score": None,
    "precision": 0.612, "recall": 0.4, "class_shares": [0.5, 0.5], "least_class": 8,
    "least_class_ratio": 0.123, "raw": {"frechet_distance": 61.26},
}  # fmt: skip


def test_an_evaluation_says_all_its_numbers_in_one_line() -> None:
    assert render(FULL) == (
        "cloud     evaluated after interval 2: Frechet distance 56.0 in features of digits | "
        "kernel distance 0.0123 | precision 0.61 | recall 0.40 | class 8 at 12% of its share | "
        "raw weights 61.3 (512 samples, 50 DDIM steps, 10.0 s)"
    )
    summary_rows = {
        "topology": "hierarchical",
        "parameters": {"before": 1, "after": 1},
        "macs": {"before": 1, "after": 1},
    }
    moved = {
        "client_edge": 0, "edge_cloud": 0, "flat_fedavg_client_cloud": 0, "cloud_saving": None,
    }  # fmt: skip
    table = render_summary(
        {**summary_rows, "bytes": moved, "seconds": {}, "evaluations": [FULL]}
    ).split("\n")
    assert table[1] == (
        "  samples            kernel distance 0.0123, precision 0.61, recall 0.40, "
        "class 8 at 12% of its share, raw weights 61.3"
    )


def test_only_inceptions_features_make_a_fid_and_a_kid() -> None:
    line = str(render({**FULL, "features": "inception-v3", "inception_score": 3.456}))
    assert ": FID 56.0 in features of inception-v3 | KID 0.0123 | Inception score 3.46 |" in line
    assert "FID" not in str(render(FULL))


def test_statistics_from_clients_name_who_is_missing() -> None:
    event = {
        "event": "client_statistics", "node": "cloud", "num_images": 1200,
        "clients": ["client-0", "client-1"], "failures": [], "seconds": 1.23, "label_counts": [1],
        "client_edge_bytes": 0, "edge_cloud_bytes": 0,
    }  # fmt: skip
    line = "cloud     reference statistics of 1200 images of 2 clients | 1.2 s"
    assert render(event) == line
    assert render({**event, "failures": ["client-2: late"]}) == f"{line} | without client-2: late"


def test_peers_links_and_messages() -> None:
    peer = {"event": "peer", "node": "edge-0", "peer": "client-3", "change": "left", "detail": ""}
    assert render(peer) == "edge-0    client-3 left"
    assert render({**peer, "detail": "no heartbeat"}) == "edge-0    client-3 left: no heartbeat"
    link = {"event": "link", "node": "edge-1", "server": "a:9092", "change": "connected"}
    assert render(link) == "edge-1    cloud a:9092 connected"
    assert render({"event": "message", "node": "cloud", "text": "hello"}) == "cloud     hello"


def test_what_is_for_programs_only_is_not_shown() -> None:
    assert read_event({"event": "of a newer version", "node": "cloud"}) is None
    assert render({"event": "started", "node": "cloud", "pid": 3}) is None
    assert render({"event": "ended", "node": "cloud", "exit_code": 0, "message": "done"}) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_960, "1.0 MB"),
        (143_000_000, "143.0 MB"), (2.5e9, "2.5 GB"), (3.04e12, "3.0 TB"), (5e15, "5000.0 TB"),
    ],
)  # fmt: skip
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"), (99.4, "99 s"), (99.6, "1 min 40 s"), (185, "3 min 05 s"),
        (5999, "99 min 59 s"), (6000, "1 h 40 min"), (7800, "2 h 10 min"), (90000, "25 h 00 min"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
