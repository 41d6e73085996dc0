"""Configurations that a local federation writes, and how its processes are ended."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.happened import interval
from support.waiting import HANG_S, wait_until

from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig, load_config
from fedphd.common.config.text import parse_settings
from fedphd.common.errors import ConfigError
from fedphd.common.events import EventLog, Verdict, read_verdict, write_verdict
from fedphd.deploy.launch.local import LocalCluster, Role, merge_events, run_local
from fedphd.deploy.launch.processes import alive
from fedphd.deploy.launch.runs import EVENTS

KINDS: dict[str, type[CloudConfig | EdgeConfig | ClientConfig]] = {
    "cloud": CloudConfig,
    "edge": EdgeConfig,
    "client": ClientConfig,
}


class Cluster:
    """A LocalCluster whose processes are a shell script; ``$3`` is the role."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        self.script = folder / "script"
        self.command = [str(self.script), "-m", "fedphd"]
        # Nothing that is started here takes longer to end, unless it is a test's intention.
        self.patience_s = HANG_S
        self.set_script("exec sleep 600")

    def set_script(self, text: str) -> None:
        self.script.write_text(f'#!/bin/sh\necho "$*" >> {self.folder}/calls\n{text}\n', "utf-8")
        self.script.chmod(0o755)

    def make(self, **overrides: Any) -> LocalCluster:
        values = {"schedule.num_edges": 2, "schedule.min_clients": 3, **overrides}
        config = load_config(CloudConfig, overrides=values)
        return LocalCluster(
            config,
            run_dir=self.run_dir,
            say=self.lines.append,
            command=self.command,
            stop_s=self.patience_s,
            kill_s=self.patience_s,
        )

    def state(self, name: str) -> Path:
        return self.run_dir / "state" / f"{name}.toml"


