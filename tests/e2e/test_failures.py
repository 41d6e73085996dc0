"""Start-up in any order, and what happens when processes die, are interrupted or cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support.command import fedphd
from support.processes import Processes
from support.scrape import scrape
from support.site import EDGES, Site
from support.tiny import CLASSES_PER_CLIENT, TINY, flags, write_toml
from support.waiting import wait_until

INTERVALS = 4
MANY = 100_000
RUN = {"schedule.intervals": INTERVALS, "schedule.min_clients": 2}


@dataclass(frozen=True)
class Outcome:
    """A run in which a client and an edge were killed."""

    site: Site
    codes: dict[str, int]
    left: dict[int, list[str]]
    status: list[dict[str, Any]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    # The first call takes seconds, in which the run would go on before the edge is killed.
    fedphd("--version")
    with Processes(tmp_path_factory.mktemp("failures")) as processes:
        site = Site(processes, RUN)
        # A client whose edges are not there, and edges whose cloud is not there, wait for them.
        first = site.start("client-0")
        edges = {name: site.start(name) for name in EDGES}
        for edge in edges.values():
            edge.wait_line("listening on")
        for name in EDGES:
            first.wait_line(rf"{site.address(name)} connected")
        victim = site.start("client-1")
        cloud = site.start("cloud")
        edges["edge-0"].wait_line(r"interval +1 round 1")
        # Round 2 is under way, and waits for this client until Flower misses its heartbeats.
        os.kill(victim.pid, signal.SIGKILL)
        site.start("client-2")
        cloud.wait_line(r"interval +1 of")
        edges["edge-0"].wait_line(r"interval +2 round 1")
        status = json.loads(fedphd("status", "--json", cwd=processes.folder).stdout)
        os.killpg(edges["edge-1"].pid, signal.SIGKILL)
        codes = {name: program.wait_exit() for name, program in site.programs.items()}
        yield Outcome(site, codes, processes.commands(), status)


def test_the_run_survives_a_client_and_an_edge(outcome: Outcome) -> None:
    killed = {"client-1", "edge-1"}
    expected = {name: -signal.SIGKILL if name in killed else 0 for name in outcome.codes}
    assert outcome.codes == expected, outcome.site.programs["cloud"].text
    assert outcome.left == {}
    assert len(outcome.site.events("interval")) == INTERVALS


def test_the_status_says_who_is_connected_to_whom(outcome: Outcome) -> None:
    found = {one["node"]: one for one in outcome.status}
    assert list(found)[:3] == ["cloud", "edge-0", "edge-1"]
    # The killed one left its address behind, where nobody answers.
    assert set(found) == {"cloud", "edge-0", "edge-1", "client-0", "client-2"}
    assert all(one["ready"] for one in found.values())
    assert found["cloud"]["interval"] >= 1
    assert found["cloud"]["intervals"] == INTERVALS
    assert {name: peer["state"] for name, peer in found["cloud"]["peers"].items()} == dict.fromkeys(
        EDGES, "connected"
    )
    assert found["edge-0"]["peers"]["client-0"]["state"] == "connected"
    assert set(found["client-0"]["upstream"].values()) == {"connected"}


def test_the_killed_client_is_named(outcome: Outcome) -> None:
    first = outcome.site.events("interval")[0]
    assert any(failure.startswith("client-1: ") for failure in first["failures"])
    text = outcome.site.programs["cloud"].text
    line = next(line for line in text.splitlines() if "interval  1 of" in line)
    assert "without client-1: " in line


def test_the_others_train_without_the_killed_client(outcome: Outcome) -> None:
    first, *others = outcome.site.events("interval")
    assert "client-0" in first["clients"]
    assert all("client-1" not in event["clients"] for event in others)
    assert others[-1]["clients"] == ["client-0", "client-2"]


def test_the_killed_edge_is_named(outcome: Outcome) -> None:
    intervals = outcome.site.events("interval")[1:]
    assert any(f.startswith("edge-1: ") for event in intervals for f in event["failures"])
    text = outcome.site.programs["cloud"].text
    assert any("without" in line and "edge-1: " in line for line in text.splitlines())
    assert intervals[-1]["edge_weights"] == {"edge-0": 1.0}


def test_the_late_client_trains(outcome: Outcome) -> None:
    assert "client-2" in outcome.site.events("interval")[-1]["clients"]
    assert "edge-0    client-2 joined" in outcome.site.programs["edge-0"].lines


def test_everyone_hears_the_end(outcome: Outcome) -> None:
    text = outcome.site.programs["cloud"].text
    assert f"finished; everything is in {outcome.site.run_dir}" in text
    assert json.loads((outcome.site.run_dir / "verdict.json").read_text("utf-8"))["exit_code"] == 0


def test_interrupting_local_ends_every_process(processes: Processes) -> None:
    program = processes.start(
        "local", "--edges", "2", "--clients", "3",
        "--classes-per-client", str(CLASSES_PER_CLIENT), "--run-dir", "run",
        *flags({**TINY, "schedule.intervals": MANY, "health.metrics": True}),
    )  # fmt: skip
    program.wait_line(r"interval +1 round 1")
    assert len(processes.groups()) == 7
    # What Prometheus is told answers.
    targets = json.loads((processes.folder / "run/prometheus-targets.json").read_text("utf-8"))
    assert [one["labels"]["tier"] for one in targets] == ["cloud", *["edge"] * 2, *["client"] * 3]
    for one in targets:
        assert f'role="{one["labels"]["tier"]}"' in scrape(one["targets"][0])
    program.process.send_signal(signal.SIGINT)
    assert program.wait_exit() == 130
    # It waited for none of the work, which would have taken hours, and for every process.
    processes.wait_gone()
    assert "interrupted" in program.lines[-1]
    assert program.lines[-2] == "to go on  the same command with --resume run"
    page = (processes.folder / "run/report.html").read_text("utf-8")
    assert "Interrupted" in page
    assert f"of {MANY} intervals" in page


def test_too_few_participants_are_named(processes: Processes) -> None:
    site = Site(processes, RUN)
    site.start("edge-0")
    site.programs["edge-0"].wait_line("listening on")
    client = site.start("client-0", edges=[site.address("edge-0")])
    client.wait_line("connected")
    cloud = site.start("cloud", **{"waits.start_s": 1.0, "schedule.min_clients": 3})
    assert cloud.wait_exit() == 4
    expected = "there are 1 of 2 edges (edge-0) and 1 of 3 clients (client-0)"
    assert expected in cloud.lines[-1]
    page = (site.run_dir / "report.html").read_text("utf-8")
    assert expected in page
    assert "too few participants (exit code 4)" in page
    # They are told why.
    for name in ("edge-0", "client-0"):
        assert site.programs[name].wait_exit() == 4
        assert expected in site.programs[name].lines[-1]
    processes.wait_gone()


def test_a_client_without_an_edge_gives_up(processes: Processes) -> None:
    site = Site(processes, RUN)
    client = site.start("client-0", **{"node.lost_after_s": 1.0})
    assert client.wait_exit() == 5
    assert "fedphd: no SuperLink at 127.0.0.1:" in client.lines[-1]
    for edge in EDGES:
        assert f"no SuperLink at {site.address(edge)} for 1 s" in client.text


def test_a_second_start_is_refused_and_harms_nothing(processes: Processes) -> None:
    site = Site(processes, {"schedule.intervals": MANY, "schedule.min_clients": 3}).begin()
    running = dict(site.programs)
    before = site.rounds("edge-0")
    for name in ("edge-0", "client-0", "cloud"):
        again = site.start(name)
        assert again.wait_exit() == 3
        assert f"process {running[name].pid} uses it; stop that process" in again.text
    assert (site.folder_of("client-0") / "health.json").exists()
    # All of them go on, and what the edge had written down is still there.
    wait_until(lambda: len(site.rounds("edge-0")) > len(before) + 4)
    assert site.rounds("edge-0")[: len(before)] == before
    assert [name for name, program in running.items() if program.process.poll() is not None] == []


@pytest.mark.parametrize("role", ["cloud", "edge"])
def test_a_port_in_use_is_named(processes: Processes, role: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        program = processes.start(role, "--insecure", "--address", address)
        assert program.wait_exit() == 3
    assert f"superlink.address = {address}: cannot listen there" in program.text


def test_a_wrong_configuration_is_refused(processes: Processes) -> None:
    path = write_toml(processes.folder / "cloud.toml", {"schedule.interval": 3})
    program = processes.start("cloud", "--config", str(path))
    assert program.wait_exit() == 2
    assert "schedule.interval: unknown key; did you mean 'schedule.intervals'?" in program.text
    assert not (processes.folder / "runs").exists()


def test_clients_that_leave_out_classes_are_refused(processes: Processes) -> None:
    program = processes.start("local", "--clients", "3", "--dry-run")
    assert program.wait_exit() == 2
    assert "use at least 5 parts (num_partitions), or 4 classes per part" in program.text
    assert "--clients (num_partitions) and --classes-per-client" in program.text
