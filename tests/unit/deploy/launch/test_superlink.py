"""Ports, folders, environment and answers around a SuperLink; none is started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import HANG_S, wait_until

from fedphd.common.config.links import SuperLinkConfig
from fedphd.common.errors import FedPhDError, StartError, exit_code_of
from fedphd.deploy.launch import superlink
from fedphd.deploy.launch.processes import alive
from fedphd.deploy.launch.superlink import (
    SuperLink,
    _no_proxies,
    check_free,
    flower_environment,
    free_ports,
    last_line,
    make_folder,
)


@pytest.fixture
def busy() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield int(server.getsockname()[1])


def test_free_ports_differ_and_can_be_listened_on() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    check_free(f"127.0.0.1:{ports[0]}", "x")
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports[1]))


def test_free_ports_are_none_that_the_system_gives_to_others() -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not given.exists():
        pytest.skip(f"there is no {given} on this system")
    first, last = map(int, given.read_text("ascii").split())
    if first <= 20_000:
        pytest.skip(f"this system gives out ports from {first}")
    assert not set(free_ports(200)) & set(range(first, last + 1))


def test_too_few_free_ports_are_an_error(monkeypatch: pytest.MonkeyPatch, busy: int) -> None:
    monkeypatch.setattr(superlink, "_NEVER_GIVEN", range(busy, busy + 1))
    with pytest.raises(StartError, match=f"fewer than 1 of .* ports {busy} to {busy} are free"):
        free_ports(1)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_busy_port_is_named(busy: int, host: str) -> None:
    text = rf"superlink.address = {host}:{busy}: cannot listen there: Address already in use"
    with pytest.raises(StartError, match=f"{text}; stop what uses the port, or choose another"):
        check_free(f"{host}:{busy}", "superlink.address")


def test_port_in_time_wait_is_free() -> None:
    with socket.socket() as server:
        # As gRPC does; Linux asks it of both.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as caller:
            accepted, _ = server.accept()
            # Who closes first keeps the port in TIME_WAIT.
            accepted.close()
            caller.recv(1)
    check_free(f"127.0.0.1:{port}", "x")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "[2001:db8::1]"])
def test_foreign_address_is_a_start_error(host: str) -> None:
    with pytest.raises(StartError, match=r"x = .*:9092: cannot listen there: "):
        check_free(f"{host}:9092", "x")


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", "x")
    make_folder(tmp_path / "a" / "b", "x")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StartError, match=f"state_dir = {path}: cannot be created: "):
            make_folder(path, "state_dir")


def test_colours_that_a_notebook_forces_do_not_reach_flowers_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    environment = flower_environment(Path("state/flwr"))
    assert not {"FORCE_COLOR", "CLICOLOR_FORCE"} & environment.keys()


def test_environment_has_a_home_and_makes_no_calls_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = flower_environment(Path("state/flwr"))
    assert environment["FLWR_HOME"] == str(tmp_path / "state" / "flwr")
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["GRPC_ENABLE_FORK_SUPPORT"] == "0"
    assert environment["RAY_free_objects_batch_size"] == "1"
    scripts, *others = environment["PATH"].split(os.pathsep)
    assert scripts == str(Path(sys.executable).parent)
    assert os.pathsep.join(others) == os.environ["PATH"]
    assert "FLWR_HOME" not in os.environ


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ('{"success": true, "run-id": 3}', True),
        ('{\n  "success": true,\n  "app": {"name": "{"}\n}\n', True),
        ('Warning: {odd}\n{"success": true}\nUpdate available {1.32}', True),
        ('{"success": false, "error-message": "{no}"}', False),
        ('{"success": "false"}', False),
        ('{"run-id": 3}', False),
        ('{"success": true', False),
        ("", False),
        ("Error: no such app", False),
        ("[]", False),
    ],
)
def test_answer_of_flwr_run(output: str, expected: bool) -> None:
    assert (superlink._answer(output).get("success") is True) is expected


def test_busy_port_stops_before_anything_is_written(busy: int, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=rf"superlink.address = 127.0.0.1:{busy}"):
        SuperLink(SuperLinkConfig(address=f"127.0.0.1:{busy}"), tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_missing_flower_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = SuperLinkConfig(address=f"127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(StartError, match="flower-superlink is not installed; install fedphd"):
        SuperLink(config, tmp_path / "state", programs=tmp_path)


def fake_flower(folder: Path, script: str, **waits: float) -> SuperLink:
    """A SuperLink whose programs are a shell script."""
    for name in ("flower-superlink", "flwr"):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
    config = SuperLinkConfig(address=f"127.0.0.1:{free_ports(1)[0]}")
    return SuperLink(config, folder / "state", programs=folder, **{"stop_s": HANG_S, **waits})


def test_superlink_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    link = fake_flower(tmp_path, "echo first; echo last words >&2; echo; exit 7")
    with pytest.raises(StartError, match=r"ended with code 7; see .*superlink.log: last words$"):
        link.wait_ready()
    # Of a run that was under way it says that it failed, not that it could not start.
    with pytest.raises(FedPhDError, match="ended with code 7") as raised:
        link.check_alive(at_work=True)
    assert exit_code_of(raised.value) == 1
    link.stop()


def test_a_log_that_is_cut_goes_on_at_its_start(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "superlink.log").write_text("of the last run\n", "utf-8")
    link = fake_flower(tmp_path, f"echo first; until [ -e {tmp_path}/go ]; do :; done; echo second")
    while link.log.read_text("utf-8") != "first\n":
        link.check_alive()
    os.truncate(link.log, 0)
    (tmp_path / "go").touch()
    link.process.wait(HANG_S)
    assert link.log.read_bytes() == b"second\n"
    link.stop()


def test_refused_submission_is_reported(tmp_path: Path) -> None:
    refuse = "echo '{\"success\": false}'; echo oh no >&2"
    script = f'if [ "$1" = run ]; then {refuse}; else exec sleep 600; fi'
    link = fake_flower(tmp_path, script)
    with pytest.raises(StartError, match=r"`flwr run` failed: .*success.*\n?.*oh no"):
        link.submit({"role-file": str(tmp_path / "role.json")})
    link.stop()
    assert link.process.returncode is not None


def test_a_state_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    log = tmp_path / "state" / "superlink.log"
    log.mkdir(parents=True)
    fix = "; choose a writable folder"
    text = f"state_dir = {tmp_path}/state: cannot be written to: "
    with pytest.raises(StartError) as raised:
        fake_flower(tmp_path, "exec sleep 600")
    assert str(raised.value) == f"{text}Is a directory ({log}){fix}"
    log.rmdir()
    (tmp_path / "state" / "flwr").touch()
    link = fake_flower(tmp_path, "exec sleep 600")
    with pytest.raises(StartError) as raised:
        link.submit({})
    assert str(raised.value) == f"{text}File exists ({tmp_path}/state/flwr){fix}"
    link.stop()


def test_superlink_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    script = 'trap "" TERM; echo up; while :; do sleep 0.1; done'
    link = fake_flower(tmp_path, script, stop_s=0.1)
    while "up" not in link.log.read_text("utf-8"):
        link.check_alive()
    link.stop()
    assert link.process.returncode == -9
    link.stop()


def test_what_the_superlink_started_ends_with_it(tmp_path: Path) -> None:
    link = fake_flower(tmp_path, 'sleep 600 & echo "child $!"; wait', children_s=0.1)
    while "child" not in (text := link.log.read_text("utf-8")):
        link.check_alive()
    child = int(text.removeprefix("child "))
    link.stop()
    wait_until(lambda: not alive(child))


def test_a_serverapp_ends_with_a_superlink_that_died_alone(tmp_path: Path) -> None:
    link = fake_flower(tmp_path, 'sleep 600 & echo "child $!"; exit 1')
    link.process.wait()
    child = int(link.log.read_text("utf-8").removeprefix("child "))
    link.started(child)
    link.stop()
    wait_until(lambda: not alive(child))


def test_log_is_what_flower_kept_of_the_submitted_run(tmp_path: Path) -> None:
    script = """case "$1" in
        run) echo '{"success": true, "run-id": "17"}' ;;
        log) echo "asked for $2 $3 $4" ;;
    esac"""
    link = fake_flower(tmp_path, script)
    link.submit({"role-file": "/a/role.json"})
    assert link.run_log() == "asked for 17 here --show\n"
    link.process.wait()


@pytest.mark.parametrize(("text", "last"), [("a\nb\n\n", "b"), ("\n", "(empty)"), ("", "(empty)")])
def test_last_line_skips_empty_ones(text: str, last: str) -> None:
    assert last_line(text) == last


def test_traffic_is_flowers_count(tmp_path: Path) -> None:
    run = {"network-traffic": {"inbound-bytes": 30, "outbound-bytes": 12, "total-bytes": 42}}
    answer = json.dumps({"success": True, "runs": [run, run]})
    script = f'if [ "$1 $2" = "ls here" ]; then echo \'{answer}\'; else exec sleep 600; fi'
    link = fake_flower(tmp_path, script)
    assert link.traffic() == {"sent_bytes": 24, "received_bytes": 60}
    link.stop()


@pytest.mark.parametrize(
    "answer", ["", '{"success": false}', '{"success": true, "runs": [{}]}', "no JSON"]
)
def test_traffic_that_flower_does_not_say_is_none(tmp_path: Path, answer: str) -> None:
    script = f"if [ \"$1\" = ls ]; then echo '{answer}'; else exec sleep 600; fi"
    link = fake_flower(tmp_path, script)
    assert link.traffic() is None
    link.stop()


def test_child_dies_with_its_parent() -> None:
    code = (
        "import subprocess, sys\n"
        "from fedphd.deploy.launch.superlink import die_with_parent\n"
        "child = subprocess.Popen(['sleep', '600'], preexec_fn=die_with_parent)\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    wait_until(lambda: not alive(child))


def no_proxies(given: dict[str, str]) -> tuple[str, str, str]:
    found = _no_proxies(given)
    return found["no_grpc_proxy"], found["no_proxy"], found["NO_PROXY"]


def test_no_proxy_stands_between_processes_of_one_machine() -> None:
    own = "localhost,127.0.0.1,::1"
    assert no_proxies({}) == (own, own, own)
    given = f".example.org,{own}"
    assert no_proxies({"no_proxy": ".example.org"}) == (given, given, given)
    assert no_proxies({"NO_PROXY": ".example.org, ::1 ,"}) == (
        (f".example.org,::1,{own.removesuffix(',::1')}",) * 3
    )
    # gRPC looks at no_proxy only without the other, and knows no asterisk.
    assert no_proxies({"no_proxy": "*"}) == (f"*,{own}", "*", "*")
    assert no_proxies({"no_proxy": "a", "no_grpc_proxy": "b"}) == (
        f"b,{own}", f"a,{own}", f"a,{own}"
    )  # fmt: skip


def test_python_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong one')", "utf-8")
    command = [sys.executable, "-c", "import random; print(random.Random.__name__)"]
    environment = flower_environment(tmp_path / "home")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("Random\n", "")
