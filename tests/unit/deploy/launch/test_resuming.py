"""What is kept of a run that goes on, and what keeps it from going on."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import pytest
from support.command import fedphd
from support.tiny import write_toml
from support.waiting import HANG_S

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.errors import ConfigError, StartError
from fedphd.common.events import write_json
from fedphd.common.history.progress import Progress, Reported
from fedphd.common.unet.costs import Costs
from fedphd.deploy.launch.client_data import with_reference
from fedphd.deploy.launch.leftovers import PROCESSES, Process
from fedphd.deploy.launch.resuming import (
    AWAITED,
    check_same_data,
    check_unchanged,
    keep_events,
    resumed_config,
    rewind,
    stored_config,
    wait_for_former,
)


def test_what_a_killed_launcher_left_is_waited_for(tmp_path: Path) -> None:
    """It ends by itself, but writes into the run's folder as long as it runs."""
    wait_for_former(tmp_path)
    for folder in (tmp_path, tmp_path / "state" / "edge-0"):
        folder.mkdir(parents=True, exist_ok=True)
        with subprocess.Popen(["sleep", "600"]) as former:
            running = {"launcher": Process.of(former.pid).model_dump()}  # type: ignore[union-attr]
            write_json(folder / PROCESSES, running)
            with pytest.raises(StartError, match=f"process {former.pid} still uses it"):
                wait_for_former(tmp_path, within_s=0.2)
            ending = threading.Timer(0.3, former.kill)
            ending.start()
            wait_for_former(tmp_path, within_s=HANG_S)
            ending.join()


def log(path: Path, *roles: str) -> list[str]:
    """An event log with one line per role."""
    lines = [json.dumps({"role": role, "n": n}) for n, role in enumerate(roles)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return lines


def test_events_are_kept_up_to_one_of_the_clouds(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = log(path, "cloud", "edge", "edge", "cloud", "edge", "cloud")
    count, size = keep_events(path, 2)
    assert count == 2
    assert path.read_text("utf-8").splitlines() == lines[:4]
    assert size == path.stat().st_size


def test_evaluations_beside_the_next_interval_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    after = [
        {"role": "edge", "event": "round", "interval": 3},
        {"role": "cloud", "event": "round", "interval": 3},
        {"role": "cloud", "event": "evaluated", "interval": 2},
        {"role": "cloud", "event": "evaluated", "interval": 1},
        {"role": "edge", "event": "evaluated", "interval": 2},
    ]
    lines = log(path, "edge", "cloud")
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(event)}\n" for event in after)
    # Those of the first interval were made again by somebody who lost them.
    for _ in range(2):
        assert keep_events(path, 1, {2}) == (2, path.stat().st_size)
        assert path.read_text("utf-8").splitlines() == [*lines, json.dumps(after[2])]


def test_what_is_no_event_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = log(path, "cloud", "edge", "cloud")
    path.write_text(f"{lines[0]}\n\0\0\n{lines[1]}\n{lines[2]}\n[1]\n\0\n", encoding="utf-8")
    assert keep_events(path, 2)[0] == 2
    assert path.read_text("utf-8").splitlines() == lines


def test_a_line_that_was_cut_off_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = log(path, "cloud", "edge")
    with path.open("a", encoding="utf-8") as file:
        file.write('{"role": "clo')
    keep_events(path, 1)
    assert path.read_text("utf-8").splitlines() == lines[:1]


def test_a_log_with_a_gap_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, "cloud", "edge")
    with pytest.raises(
        ConfigError, match=r"metrics.jsonl has 1 events of the cloud, but .* 2; put"
    ):
        keep_events(path, 2)


def test_lines_that_a_gap_is_made_of_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line.encode() for line in log(path, "cloud", "edge", "cloud")]
    path.write_bytes(b"\n".join([lines[0], b"\xff\xfe", lines[1], lines[2][:9], b""]))
    with pytest.raises(
        ConfigError,
        match=r"has 1 events of the cloud \(not an event: line 2, 4\), but .*; put the",
    ):
        keep_events(path, 2)


def test_without_a_checkpoint_a_run_begins_anew(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "verdict.json"):
        log(tmp_path / name, "cloud")
    said: list[str] = []
    resumed = rewind(tmp_path, tmp_path / "state", said.append)
    assert (resumed.interval, resumed.events, resumed.events_size) == (0, 0, 0)
    assert list(tmp_path.iterdir()) == []
    assert said == [f"resuming  {tmp_path}: no interval was finished, it begins anew"]


def test_what_a_killed_launcher_left_is_ended_before_the_log_is_cut(tmp_path: Path) -> None:
    state, late = tmp_path / "state", tmp_path / "late"
    # It finishes an interval while it is asked to end.
    script = f"trap 'touch {late}; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as left:
        assert left.stdout is not None
        assert left.stdout.readline() == b"up\n"
        state.mkdir()
        before = {"launcher": {"pid": left.pid, "started": 1}, "started": [Process.of(left.pid)]}
        (state / PROCESSES).write_text(
            json.dumps(before, default=lambda p: p.model_dump()), "utf-8"
        )
        rewind(tmp_path, state, lambda line: None if late.exists() else pytest.fail(line))
        assert left.wait(HANG_S) == 0