@pytest.fixture
def shell(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def started(shell: Cluster, **overrides: Any) -> list[list[str]]:
    """Start and stop a cluster; return the command line of each role."""
    cluster = shell.make(**overrides)
    num_roles = 4 if overrides.get("topology") == "flat" else 6
    try:
        cluster.start()
        assert len(cluster.roles) == num_roles
        calls = shell.folder / "calls"
        wait_until(lambda: calls.exists() and calls.read_text("utf-8").count("\n") == num_roles)
    finally:
        cluster.stop()
    assert all(role.process.returncode is not None for role in cluster.roles)
    assert not any(role.forward.is_alive() for role in cluster.roles)
    return [line.split() for line in calls.read_text("utf-8").splitlines()]


def test_written_configurations_fit_together(shell: Cluster) -> None:
    calls = started(shell, seed=5, device="cpu")
    assert sorted(call[2] for call in calls) == ["client"] * 3 + ["cloud"] + ["edge"] * 2
    cloud = load_config(CloudConfig, shell.state("cloud"))
    edges = [load_config(EdgeConfig, shell.state(f"edge-{n}")) for n in range(2)]
    clients = [load_config(ClientConfig, shell.state(f"client-{n}")) for n in range(3)]
    assert [edge.edge_id for edge in edges] == ["edge-0", "edge-1"]
    assert {edge.cloud for edge in edges} == {cloud.superlink.address}
    addresses = tuple(edge.superlink.address for edge in edges)
    assert len({*addresses, cloud.superlink.address}) == 3
    states = {config.state_dir for config in (cloud, *edges)}
    assert states == {shell.run_dir / "state" / name for name in ("cloud", "edge-0", "edge-1")}
    for number, client in enumerate(clients):
        assert client.client_id == f"client-{number}"
        assert client.edges == addresses
        assert client.device == "cpu"
        assert client.data.partition is not None
        assert client.data.partition.partition_id == number
        assert client.data.partition.num_partitions == 3
        assert client.data.partition.seed == 5


def test_metrics_are_those_of_everybody_and_prometheus_is_told_where(shell: Cluster) -> None:
    targets = shell.run_dir / "prometheus-targets.json"
    cluster = shell.make(**{"health.metrics": True, "health.address": "10.0.0.5:1234"})
    try:
        cluster.start()
        told = json.loads(targets.read_text("utf-8"))
    finally:
        cluster.stop()
    # Who has ended is not missed.
    assert not targets.exists()
    addresses = {}
    for name in ("cloud", "edge-0", "edge-1", "client-0", "client-1", "client-2"):
        health = load_config(KINDS[name.partition("-")[0]], shell.state(name)).health
        assert health.metrics
        addresses[name] = health.address
    # The cloud's was given; the others' ports are their own.
    assert addresses["cloud"] == "10.0.0.5:1234"
    assert len(set(addresses.values())) == 6
    assert not any(str(address).endswith(":0") for address in addresses.values())
    assert told == [
        {"targets": [address], "labels": {"tier": name.partition("-")[0]}}
        for name, address in addresses.items()
    ]


def test_without_metrics_prometheus_is_told_nothing(shell: Cluster) -> None:
    started(shell, **{"health.address": None})
    assert load_config(EdgeConfig, shell.state("edge-0")).health.address == "127.0.0.1:0"
    assert not (shell.run_dir / "prometheus-targets.json").exists()


def test_a_flat_federation_has_no_edge(shell: Cluster) -> None:
    calls = started(shell, topology="flat")
    assert sorted(call[2] for call in calls) == ["client"] * 3 + ["cloud"]
    cloud = load_config(CloudConfig, shell.state("cloud"))
    clients = [load_config(ClientConfig, shell.state(f"client-{n}")) for n in range(3)]
    assert {client.edges for client in clients} == {(cloud.superlink.address,)}


@pytest.mark.parametrize("overrides", [{}, {"evaluation.reference": None}, {"preset": "cifar10"}])
def test_cloud_gets_the_given_configuration(shell: Cluster, overrides: dict[str, Any]) -> None:
    call = next(call for call in started(shell, **overrides) if call[2] == "cloud")
    assert call[3:5] == ["--config", str(shell.state("cloud"))]
    # Whoever starts them all writes the report.
    assert call[-3:] == ["--run-dir", str(shell.run_dir), "--no-report"]
    settings = [call[place + 1] for place, word in enumerate(call) if word == "--set"]
    cloud = load_config(CloudConfig, shell.state("cloud"), parse_settings(settings))
    given = {"schedule.num_edges": 2, "schedule.min_clients": 3, **overrides}
    expected = load_config(CloudConfig, overrides=given).model_dump()
    got = cloud.model_dump()
    for key in ("superlink", "state_dir"):
        assert got.pop(key) != expected.pop(key)
    assert got == expected


def test_output_is_forwarded_to_the_last_line(shell: Cluster) -> None:
    shell.set_script('echo "hello $3"; echo "trouble $3" >&2; echo last')
    cluster = shell.make()
    cluster.start()
    for role in cluster.roles:
        role.process.wait(HANG_S)
    cluster.stop()
    assert sorted(shell.lines) == sorted(
        ["hello cloud", *["hello edge"] * 2, *["hello client"] * 3, *["last"] * 6]
    )
    assert (shell.run_dir / "logs" / "edge-1.log").read_text("utf-8") == "trouble edge\n"


def waited(shell: Cluster, script: str, stop: threading.Event | None = None) -> Verdict:
    shell.set_script(script)
    cluster = shell.make()
    try:
        cluster.start()
        return cluster.wait(stop or threading.Event())
    finally:
        cluster.stop()


def test_verdict_is_the_clouds(shell: Cluster) -> None:
    write_verdict(shell.run_dir / "verdict.json", Verdict(4, "too few clients"))
    verdict = waited(shell, '[ "$3" = cloud ] && exit 4; exec sleep 600')
    assert verdict == Verdict(4, "too few clients")


@pytest.mark.parametrize(("end", "code"), [("exit 5", 5), ("exit 0", 1), ("kill -9 $$", 1)])
def test_cloud_without_a_verdict_is_no_success(shell: Cluster, end: str, code: int) -> None:
    verdict = waited(shell, f'[ "$3" = cloud ] && {end}; exec sleep 600')
    assert verdict == Verdict(code, f"cloud ended; see {shell.run_dir}/logs/cloud.log")


@pytest.mark.parametrize("code", [2, 3])
def test_role_that_cannot_start_ends_the_run(shell: Cluster, code: int) -> None:
    verdict = waited(shell, f'case "$*" in *client-1.toml) exit {code};; esac; exec sleep 600')
    log = shell.run_dir / "logs" / "client-1.log"
    assert verdict == Verdict(code, f"client-1 could not start; see {log}")


def test_who_ends_with_a_code_of_its_own_after_a_good_run_does_not_undo_it(shell: Cluster) -> None:
    """Such as a client that never trained, before the cloud has ended."""
    write_verdict(shell.run_dir / "verdict.json", Verdict(0, "finished"))
    # As a cloud writes it.
    written, events = shell.run_dir / "interval.jsonl", shell.run_dir / EVENTS
    log = EventLog(written, role="cloud", node="cloud")
    log.write(interval(1.0, 1))
    log.close()
    line = written.read_text("utf-8")
    # The run goes on, and of its intervals the checkpoint does not have the last ones.
    events.write_text(3 * line, "utf-8")
    written.write_text(f"{json.dumps({**json.loads(line), 'time': time.time() + 1.0})}\n", "utf-8")
    done = f"cp {written} {events}"
    client = f'case "$*" in *client-1.toml) {done}; exit 2;; esac'
    verdict = waited(shell, f'[ "$3" = cloud ] && {{ sleep 1; exit 0; }}; {client}; exec sleep 600')
    assert verdict == Verdict(0, "finished")


def test_intervals_of_before_do_not_make_a_start_good(shell: Cluster) -> None:
    log = EventLog(shell.run_dir / EVENTS, role="cloud", node="cloud")
    log.write(interval(1.0, 1))
    log.close()
    verdict = waited(shell, 'case "$*" in *client-1.toml) exit 2;; esac; exec sleep 600')
    assert verdict.exit_code == 2


def test_why_the_cloud_ended_is_told_where_it_left_no_verdict(shell: Cluster) -> None:
    script = (
        '[ "$3" = cloud ] && { echo "fedphd: the folder is in use" >&2; exit 3; }; exec sleep 600'
    )
    assert waited(shell, script) == Verdict(3, "cloud ended: the folder is in use")


def test_the_group_of_who_has_ended_is_killed_once_and_at_once(
    shell: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later its number may be somebody else's."""
    killed: list[int] = []
    killpg = os.killpg
    monkeypatch.setattr(
        os, "killpg", lambda group, sent: (killed.append(group), killpg(group, sent))
    )
    shell.set_script('[ "$3" = cloud ] && { sleep 600 & echo "child $!"; exit 0; }; exec sleep 600')
    cluster = shell.make()
    try:
        cluster.start()
        cluster.wait(threading.Event())
        cloud, *others = [role.process.pid for role in cluster.roles]
        assert killed == [cloud]
        wait_until(lambda: bool(shell.lines))
        child = int(shell.lines[0].removeprefix("child "))
        wait_until(lambda: not alive(child))
    finally:
        cluster.stop()
    assert sorted(killed) == sorted([cloud, *others])


def test_what_a_role_left_running_ends_whenever_its_own_end_is_seen(tmp_path: Path) -> None:
    """Asked all the time, so that some of them end in the middle of a question."""
    left = []
    for number in range(20):
        process = subprocess.Popen(
            ["sh", "-c", 'sleep 600 & echo "$!"'],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        role = Role(f"client-{number}", process, tmp_path / "log", threading.Thread())
        while role.poll() is None:
            pass
        assert process.stdout is not None
        with process.stdout as output:
            left.append(int(output.readline()))
    wait_until(lambda: not any(alive(child) for child in left))


def test_the_reason_why_a_role_could_not_start_is_told(shell: Cluster) -> None:
    script = 'case "$*" in *client-1.toml) echo noise >&2; echo "fedphd: a\n  b" >&2; exit 2;; esac'
    verdict = waited(shell, f"{script}; exec sleep 600")
    assert verdict.message == "client-1 could not start: a\n  b"


def test_interruption_is_a_verdict(shell: Cluster) -> None:
    stop = threading.Event()
    stop.set()
    assert waited(shell, "exec sleep 600", stop) == Verdict(130, "interrupted")


def test_servers_are_stopped_before_their_nodes(shell: Cluster) -> None:
    shell.set_script(
        'trap "sleep 0.1; echo $3; exit 0" TERM; echo up; while :; do sleep 0.05; done'
    )
    cluster = shell.make()
    cluster.start()
    wait_until(lambda: shell.lines.count("up") == 6)
    cluster.stop()
    ended = [line for line in shell.lines if line != "up"]
    assert ended == ["cloud", *["edge"] * 2, *["client"] * 3]


def test_stop_ends_what_ignores_signals_and_its_children(shell: Cluster) -> None:
    shell.set_script('trap "" TERM; sleep 600 & echo "child $!"; while :; do sleep 0.1; done')
    shell.patience_s = 0.1
    cluster = shell.make()
    cluster.start()
    wait_until(lambda: len(shell.lines) == 6)
    cluster.stop()
    assert {role.process.returncode for role in cluster.roles} == {-9}
    children = [int(line.removeprefix("child ")) for line in shell.lines]
    wait_until(lambda: not any(alive(child) for child in children))
    cluster.stop()


def test_program_that_cannot_be_started_is_a_start_error(shell: Cluster) -> None:
    shell.script.unlink()
    stop = threading.Event()
    verdict = run_local(
        load_config(CloudConfig), run_dir=shell.run_dir, stop=stop, say=print, command=shell.command
    )
    assert verdict.exit_code == 3
    assert verdict.message.startswith("cannot start a process: ")
    # The cloud left none, or only that it was stopped.
    assert read_verdict(shell.run_dir / "verdict.json") == verdict


def test_processes_make_no_calls_home(shell: Cluster) -> None:
    shell.set_script('echo "$FLWR_TELEMETRY_ENABLED $FLWR_HOME"')
    cluster = shell.make()
    cluster.start()
    for role in cluster.roles:
        role.process.wait(HANG_S)
    cluster.stop()
    homes = {line.removeprefix("0 ") for line in shell.lines}
    names = ["cloud", "edge-0", "edge-1", "client-0", "client-1", "client-2"]
    assert homes == {str(shell.run_dir / "state" / name / "flwr") for name in names}


def test_events_of_the_edges_are_merged_by_time(tmp_path: Path) -> None:
    path, edge, absent = (tmp_path / name for name in ("metrics.jsonl", "edge", "absent"))
    path.write_text('{"time": 1.5, "event": "a"}\n{"time": 3, "event": "c"}\n', "utf-8")
    # The last line is what a killed process left.
    edge.write_text('{"time": 1, "event": "x"}\n{"time": 2, "event": "b"}\n{"ti', "utf-8")
    merge_events(path, [edge, absent])
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(line["time"], line["event"]) for line in lines] == [
        (1, "x"), (1.5, "a"), (2, "b"), (3, "c"),
    ]  # fmt: skip
    assert sorted(tmp_path.iterdir()) == [edge, path]


def test_events_of_one_log_keep_their_order_where_its_clock_was_set_back(tmp_path: Path) -> None:
    path, edge = (tmp_path / name for name in ("metrics.jsonl", "edge"))
    for log, times in ((path, (10, 20, 5, 30)), (edge, (12, 25))):
        log.write_text("".join(f'{{"time": {time}}}\n' for time in times), "utf-8")
    merge_events(path, [edge])
    lines = [json.loads(line)["time"] for line in path.read_text("utf-8").splitlines()]
    assert lines == [10, 12, 20, 5, 25, 30]


def test_what_a_killed_launchers_edges_wrote_is_merged_before_they_begin_anew(
    shell: Cluster,
) -> None:
    path, edge = shell.run_dir / "metrics.jsonl", shell.run_dir / "state" / "edge-0"
    edge.mkdir(parents=True)
    path.write_text('{"time": 1, "event": "a"}\n', "utf-8")
    (edge / "events.jsonl").write_text('{"time": 2, "event": "b"}\n', "utf-8")
    # As an edge does first of all.
    shell.set_script(f"rm -f {edge}/events.jsonl; exit 3")
    config = load_config(CloudConfig, overrides={"schedule.min_clients": 1})
    stop = threading.Event()
    run_local(config, run_dir=shell.run_dir, stop=stop, say=print, command=shell.command)
    lines = [json.loads(line)["event"] for line in path.read_text("utf-8").splitlines()]
    assert lines == ["a", "b"]


@pytest.mark.parametrize("broken", ["\0\0", '{"time": "noon"}', '{"event": "b"}'])
def test_a_broken_line_of_an_edge_is_named_and_nothing_is_lost(tmp_path: Path, broken: str) -> None:
    path, edge = (tmp_path / name for name in ("metrics.jsonl", "edge"))
    path.write_text('{"time": 1}\n', "utf-8")
    edge.write_text(f'{{"time": 2}}\n{broken}\n{{"time": 3}}\n', "utf-8")
    with pytest.raises(ConfigError, match=rf"^{edge}, line 2: is not an event, "):
        merge_events(path, [edge])
    assert path.read_text("utf-8") == '{"time": 1}\n'


def test_without_a_run_there_is_nothing_to_merge(tmp_path: Path) -> None:
    (tmp_path / "edge").write_text('{"time": 1}\n', "utf-8")
    merge_events(tmp_path / "metrics.jsonl", [tmp_path / "edge"])
    assert [path.name for path in tmp_path.iterdir()] == ["edge"]


def test_registered_keys_are_refused_locally(tmp_path: Path) -> None:
    pem = {f"superlink.ssl_{name}": "x.pem" for name in ("certfile", "keyfile", "ca_certfile")}
    config = load_config(CloudConfig, overrides={**pem, "superlink.node_keys": "keys"})
    with pytest.raises(ConfigError, match=r"node_keys = keys: .* no registered keys"):
        LocalCluster(config, run_dir=tmp_path, say=print)
