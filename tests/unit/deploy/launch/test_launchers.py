"""Run folders, signals and the watch over processes."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import cast

import pytest
from support.waiting import HANG_S

from fedphd.common.config.roles import CloudConfig, EdgeConfig, load_config
from fedphd.common.errors import FedPhDError, StartError
from fedphd.common.events import Verdict, read_verdict, write_verdict
from fedphd.deploy.launch.launchers import (
    check_asked_for,
    check_serverapp,
    end_serverapp,
    interrupted,
    run_edge,
    stop_on_signal,
)
from fedphd.deploy.launch.needs import kills_for_memory
from fedphd.deploy.launch.runs import RoleFile, discard, new_run_dir, run_folder
from fedphd.deploy.launch.superlink import SuperLink


def test_run_folders_are_named_by_time_and_differ(tmp_path: Path) -> None:
    folders = [new_run_dir(tmp_path / "deep" / "runs") for _ in range(3)]
    assert len(set(folders)) == 3
    for folder in folders:
        assert folder.is_dir()
        assert re.fullmatch(r"\d{8}-\d{6}(-\d+)?", folder.name)


def test_out_dir_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"out_dir = .*file: cannot be written to: Not a dir"):
        new_run_dir(tmp_path / "file")


def test_given_run_folder_is_made(tmp_path: Path) -> None:
    assert run_folder(tmp_path / "a" / "b", tmp_path / "runs").is_dir()
    assert not (tmp_path / "runs").exists()
    assert run_folder(None, tmp_path / "runs").parent == tmp_path / "runs"
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"--run-dir = .*file: cannot be created"):
        run_folder(tmp_path / "file", tmp_path)


def test_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    write_verdict(tmp_path / "verdict.json", Verdict())
    with pytest.raises(StartError, match=r"already holds a run \(metrics.jsonl\); choose another"):
        run_folder(tmp_path, tmp_path)
    assert (tmp_path / "verdict.json").exists()


def test_verdict_of_a_start_that_failed_does_not_end_the_next(tmp_path: Path) -> None:
    write_verdict(tmp_path / "verdict.json", Verdict(3, "port in use"))
    run_folder(tmp_path, tmp_path)
    assert not (tmp_path / "verdict.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_set_the_event_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stop:
        assert not stop.is_set()
        signal.raise_signal(number)
        assert stop.is_set()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(RuntimeError), stop_on_signal():
        raise RuntimeError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_serverapp_is_asked_to_end_and_then_killed(tmp_path: Path) -> None:
    verdict = tmp_path / "verdict.json"
    end_serverapp(None, verdict)
    polite = subprocess.Popen(["sleep", "600"])
    end_serverapp(polite.pid, verdict, grace_s=HANG_S)
    assert polite.wait() == -signal.SIGTERM
    end_serverapp(polite.pid, verdict)

    script = 'trap "" TERM; echo up; while :; do sleep 0.1; done'
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        end_serverapp(stubborn.pid, verdict, grace_s=0.1)
        assert stubborn.wait() == -signal.SIGKILL


def test_end_does_not_wait_for_what_comes_after_the_verdict(tmp_path: Path) -> None:
    verdict = tmp_path / "verdict.json"
    script = f"trap 'mv {tmp_path}/new {verdict}' TERM; echo up; while :; do sleep 0.1; done"
    write_verdict(tmp_path / "new", Verdict(130, "stopped"))
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        end_serverapp(process.pid, verdict, grace_s=HANG_S)
        assert process.poll() is None
        assert verdict.exists()
        process.kill()


def test_edge_that_cannot_listen_says_so_and_forgets_its_last_run(tmp_path: Path) -> None:
    for name in ("events.jsonl", "verdict.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        values = {"superlink.address": address, "state_dir": str(tmp_path)}
        config = load_config(EdgeConfig, overrides=values)
        with pytest.raises(StartError, match=address):
            run_edge(config, stop=threading.Event(), say=print)
    assert not list(tmp_path.iterdir())


def test_edge_with_a_file_for_a_state_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = load_config(EdgeConfig, overrides={"state_dir": str(tmp_path / "file")})
    with pytest.raises(StartError, match=r"state_dir = .*file: cannot be created"):
        run_edge(config, stop=threading.Event(), say=print)


def test_whatever_a_stopped_serverapp_says_the_run_was_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    assert interrupted(path) == Verdict(130, "stopped")
    write_verdict(path, Verdict(1, "cannot schedule new futures after shutdown"))
    assert interrupted(path) == read_verdict(path) == Verdict(130, "stopped")
    write_verdict(path, Verdict(0, "finished after 3 intervals"))
    assert interrupted(path) == Verdict(0, "finished after 3 intervals")


def test_a_serverapp_that_flower_ended_is_an_error_unless_somebody_asked(tmp_path: Path) -> None:
    class Link:
        log = tmp_path / "superlink.log"

    link, stop = cast(SuperLink, Link()), threading.Event()
    with pytest.raises(FedPhDError, match=r"Flower ended the ServerApp.*clock.*superlink.log"):
        check_asked_for(Verdict(130, "stopped"), stop, link)
    for verdict in (Verdict(), Verdict(4, "too few participants")):
        check_asked_for(verdict, stop, link)
    # A signal to all of a process group may reach the ServerApp first.
    later = threading.Timer(0.1, stop.set)
    later.start()
    check_asked_for(Verdict(130, "stopped"), stop, link)
    assert stop.is_set()


def test_names_are_bound_where_real_nodes_have_keys(tmp_path: Path) -> None:
    pem = {f"superlink.ssl_{name}": "x.pem" for name in ("certfile", "keyfile", "ca_certfile")}
    keyed = load_config(CloudConfig, overrides={**pem, "superlink.node_keys": "keys"})
    assert RoleFile.of("cloud", keyed, tmp_path).names == str(tmp_path / "node_names.json")
    assert RoleFile.of("cloud", load_config(CloudConfig), tmp_path).names == ""
    # Its nodes are this machine's own, and have no keys.
    assert RoleFile.of("simulation", keyed, tmp_path).names == ""


class PrintingLink:
    """The part of a SuperLink that tells what its run printed."""

    def __init__(self, before: str = "") -> None:
        self._before = before

    def run_log(self) -> str:
        return f"{self._before}\nTraceback ...\nRuntimeError: Simulation Engine crashed.\n\n"


def test_serverapp_that_dies_is_reported_with_what_it_printed(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    file = RoleFile.of("cloud", load_config(CloudConfig), tmp_path)
    link = cast(SuperLink, PrintingLink())
    kills = kills_for_memory()
    text = r"died without a verdict: RuntimeError: Simulation Engine crashed.; see .*cloud.log and "
    with pytest.raises(FedPhDError, match=text + ".*flower.log"):
        check_serverapp(ended.pid, 0.0, link, file, kills)
    assert (tmp_path / "flower.log").read_text("utf-8") == link.run_log()
    # Another start's verdict is not this one's.
    write_verdict(tmp_path / "verdict.json", Verdict())
    with pytest.raises(FedPhDError, match=text):
        check_serverapp(ended.pid, 0.0, link, file, kills)
    write_verdict(Path(file.verdict), Verdict())
    check_serverapp(ended.pid, 0.0, link, file, kills)


def test_a_lack_of_memory_is_named_where_a_serverapp_died(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    file = RoleFile.of("cloud", load_config(CloudConfig), tmp_path)
    # As if there had been one fewer when it was started.
    with pytest.raises(FedPhDError, match="ended a process for lack of memory") as caught:
        check_serverapp(
            ended.pid, 0.0, cast(SuperLink, PrintingLink()), file, kills_for_memory() - 1
        )
    assert "The last that was printed: RuntimeError: Simulation" in str(caught.value)


def test_a_ray_that_is_too_slow_is_named(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    file = RoleFile.of("simulation", load_config(CloudConfig), tmp_path)
    said = "Exception: The current node timed out during startup. This could happen because ..."
    with pytest.raises(StartError, match="Ray did not start within its limit of 30 s"):
        check_serverapp(ended.pid, 0.0, cast(SuperLink, PrintingLink(said)), file, 0)


def test_interrupted_process_ends_within_its_handler(tmp_path: Path) -> None:
    code = (
        "from fedphd.deploy.launch.launchers import stop_on_signal\n"
        "with stop_on_signal() as stop:\n"
        "    print('up', flush=True)\n"
        "    print('set' if stop.wait(120) else 'not set')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "set\n"
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("code", "message", "stays"),
    [
        (2, "device = cuda: there is none", False),
        (3, "superlink.address = 1.2.3.4:5: cannot listen", False),
        (3, "the SuperLink ended; see {folder}/state/cloud/superlink.log", True),
        (1, "internal", True),
        (0, "finished", True),
        (130, "interrupted", True),
    ],
)
def test_a_run_that_could_not_start_leaves_no_folder(
    tmp_path: Path, code: int, message: str, stays: bool
) -> None:
    folder = new_run_dir(tmp_path)
    (folder / "logs").mkdir()
    (folder / "config.json").write_text("{}", "utf-8")
    discard(folder, Verdict(code, message.format(folder=folder)))
    assert folder.exists() == stays


def test_a_run_that_was_interrupted_before_it_began_leaves_no_folder(tmp_path: Path) -> None:
    folder = new_run_dir(tmp_path)
    discard(folder, Verdict(130, "interrupted"))
    assert not folder.exists()


def test_a_checkpoint_is_never_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.json").write_text("{}", "utf-8")
    discard(tmp_path, Verdict(2, "device = cuda: there is none"))
    assert (tmp_path / "checkpoint").exists()