def test_with_a_damaged_checkpoint_everything_stays(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "verdict.json", "summary.json"):
        log(tmp_path / name, "cloud")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.json").write_text("{", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"state\.json is missing or damaged"):
        rewind(tmp_path, tmp_path / "state", print)
    assert sorted(tmp_path.iterdir()) == before


def test_a_resumption_counts_in_checkpoints_that_are_kept_too(tmp_path: Path) -> None:
    """One of them may take the place of a damaged one, and must not repeat an attempt."""
    checkpoint, kept = tmp_path / "checkpoint", tmp_path / "checkpoints"
    costs = Costs(parameters=1, macs=1, encoder_macs=1)
    progress = Progress(
        interval=3, intervals=9, ema_steps=0.0, config={}, run="r", resumed=(0, 1, 1, 2), events=0,
        elapsed_s=0.0, reported=Reported(dense=costs, costs=costs),
    )  # fmt: skip
    folders = (kept / "interval-0001", kept / "interval-0002", checkpoint)
    for interval, folder in enumerate(folders, start=1):
        folder.mkdir(parents=True)
        state = progress.model_copy(update={"interval": interval})
        (folder / "state.json").write_text(state.model_dump_json(), encoding="utf-8")
    (kept / "interval-0001" / "state.json").write_text("damaged", encoding="utf-8")
    Progress.read(checkpoint).next_attempt(checkpoint)
    found = [Progress.read(folder) for folder in (kept / "interval-0002", checkpoint)]
    times = (0, 1, 1, 2, 3)
    assert [(one.interval, one.resumed) for one in found] == [(2, times), (3, times)]


def test_an_older_checkpoint_says_only_how_often_it_was_resumed(tmp_path: Path) -> None:
    costs = Costs(parameters=1, macs=1, encoder_macs=1)
    state = Progress(
        interval=3, intervals=9, ema_steps=0.0, config={}, run="r", resumed=(), events=0,
        elapsed_s=0.0, reported=Reported(dense=costs, costs=costs),
    ).model_dump(mode="json")  # fmt: skip
    del state["resumed"]
    (tmp_path / "state.json").write_text(json.dumps({**state, "attempt": 2}), encoding="utf-8")
    assert Progress.read(tmp_path).resumed == (3, 3)


def test_what_defines_the_training_must_stay(tmp_path: Path) -> None:
    before = load_config(CloudConfig, None, {"seed": 3})
    # Where it listens, and how long it waits, is its own matter.
    here = {"seed": 3, "superlink.address": "127.0.0.1:7", "waits.round_s": 5.0}
    check_unchanged(tmp_path, before, load_config(CloudConfig, None, here))
    with pytest.raises(ConfigError, match=r"--resume .*: seed = 3, now 4; set them as they were"):
        check_unchanged(tmp_path, before, load_config(CloudConfig, None, {"seed": 4}))
    fewer = load_config(CloudConfig, None, {"seed": 3, "schedule.min_clients": 1})
    check_unchanged(tmp_path, before, fewer, AWAITED)
    with pytest.raises(ConfigError, match=r"schedule.min_clients = \d+, now 1"):
        check_unchanged(tmp_path, before, fewer)
    with pytest.raises(ConfigError, match=r"other data: data.source = 'digits', now 'faces'"):
        check_same_data(tmp_path, {"data.source": "digits"}, {"data.source": "faces"})


def test_what_is_given_lies_over_the_runs_own_settings(tmp_path: Path) -> None:
    own = {"seed": 3, "schedule.intervals": 33, "preset": "cifar10-16"}
    run = load_config(CloudConfig, None, own)
    (tmp_path / "config.json").write_text(run.model_dump_json(), encoding="utf-8")
    assert resumed_config(tmp_path, None, {}) == run
    waits = resumed_config(tmp_path, None, {"waits.start_s": 70.0})
    assert waits.waits.start_s == 70.0
    assert waits.federation().schedule.intervals == 33
    with pytest.raises(ConfigError, match=r"other settings: seed = 3, now 4; set them as they w"):
        resumed_config(tmp_path, None, {"seed": 4})
    # A preset, or a file, says all of it again.
    with pytest.raises(ConfigError, match=r"evaluation.every_intervals = 10, now 4"):
        resumed_config(tmp_path, None, {"preset": "digits", "seed": 3})
    path = write_toml(tmp_path / "c.toml", own)
    assert resumed_config(tmp_path, path, {"waits.start_s": 70.0}) == waits
    # What samples are compared with may have followed from the clients' data.
    data = {"data.source": "x"}
    of_data = load_config(CloudConfig, None, with_reference(own, data))
    (tmp_path / "config.json").write_text(of_data.model_dump_json(), encoding="utf-8")
    assert resumed_config(tmp_path, None, own) == of_data
    few = own | {"evaluation.reference.max_images": 300}
    of_data = load_config(CloudConfig, None, with_reference(few, data))
    (tmp_path / "config.json").write_text(of_data.model_dump_json(), encoding="utf-8")
    assert resumed_config(tmp_path, None, few) == of_data


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--resume {tmp_path}: no run has begun there"):
        stored_config(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"--resume {tmp_path}: no run to go on with"):
        stored_config(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["cloud", "--resume", "a", "--run-dir", "b"], "--resume and --run-dir both name"),
        (["simulate", "--go-on"], "--go-on needs --run-dir"),
        (
            ["simulate", "--resume", "nothing"],
            "--resume nothing: there is no such folder",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    arguments: list[str], problem: str, tmp_path: Path
) -> None:
    done = fedphd(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert problem in done.stderr


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", load_config(CloudConfig).model_dump(mode="json"))
    done = fedphd("simulate", "--resume", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "it was not started by this command" in done.stderr
