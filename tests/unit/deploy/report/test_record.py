"""What is read from a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.told import TRAINED, write_told

from fedphd.common.errors import ConfigError
from fedphd.common.events import EventLog, Verdict
from fedphd.common.history.events import PeerChanged, RoundEnded
from fedphd.deploy.launch.runs import CONFIG, EVENTS
from fedphd.deploy.report.page import run_page
from fedphd.deploy.report.record import Members, Problem, RunRecord, Setting


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return RunRecord.read(write_told(tmp_path / "run"))


def test_who_trained_where_is_known_for_every_edge_round(record: RunRecord) -> None:
    assert list(record.members) == [1, 2, 3, 4, 5, 6]
    assert record.members[1]["edge-1"] == Members([], ["client-2"])
    # Edge round 2 of interval 2.
    assert record.members[4]["edge-1"] == Members(["client-0", "client-2"], [])
    assert record.rounds_at("edge-0") == {"client-0": 4, "client-1": 1, "client-2": 1}
    assert record.edges == ["edge-0", "edge-1"]
    assert record.client_names == ["client-0", "client-1", "client-2"]


def test_the_clouds_events_alone_say_who_trained_where(tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run")
    for log in folder.glob("state/*/events.jsonl"):
        log.unlink()
    record = RunRecord.read(folder)
    assert record.rounds == []
    assert record.members[4]["edge-1"].trained == TRAINED[2]["edge-1"][1]


def test_the_interval_that_is_under_way_is_known_from_the_edges(tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run", verdict=None)
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not ('"interval": 3' in line or '"ended"' in line)]
    (folder / "metrics.jsonl").write_text("".join(kept), "utf-8")
    record = RunRecord.read(folder)
    assert [one.interval for one in record.intervals] == [1, 2]
    assert record.members[5]["edge-1"].trained == ["client-1", "client-2"]


def test_problems_say_who_why_and_when(record: RunRecord) -> None:
    assert record.problems == [Problem("client-2", "reply <b>late</b>", 1, (1,))]


def test_who_left_alone_is_named_and_who_left_at_an_end_is_not(tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run")
    log = folder / "metrics.jsonl"
    end = json.loads(log.read_text("utf-8").splitlines()[-1])["time"]
    left = {"role": "edge", "node": "edge-2", "event": "peer", "change": "left", "detail": ""}
    over = {"role": "edge", "node": "edge-2", "event": "ended", "exit_code": 1, "message": ""}
    events = [
        # An edge that failed did not end the run.
        {**over, "time": end - 60},
        {**left, "time": end - 30, "peer": "client-1"},
        {**left, "time": end - 1, "peer": "client-0"},
    ]
    third = folder / "state/edge-2/events.jsonl"
    third.parent.mkdir()
    third.write_text("".join(f"{json.dumps(event)}\n" for event in events), "utf-8")
    problems = RunRecord.read(folder).problems
    assert [one.who for one in problems if one.why == "left"] == ["client-1"]


def test_a_pause_of_a_run_that_was_resumed_is_no_time_that_it_took(tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run", intervals=0, verdict=None)
    cloud, edge = {"role": "cloud", "node": "cloud"}, {"role": "edge", "node": "edge-0"}
    start, said = {"event": "started", "pid": 1}, {"event": "message", "text": ""}
    events = [
        {**cloud, **start, "time": 100.0},
        {**cloud, **said, "time": 110.0},
        # It waits for its cloud, which comes back after an hour.
        {**edge, **start, "time": 3700.0},
        {**cloud, **start, "time": 3710.0},
        {**cloud, **said, "time": 3725.0},
        {**edge, **said, "time": 3730.0},
    ]
    log = folder / EVENTS
    for number, seconds in ((0, 0.0), (1, 0.0), (2, 10.0), (4, 10.0), (5, 25.0), (6, 30.0)):
        log.write_text("".join(f"{json.dumps(event)}\n" for event in events[:number]), "utf-8")
        assert RunRecord.read(folder).elapsed_s == seconds
    log.write_text("".join(f"{json.dumps(event)}\n" for event in events[2:3]), "utf-8")
    assert RunRecord.read(folder).elapsed_s == 0.0


def test_settings_that_differ_from_the_preset(record: RunRecord) -> None:
    found = {setting.key: setting for setting in record.settings}
    assert found["schedule.intervals"] == Setting("schedule.intervals", 3, 12)
    assert found["evaluation.reference"].value is None
    assert "training.learning_rate" not in found
    # Where a machine keeps its things says nothing about the training.
    assert not {key for key in found if key.startswith(("superlink", "out_dir", "state_dir"))}


def test_origin_is_what_the_cloud_said(record: RunRecord) -> None:
    assert record.origin == {"fedphd_version": "9.9", "commit": "abc123"}


def test_clients_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run")
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text("utf-8").replace("client-1", "client-10"), "utf-8")
    for place in folder.glob("state/*/events.jsonl"):
        place.unlink()
    assert RunRecord.read(folder).client_names == ["client-0", "client-2", "client-10"]


@pytest.mark.parametrize("name", ["edge-0", "cloud"])
def test_a_client_that_is_called_as_a_server_is_a_client(tmp_path: Path, name: str) -> None:
    folder = write_told(tmp_path / "run")
    for log in folder.rglob("*.jsonl"):
        log.write_text(log.read_text("utf-8").replace("client-1", name), "utf-8")
    record = RunRecord.read(folder)
    assert record.client_names == sorted(["client-0", "client-2", name])
    assert record.edges == ["edge-0", "edge-1"]
    assert "once one was left out" in run_page(folder)


@pytest.mark.parametrize("name", ["client-0", "cloud"])
def test_clients_of_a_flat_run_are_those_of_the_clouds_own_edge(tmp_path: Path, name: str) -> None:
    """The cloud has an edge of its own name in its process, which joins it as edges do."""
    folder = write_told(tmp_path / "run", intervals=0, verdict=None)
    with_config = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps({**with_config, "topology": "flat"}), "utf-8")
    log = EventLog(folder / EVENTS, role="edge", node="cloud")
    own = log.sibling(role="cloud", node="cloud")
    (folder / EVENTS).write_text("", "utf-8")
    log.write(PeerChanged(peer=name, change="joined", detail=""))
    own.write(PeerChanged(peer="cloud", change="joined", detail=""))
    own.write(PeerChanged(peer="cloud", change="serves", detail=name))
    assert RunRecord.read(folder).client_names == [name]
    log.write(
        RoundEnded(
            interval=1, edge_round=1, round=1, rounds=6, clients=[name], num_samples=20,
            label_distribution=[0.25] * 4, failures=[], sent_bytes=0, received_bytes=0,
            seconds=5.0, left_s=0.0,
        )
    )  # fmt: skip
    log.close()
    assert "1 client trained at the cloud; nobody was left out" in run_page(folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run here"):
        RunRecord.read(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write_told(tmp_path / "run", verdict=Verdict(4, "too few"))
    (folder / "partition.json").write_text("{", "utf-8")
    with pytest.raises(ConfigError, match="its files cannot be read"):
        RunRecord.read(folder)
