"""Configurations that a local federation writes, and how its processes are ended."""

from __future__ import annotations

import json
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedphd.common.config.data import Section
from fedphd.common.config.roles import (
    PRESETS,
    ClientConfig,
    CloudConfig,
    EdgeConfig,
    load_config,
)
from fedphd.common.errors import ConfigError
from fedphd.common.events import Verdict, write_verdict
from fedphd.deploy.cli.flags import parse_settings
from fedphd.deploy.launch import local
from fedphd.deploy.launch.local import (
    LocalCluster,
    merge_events,
    run_local,
    to_toml,
    toml_value,
    unset_keys,
)

ODD_TEXTS = [
    "", "plain", 'say "hi"', "back\\slash", "C:\\new\\table", "tab\tnew\nline\r", "'single'",
    "# no comment", "ü 漢 😀", "del \x7f bell \x07 nul \x00", "]\n[section]\nkey = 1", '"""',
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_strings_survive_toml(text: str) -> None:
    values = {"key": text, "list": [text, text], "section": {"key": text}}
    assert tomllib.loads(to_toml(values)) == values


@pytest.mark.parametrize(
    "value",
    [0, -3, 10**15, 1e-05, 1e-8, 0.1, 1.0, 1e16, 1e22, -2.5e-300, True, False, [], [1, 2], [0.5]],
)
def test_plain_values_survive_toml_with_their_type(value: object) -> None:
    back = tomllib.loads(to_toml({"key": value}))["key"]
    assert back == value
    assert type(back) is type(value)


def test_tuples_become_lists_and_paths_strings() -> None:
    values = {"widths": (32, 64), "names": ("a", "b"), "path": Path("a b/c"), "none": None}
    back = tomllib.loads(to_toml(values))
    assert back == {"widths": [32, 64], "names": ["a", "b"], "path": "a b/c"}


def test_values_after_a_section_stay_out_of_it() -> None:
    values = {
        "first": {"x": 1, "deep": {"deeper": {"y": 2}, "z": 3}, "after": 4},
        "empty": {},
        "second": {"deep": {"y": 5}},
        "last": 6,
    }
    text = to_toml(values)
    assert tomllib.loads(text) == values
    assert text.index("last = 6") < text.index("[first]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")]])
def test_numbers_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        toml_value(value)


def test_unset_keys_are_what_toml_leaves_out() -> None:
    values = {"a": None, "b": {"c": None, "d": 1, "e": {"f": None}}, "g": 2}
    assert list(unset_keys(values)) == ["a", "b.c", "b.e.f"]


def odd_cloud(preset: str) -> CloudConfig:
    overrides: dict[str, Any] = {
        "preset": preset,
        "out_dir": 'a "b"\\c',
        "training.learning_rate": 1e-05,
        "waits.round_s": 3,
        "seed": 2**40,
        "evaluation.reference.source": "C:\\data",
        "evaluation.reference.partition.alpha": 1e-7,
        "num_classes": 3,
        "target": [1.0, 0, 0],
    }
    return load_config(CloudConfig, overrides=overrides)


