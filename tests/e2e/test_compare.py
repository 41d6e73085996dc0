"""``fedphd compare`` with real simulations of a tiny network."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.processes import Processes
from support.tiny import CLASSES_PER_CLIENT, TINY, flags

from fedphd.deploy.launch.origin import DIRTY, commit

METHOD_KEYS = ("pruning.mode", "pruning.sparse_rounds")
SETTINGS = {key: value for key, value in TINY.items() if key not in METHOD_KEYS}
PEOPLE = ["--clients", "3", "--edges", "2", "--classes-per-client", str(CLASSES_PER_CLIENT)]
COMMON = [*PEOPLE, *flags({**SETTINGS, "schedule.intervals": 2})]
RUNS_S = 280.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_methods_are_compared_and_finished_runs_are_kept(processes: Processes) -> None:
    out = processes.folder / "out"
    first = processes.start(
        "compare", "--out", "out", "--methods", "fedavg", "--seeds", "0", *COMMON
    )
    assert first.wait_exit(within_s=RUNS_S) == 0, first.text
    kept = (out / "fedavg/seed-0/summary.json").stat().st_mtime_ns

    arguments = ["compare", "--out", "out", "--methods", "fedavg,fedphd", "--seeds", "0", *COMMON]
    stopped = processes.start(*arguments)
    stopped.wait_line("started   fedphd-seed-0")
    wait_for(out / "fedphd/seed-0/checkpoint/state.json")
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.wait_exit() == 130, stopped.text
    processes.wait_gone()
    assert "fedphd seed 0: not run yet" in (out / "table.md").read_text("utf-8")

    again = processes.start(*arguments)
    assert again.wait_exit(within_s=RUNS_S) == 0, again.text
    processes.wait_gone()
    assert "1 of 2 runs are finished already" in again.text
    assert "2 of 2 runs" in again.text
    assert (out / "fedavg/seed-0/summary.json").stat().st_mtime_ns == kept
    printed = (out / "logs/fedphd-seed-0.log").read_text("utf-8")
    # A checkout with changes begins again, since nobody knows whether it is still the same.
    changed = commit().endswith(DIRTY)
    assert ("goes on   fedphd-seed-0" in again.text) is not changed
    assert (" after interval 1 of 2" in printed) is not changed
    check_report(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_method_chose_makes_its_results(processes: Processes) -> None:
    out = processes.folder / "out"
    arguments = [
        "compare", "--out", "out", "--methods", "fedavg", "--seeds", "0", *COMMON,
        "--tune", "training.learning_rate=0.003,0.00001", "--tuning-seeds", "100",
        "--tuning-intervals", "1", "--jobs", "2",
    ]  # fmt: skip
    tuned = processes.start(*arguments)
    assert tuned.wait_exit(within_s=RUNS_S) == 0, tuned.text
    # Hardly any step at all cannot be the better one.
    assert "tuned     fedavg: training.learning_rate = 0.003" in tuned.text
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text("utf-8").splitlines()]
    assert sorted((row["seed"], row["tuning"]) for row in rows) == [
        (0, False), (100, True), (100, True),
    ]  # fmt: skip
    again = processes.start("compare", "--out", "out", "--report-only")
    assert again.wait_exit() == 0, again.text
    assert "| **0.003** |" in (out / "table.md").read_text("utf-8")


def wait_for(path: Path) -> None:
    """Wait until a run has begun to write its events."""
    deadline_s = time.monotonic() + RUNS_S
    while not path.exists():
        assert time.monotonic() < deadline_s, f"no {path}"
        time.sleep(0.2)


def check_report(out: Path) -> None:
    with (out / "table.csv").open(encoding="utf-8") as file:
        fedavg, fedphd = csv.DictReader(file)
    assert (fedavg["method"], fedphd["method"]) == ("fedavg", "fedphd")
    summary = json.loads((out / "fedphd/seed-0/summary.json").read_text("utf-8"))
    assert float(fedphd["cloud_bytes"]) == summary["bytes"]["edge_cloud"]
    # 3 clients against 2 edges, and half of the rounds with half of the widths; whole weights go to
    # both edges twice, since the run was stopped in between.
    assert float(fedphd["cloud_bytes"]) < 0.8 * float(fedavg["cloud_bytes"])
    assert float(fedphd["parameters"]) < 0.3 * float(fedavg["parameters"])
    # 2 cloud rounds x 2 x 2 epochs of all 1797 digits, 6 FLOPs per MAC.
    per_image = 6 * float(fedavg["macs"])
    assert float(fedavg["training_flops"]) == pytest.approx(2 * 4 * 1797 * per_image)
    text = (out / "table.md").read_text("utf-8")
    assert "All planned runs are in the table." in text
    assert "NOT all evaluated alike" not in text
    for name in ("quality-rounds", "quality-cloud-bytes", "quality-compute", "sample-grids"):
        with Image.open(out / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5, name
