"""What is read of a run's event logs while they grow, are cut, and are merged."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.happened import append, at, ended, half_a_run, interval, over, peer, write_run

from fedphd.common.errors import FedPhDError
from fedphd.common.history.events import LinkChanged
from fedphd.deploy.launch.local import merge_events
from fedphd.deploy.launch.resuming import keep_events
from fedphd.deploy.live.follow import Follower


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedPhDError, match="no run is there"):
        Follower(tmp_path).check()
    write_run(tmp_path / "run", [])
    Follower(tmp_path / "run").check()


def test_an_edges_own_folder_can_be_followed(tmp_path: Path) -> None:
    append(tmp_path / "events.jsonl", [ended(1, "edge-0", 1)])
    follower = Follower(tmp_path)
    follower.check()
    follower.poll()
    assert follower.federation.edges["edge-0"].round == 1


def test_the_configuration_says_who_will_come(tmp_path: Path) -> None:
    follower = Follower(write_run(tmp_path, [], num_clients=4))
    follower.poll()
    assert (len(follower.federation.clients), follower.federation.intervals) == (4, 3)


def test_logs_of_edges_are_read_too_and_once_when_they_are_merged(tmp_path: Path) -> None:
    follower = Follower(write_run(tmp_path, [interval(9, 1)]))
    edge = tmp_path / "state" / "edge-0" / "events.jsonl"
    edge.parent.mkdir(parents=True)
    append(edge, [ended(5, "edge-0", 1, loss=0.5)])
    follower.poll()
    append(edge, [ended(7, "edge-0", 2, loss=0.25)])
    follower.poll()
    merge_events(tmp_path / "metrics.jsonl", [edge])
    append(tmp_path / "metrics.jsonl", [over(20)])
    follower.poll()
    assert follower.federation.edges["edge-0"].losses == [0.5, 0.25]
    assert follower.federation.cloud.losses == [0.3]
    assert follower.federation.verdict == (0, "finished")


def test_a_log_that_was_cut_for_a_run_that_goes_on_is_read_on(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    follower = Follower(write_run(tmp_path, [interval(1, 1), interval(2, 2)]))
    follower.poll()
    keep_events(log, 1)
    append(log, [interval(30, 2, loss=0.1)])
    follower.poll()
    assert follower.federation.cloud.losses == [0.3, 0.3, 0.1]


def test_only_trouble_is_loud_and_each_once(tmp_path: Path) -> None:
    events = [
        *half_a_run(),
        peer(13, "edge-1", "client-1", "failed", "no heartbeat"),
        at(14, "edge-0", LinkChanged(server="c:1", change="lost, trying again")),
        ended(15, "edge-1", 2, failures=["client-1: no heartbeat", "client-3: answers twice"]),
        interval(16, 1, failures=["edge-1: client-1: no heartbeat"]),
        over(17, 4, "too few"),
    ]
    follower = Follower(write_run(tmp_path, events))
    follower.poll()
    assert follower.loud == [
        "edge-1    client-1 failed: no heartbeat",
        "edge-0    cloud c:1 lost, trying again",
        "edge-1    without client-3: answers twice",
        "cloud     ended: too few",
    ]


def test_who_left_and_came_back_is_loud_again_when_it_fails(tmp_path: Path) -> None:
    events = [
        peer(1, "edge-0", "client-3", "left"),
        peer(2, "edge-0", "client-3"),
        ended(3, "edge-0", 1, failures=["client-3: not finite"]),
        peer(4, "edge-0", "client-3", "failed", "no answer"),
        ended(5, "edge-0", 2, failures=["client-3: no answer", "client-3: no answer of use"]),
        interval(6, 1, failures=["edge-0: client-3: no answer"]),
    ]
    follower = Follower(write_run(tmp_path, events))
    follower.poll()
    assert follower.loud == [
        "edge-0    client-3 left",
        "edge-0    without client-3: not finite",
        "edge-0    client-3 failed: no answer",
        "edge-0    without client-3: no answer of use",
    ]


def test_lines_of_events_are_known_by_their_text(tmp_path: Path) -> None:
    follower = Follower(write_run(tmp_path, half_a_run()))
    follower.poll()
    assert follower.shows("edge-0    client-3 joined")
    assert not follower.shows("edge-0    client-33 joined")


def test_lines_of_another_version_are_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path, [])
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"event": "interval"}\n{"event": "new"}\n', encoding="utf-8")
    append(log, [over(1)])
    follower = Follower(tmp_path)
    follower.poll()
    assert follower.federation.verdict == (0, "finished")