@pytest.mark.parametrize(
    "config",
    [
        *(load_config(CloudConfig, overrides={"preset": name}) for name in PRESETS),
        *(odd_cloud(name) for name in PRESETS),
        load_config(EdgeConfig),
        load_config(EdgeConfig, overrides={"node.root_certificates": "c\\a.pem"}),
        load_config(ClientConfig),
        load_config(
            ClientConfig,
            overrides={"edges": ["a:1", "[::1]:2"], "data.partition.kind": "iid"},
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_configurations_survive_toml(config: Section, tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text(to_toml(config.model_dump(mode="json")), encoding="utf-8")
    assert tomllib.loads(path.read_text("utf-8")) == config.model_dump(
        mode="json", exclude_none=True
    )
    assert load_config(type(config), path) == config


class Cluster:
    """A LocalCluster whose processes are a shell script; ``$3`` is the role."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        self.script = folder / "python"
        self.set_script("exec sleep 60")

    def set_script(self, text: str) -> None:
        self.script.write_text(f'#!/bin/sh\necho "$*" >> {self.folder}/calls\n{text}\n', "utf-8")
        self.script.chmod(0o755)

    def make(self, **overrides: Any) -> LocalCluster:
        values = {"schedule.num_edges": 2, "schedule.min_clients": 3, **overrides}
        config = load_config(CloudConfig, overrides=values)
        return LocalCluster(config, run_dir=self.run_dir, say=self.lines.append)

    def state(self, name: str) -> Path:
        return self.run_dir / "state" / f"{name}.toml"


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path)
    monkeypatch.setattr(sys, "executable", str(cluster.script))
    monkeypatch.setattr(local, "STOP_S", 0.3)
    monkeypatch.setattr(local, "KILL_S", 0.3)
    return cluster


def started(shell: Cluster, **overrides: Any) -> list[list[str]]:
    """Start and stop a cluster; return the command line of each role."""
    cluster = shell.make(**overrides)
    num_roles = 4 if overrides.get("topology") == "flat" else 6
    try:
        cluster.start()
        assert len(cluster.roles) == num_roles
        deadline_s = time.monotonic() + 10
        calls = shell.folder / "calls"
        while not calls.exists() or calls.read_text("utf-8").count("\n") < num_roles:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
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


def test_a_flat_federation_has_no_edge(shell: Cluster) -> None:
    calls = started(shell, topology="flat")
    assert sorted(call[2] for call in calls) == ["client"] * 3 + ["cloud"]
    cloud = load_config(CloudConfig, shell.state("cloud"))
    clients = [load_config(ClientConfig, shell.state(f"client-{n}")) for n in range(3)]
    assert {client.edges for client in clients} == {(cloud.superlink.address,)}


@pytest.mark.parametrize("overrides", [{}, {"evaluation.reference": None}, {"preset": "cifar10"}])
def test_cloud_gets_the_given_configuration(shell: Cluster, overrides: dict[str, Any]) -> None:
    call = next(call for call in started(shell, **overrides) if call[2] == "cloud")
    assert call[3:7] == ["--config", str(shell.state("cloud")), "--run-dir", str(shell.run_dir)]
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
        role.process.wait(10)
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
    verdict = waited(shell, '[ "$3" = cloud ] && exit 4; exec sleep 60')
    assert verdict == Verdict(4, "too few clients")


@pytest.mark.parametrize(("end", "code"), [("exit 5", 5), ("exit 0", 1), ("kill -9 $$", 1)])
def test_cloud_without_a_verdict_is_no_success(shell: Cluster, end: str, code: int) -> None:
    verdict = waited(shell, f'[ "$3" = cloud ] && {end}; exec sleep 60')
    assert verdict == Verdict(code, f"cloud ended; see {shell.run_dir}/logs/cloud.log")


@pytest.mark.parametrize("code", [2, 3])
def test_role_that_cannot_start_ends_the_run(shell: Cluster, code: int) -> None:
    verdict = waited(shell, f'case "$*" in *client-1.toml) exit {code};; esac; exec sleep 60')
    log = shell.run_dir / "logs" / "client-1.log"
    assert verdict == Verdict(code, f"client-1 could not start; see {log}")


def test_the_reason_why_a_role_could_not_start_is_told(shell: Cluster) -> None:
    script = 'case "$*" in *client-1.toml) echo noise >&2; echo "fedphd: a\n  b" >&2; exit 2;; esac'
    verdict = waited(shell, f"{script}; exec sleep 60")
    assert verdict.message.endswith("client-1.log: a\n  b")


def test_interruption_is_a_verdict(shell: Cluster) -> None:
    stop = threading.Event()
    stop.set()
    assert waited(shell, "exec sleep 60", stop) == Verdict(130, "interrupted")


def test_servers_are_stopped_before_their_nodes(shell: Cluster) -> None:
    shell.set_script(
        'trap "sleep 0.1; echo $3; exit 0" TERM; echo up; while :; do sleep 0.05; done'
    )
    cluster = shell.make()
    cluster.start()
    deadline_s = time.monotonic() + 10
    while shell.lines.count("up") < 6:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    cluster.stop()
    ended = [line for line in shell.lines if line != "up"]
    assert ended == ["cloud", *["edge"] * 2, *["client"] * 3]


def test_stop_ends_what_ignores_signals_and_its_children(shell: Cluster) -> None:
    shell.set_script('trap "" TERM; sleep 60 & echo "child $!"; while :; do sleep 0.1; done')
    cluster = shell.make()
    cluster.start()
    deadline_s = time.monotonic() + 10
    while len(shell.lines) < 6:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    cluster.stop()
    assert {role.process.returncode for role in cluster.roles} == {-9}
    for line in shell.lines:
        assert gone(int(line.removeprefix("child ")))
    cluster.stop()


def gone(pid: int) -> bool:
    """Whether a process, no child of ours, ends or becomes a zombie within 5 s."""
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_program_that_cannot_be_started_is_a_start_error(shell: Cluster) -> None:
    shell.script.unlink()
    config = load_config(CloudConfig)
    verdict = run_local(config, run_dir=shell.run_dir, stop=threading.Event(), say=print)
    assert verdict.exit_code == 3
    assert verdict.message.startswith("cannot start a process: ")


def test_processes_make_no_calls_home(shell: Cluster) -> None:
    shell.set_script('echo "$FLWR_TELEMETRY_ENABLED $FLWR_HOME"')
    cluster = shell.make()
    cluster.start()
    for role in cluster.roles:
        role.process.wait(10)
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


def test_without_a_run_there_is_nothing_to_merge(tmp_path: Path) -> None:
    (tmp_path / "edge").write_text('{"time": 1}\n', "utf-8")
    merge_events(tmp_path / "metrics.jsonl", [tmp_path / "edge"])
    assert [path.name for path in tmp_path.iterdir()] == ["edge"]


def test_toml_strings_are_those_of_json_but_for_del() -> None:
    assert toml_value("a\n") == json.dumps("a\n")
    assert toml_value("\x7f") == '"\\u007f"'


def test_registered_keys_are_refused_locally(tmp_path: Path) -> None:
    pem = {f"superlink.ssl_{name}": "x.pem" for name in ("certfile", "keyfile", "ca_certfile")}
    config = load_config(CloudConfig, overrides={**pem, "superlink.require_node_auth": True})
    with pytest.raises(ConfigError, match=r"require_node_auth = true: .* no registered keys"):
        LocalCluster(config, run_dir=tmp_path, say=print)
