"""How runs are started, and what is printed when they end."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from support.finished import METHODS, comparison, planned, write_finished

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.config.text import parse_settings
from fedphd.common.events import Verdict, write_verdict
from fedphd.deploy.compare.plan import CommonSettings, decisive_settings
from fedphd.deploy.compare.runner import (
    Runner,
    finished_line,
    set_aside,
    time_left_s,
    why_failed,
)
from fedphd.deploy.launch.client_data import take_data


def test_a_child_resolves_exactly_the_planned_settings(common: CommonSettings) -> None:
    settings = {**common.settings, "evaluation.reference": None}
    run = planned(replace(common, settings=settings))[1]
    run.folder.mkdir(parents=True)
    arguments = Runner(common.out, jobs=1, say=print).arguments(run)
    arguments.remove("--go-on")
    values = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert arguments[0] == "simulate"
    assert values["--run-dir"] == str(run.folder)
    sets = [word for flag, word in pairwise(arguments) if flag == "--set"]
    of_cloud, of_data = take_data(parse_settings(sets))
    assert of_data == dict(common.clients.data)
    config = load_config(CloudConfig, Path(values["--config"]), of_cloud)
    assert config.evaluation.reference is None
    assert decisive_settings(config, {}) == decisive_settings(run.config, {})
    assert config.out_dir == run.config.out_dir


def test_only_finished_runs_are_skipped_and_a_failed_start_is_reported(
    common: CommonSettings,
) -> None:
    first, second = planned(common, (0,))
    write_finished(first, distances=[9.0, 4.0])
    # Data that is not there ends `fedphd simulate` at once, with its own message.
    config = common.load({"pruning.mode": "none", "evaluation.reference.source": "/no/such/data"})
    broken = replace(second, config=config)
    said: list[str] = []
    runner = Runner(common.out / "logs", jobs=1, say=said.append)
    failed = runner.run([first, broken], threading.Event())
    assert list(failed) == ["fedphd-seed-0"]
    assert "source = '/no/such/data': no such file or folder" in failed["fedphd-seed-0"]
    assert said[0] == "1 of 2 runs are finished already"
    assert said[-1].startswith(
        "FAILED    fedphd-seed-0: exit code 2: in [evaluation.reference]: source = "
    )
    assert not broken.finished
    # Of those that are asked for next, none does.
    assert runner.run([first], threading.Event()) == {}


def test_what_cannot_go_on_is_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "seed-0"
    for expected, file in (("seed-0.failed", "metrics.jsonl"), ("seed-0.failed-2", "config.json")):
        folder.mkdir()
        (folder / file).write_text(expected, encoding="utf-8")
        set_aside(folder)
        assert not folder.exists()
        assert (tmp_path / expected / file).read_text("utf-8") == expected
    folder.mkdir()
    set_aside(folder)
    assert folder.exists()


def test_time_left_goes_by_the_same_method_where_it_is_known(common: CommonSettings) -> None:
    a0, p0, a1, p1 = planned(common)
    write_finished(a0, distances=[9.0, 4.0], seconds=100.0)
    # Nothing is known of the other method: the mean of all.
    assert time_left_s([a0], [p0, a1, p1], jobs=1) == 300
    write_finished(p0, distances=[9.0, 4.0], seconds=40.0)
    assert time_left_s([a0, p0], [a1, p1], jobs=1) == 140
    assert time_left_s([a0, p0], [a1, p1], jobs=2) == 70
    assert time_left_s([a0, p0], [p1], jobs=2) == 40


def test_a_finished_run_is_one_line(common: CommonSettings) -> None:
    runs = planned(common, (0,))
    write_finished(runs[0], distances=[9.0, 5.0, 4.25], bytes_per_round=1500, seconds=100.0)
    assert finished_line(runs[0], runs, jobs=1) == (
        "finished  fedavg-seed-0: Frechet distance 4.2 | 2 cloud rounds, 3.0 kB over the cloud's "
        "links | 1 min 40 s | 1 of 2 runs | about 1 min 40 s left"
    )


def test_a_run_in_which_clients_failed_says_so(common: CommonSettings) -> None:
    runs = planned(common, (0,))
    left_out = ["client-1: no memory", "client-2: no memory"]
    write_finished(runs[0], distances=[9.0, 5.0, 4.25], failures=left_out)
    line = finished_line(runs[0], runs, jobs=1)
    assert " | DISTURBED: clients or edges failed 4 times | about " in line


def test_a_failed_run_is_explained_by_its_verdict_or_its_last_line(
    common: CommonSettings, tmp_path: Path
) -> None:
    (run,) = planned(common, (0,))[:1]
    log = tmp_path / "log"
    log.write_text("running\nfedphd: out of luck\n", encoding="utf-8")
    assert why_failed(log, run, 3) == "exit code 3: out of luck"
    run.folder.mkdir(parents=True)
    write_verdict(run.folder / "verdict.json", Verdict(4, "too few clients"))
    assert why_failed(log, run, 4) == "too few clients"
    # That one is from an earlier start.
    assert why_failed(log, run, 2) == "exit code 2: out of luck"


def test_rounds_that_fit_come_from_the_bytes_of_a_probe(common: CommonSettings) -> None:
    """A probe of two rounds stands ready, as a run would leave it."""
    by_bytes = comparison(common, ["fedavg"], [0], budget="cloud-bytes", cloud_bytes=7000)
    probe = by_bytes.byte_probe(METHODS["fedavg"])
    assert (probe.config.schedule.intervals, probe.config.training.local_amount) == (2, 1)
    write_finished(probe, distances=[None, None, None], bytes_per_round=2000)
    runner = Runner(common.out / "logs", jobs=1, say=print)
    said: list[str] = []
    by_bytes.fit_rounds(runner, threading.Event(), said.append)
    assert by_bytes.plan.intervals == {"fedavg": 3}
    assert "fedavg: 3 cloud rounds fit in 7.0 kB (2.0 kB in the first, 2.0 kB later)" in said[0]
    stored = json.loads((common.out / "compare.json").read_text("utf-8"))
    assert (stored["cloud_bytes"], stored["intervals"]) == (7000, {"fedavg": 3})


def test_the_probe_of_a_method_that_prunes_half_way_has_two_rounds_of_either_kind(
    common: CommonSettings,
) -> None:
    by_bytes = comparison(common, ["fedphd"], [0], budget="cloud-bytes", cloud_bytes=7000)
    probe = by_bytes.byte_probe(METHODS["fedphd"])
    assert (probe.config.schedule.intervals, probe.config.pruning.sparse_rounds) == (4, 2 * 3)
    write_finished(probe, distances=[None] * 5, bytes_per_round=2000)
    said: list[str] = []
    runner = Runner(common.out / "logs", jobs=1, say=print)
    by_bytes.fit_rounds(runner, threading.Event(), said.append)
    assert by_bytes.plan.intervals == {"fedphd": 3}
    assert "2.0 kB in the first, 2.0 kB later, 2.0 kB once pruned" in said[0]
