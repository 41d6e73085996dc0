"""A run that is killed at any moment and goes on ends with the bits of one that was not killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import events

from fedphd.common.unet.checkpoint import load_checkpoint

TESTS = Path(__file__).parents[1]
# What a client or the cloud must remember differs from method to method.
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "scaffold": {"objective.method": "scaffold"},
    "moon": {"objective.method": "moon"},
    "usplit": {"exchange.parts": "usplit"},
    "codecs": {
        "wire.cloud_down": "int8",
        "wire.cloud_up": "int4",
        "wire.client_up": "int8",
        "objective.method": "scaffold",
    },
    "one-shot": {"pruning.mode": "one_shot"},
}
WITHIN_S = 300.0


def start(folder: Path, settings: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "support.resumable", str(folder), json.dumps(settings)],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, settings: dict[str, Any]) -> None:
    process = start(folder, settings)
    text, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, text
    assert text.rstrip().endswith("code 0"), text


def kill_after(folder: Path, settings: dict[str, Any], rounds: int, pause_s: float) -> bool:
    """Kill the run some time after so many edges' rounds; False if it ended before."""
    with start(folder, settings) as process:
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += line == "event round\n"
            if seen >= rounds:
                break
        time.sleep(pause_s)
        process.kill()
        process.stdout.read()
    return process.returncode == -9


def outcome(folder: Path) -> dict[str, Any]:
    """Weights, figures and events that must not depend on how often a run was killed."""
    run = folder / "run"
    raw, averaged, _, _ = load_checkpoint(run / "checkpoint")
    log = events(run / "metrics.jsonl")
    kinds = [(e["event"], e.get("interval")) for e in log if e["event"] in KINDS]
    rounds = Counter(
        (e["node"], e["interval"], e["edge_round"]) for e in log if e["event"] == "round"
    )
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    names = ("interval", "frechet_distance", "num_samples")
    return {
        "raw": raw.state_dict(),
        "ema": averaged.state_dict(),
        "events": kinds,
        "rounds": rounds,
        "intervals": [
            {name: e[name] for name in ("interval", "loss", "mean_steps", "edge_weights", "images")}
            for e in log
            if e["event"] == "interval"
        ],
        "evaluations": [{name: e[name] for name in names} for e in summary["evaluations"]],
        "costs": [(r["interval"], r["images"], r["training_flops"]) for r in summary["rounds"]],
    }


KINDS = ("interval", "pruned", "evaluated")


def assert_same(killed: dict[str, Any], whole: dict[str, Any]) -> None:
    for name in ("events", "rounds", "intervals", "evaluations", "costs"):
        assert killed[name] == whole[name], name
    assert max(Counter(killed["events"]).values()) == 1
    for name in ("raw", "ema"):
        assert killed[name].keys() == whole[name].keys()
        different = [k for k in whole[name] if not torch.equal(killed[name][k], whole[name][k])]
        assert different == [], name


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    # No evaluation is due when it goes on: that would store how often it did.
    settings = {"schedule.intervals": 3, "evaluation.every_intervals": 3}
    finish(tmp_path / "whole", settings)
    # Two edges with two rounds each: in the middle of interval 3, after the cut.
    assert kill_after(tmp_path / "killed", settings, rounds=10, pause_s=0.05)
    # Again before the interval is over, when clients have trained in it a second time.
    assert kill_after(tmp_path / "killed", settings, rounds=2, pause_s=0.05)
    finish(tmp_path / "killed", settings)
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", list(METHODS))
def test_the_moment_does_not_matter(method: str, tmp_path: Path) -> None:
    """Four seeded moments for each of five methods."""
    settings = METHODS[method]
    finish(tmp_path / "whole", settings)
    rng = random.Random(method)
    kills = 0
    while kills < 4:
        rounds, pause_s = rng.randint(0, 7), rng.uniform(0.0, 1.0)
        if not kill_after(tmp_path / "killed", settings, rounds, pause_s):
            break
        kills += 1
    if kills == 4:
        finish(tmp_path / "killed", settings)
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))
