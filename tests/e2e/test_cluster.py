"""The compose cluster, looked at from outside: `make cluster`.

Wants a Docker engine with compose, and BASE, TORCH and PIP_FLAGS of ``deploy/Dockerfile`` in the
environment where its defaults cannot be had.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.tiny import events

COMPOSE_FILE = Path(__file__).parents[2] / "deploy/compose.yaml"
SERVERS = ("cloud", "edge-0", "edge-1")
CLIENTS = ("client-0", "client-1", "client-2", "client-3")
EVERYBODY = (*SERVERS, *CLIENTS)
INTERVALS = 12
READY_S = 240.0
RUN_S = 2400.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(READY_S + RUN_S + 1800)]


def output_of(*command: str) -> str | None:
    """What a command prints; None where it fails or is not installed."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else None


def compose_command() -> list[str]:
    """The compose that is here; skips the test where nothing can run it."""
    if output_of("docker", "info") is None:
        pytest.skip("no Docker engine answers: `docker info` fails")
    for command in (["docker", "compose"], ["docker-compose"]):
        if output_of(*command, "version") is not None:
            return command
    pytest.skip("neither `docker compose` nor `docker-compose` is installed")


@dataclass
class Cluster:
    """The containers of one project of compose."""

    compose: list[str]
    project: str

    def docker(self, *words: str, check: bool = True) -> str:
        """What ``docker`` prints."""
        done = subprocess.run(
            ["docker", *words], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0 or not check, f"docker {words}: {done.stdout}{done.stderr}"
        return done.stdout

    def run_compose(self, *words: str) -> None:
        """Run compose on the file, its output on the terminal."""
        command = [*self.compose, "-p", self.project, "-f", str(COMPOSE_FILE), *words]
        subprocess.run(command, check=True, timeout=1800)

    def container(self, service: str) -> str:
        """The id of a service's container."""
        found = self.docker(
            "ps", "--all", "--quiet",
            "--filter", f"label=com.docker.compose.project={self.project}",
            "--filter", f"label=com.docker.compose.service={service}",
        ).split()  # fmt: skip
        assert len(found) == 1, f"{service}: containers {found}"
        return found[0]

    def seen(self, service: str) -> dict[str, Any]:
        """What ``docker inspect`` says of a service's container."""
        answer: list[dict[str, Any]] = json.loads(self.docker("inspect", self.container(service)))
        return answer[0]

    def inside(self, service: str, *words: str, check: bool = True) -> str:
        """What a command prints in a service's container."""
        return self.docker("exec", self.container(service), *words, check=check)

    def python(self, service: str, program: str) -> str:
        """What a Python program prints in a service's container."""
        return self.inside(service, "python", "-c", program).strip()

    def address(self, service: str) -> str:
        """An IP address of a service's container."""
        networks = self.seen(service)["NetworkSettings"]["Networks"].values()
        return str(next(network["IPAddress"] for network in networks))

    def wait_until(self, what: str, holds: Callable[[], bool], limit_s: float) -> None:
        """Look every two seconds until something holds."""
        deadline = time.monotonic() + limit_s
        while not holds():
            assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
            time.sleep(2.0)

    def healthy(self, service: str) -> bool:
        """Whether a service's container says that it is ready."""
        state = self.seen(service)["State"]
        return bool(state["Running"]) and state["Health"]["Status"] == "healthy"

    def ended(self, service: str) -> bool:
        """Whether a service's container has ended, and is not to be started again."""
        return bool(self.seen(service)["State"]["Status"] == "exited")

    def logs(self, service: str) -> str:
        """Everything that a service has said."""
        done = subprocess.run(
            ["docker", "logs", self.container(service)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout

    def kill_and_await(self, service: str) -> None:
        """Kill all that runs in a container; it has to come back by itself.

        `docker kill` would count as a wish that it stays away.
        """
        before = self.seen(service)["RestartCount"]
        self.inside(service, "sh", "-c", "kill -9 -1", check=False)
        self.wait_until(
            f"{service} is started again",
            lambda: self.seen(service)["RestartCount"] > before,
            60.0,
        )
        self.wait_until(f"{service} is ready again", partial(self.healthy, service), READY_S)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """The cluster, built and started; nothing of it is left when the test ends."""
    made = Cluster(compose_command(), f"fedphd-test-{os.getpid()}")
    try:
        made.run_compose("build", "keys")
        made.run_compose("up", "-d")
        yield made
    finally:
        made.run_compose("down", "--volumes", "--timeout", "20")


# Prints whether a connection comes about; a name that nobody knows is "no" as well.
CONNECT = """
import socket
try:
    socket.create_connection(({host!r}, {port}), 5).close()
except OSError:
    print('no')
else:
    print('yes')
"""


def check_networks(cluster: Cluster) -> None:
    """Clients reach edges and nothing else, edges the cloud."""
    cloud = cluster.address("cloud")

    def reaches(service: str, host: str, port: int) -> bool:
        return cluster.python(service, CONNECT.format(host=host, port=port)) == "yes"

    assert reaches("edge-0", "cloud", 9092)
    assert reaches("edge-0", cloud, 9092)
    for client in CLIENTS:
        assert reaches(client, "edge-0", 9192)
        assert reaches(client, "edge-1", 9192)
        assert not reaches(client, "cloud", 9092)
        assert not reaches(client, cloud, 9092)
        assert not reaches(client, cloud, 8080)


def check_rights(cluster: Cluster) -> None:
    """Nobody is root, and nobody has somebody else's keys."""
    for service in EVERYBODY:
        assert cluster.inside(service, "id", "-u").strip() == "10001"
        writable = cluster.python(
            service, "import os; print(os.access('/opt', os.W_OK), os.access('/keys', os.W_OK))"
        )
        assert writable == "False False"
    for client in CLIENTS:
        assert cluster.inside(client, "ls", "/keys").split() == ["ca.pem", "node"]
    edges = cluster.inside("cloud", "ls", "/keys/nodes").split()
    assert edges == ["edge-0.pub", "edge-1.pub"]


def test_the_cluster_trains_the_digits(cluster: Cluster, tmp_path: Path) -> None:
    for service in EVERYBODY:
        cluster.wait_until(f"{service} is ready", partial(cluster.healthy, service), READY_S)
    check_networks(cluster)
    check_rights(cluster)

    cluster.wait_until(
        "the second interval", lambda: f"interval  2 of {INTERVALS}" in cluster.logs("cloud"), RUN_S
    )
    for service in ("client-2", "edge-1", "cloud"):
        cluster.kill_and_await(service)

    for service in EVERYBODY:
        cluster.wait_until(f"{service} ends", partial(cluster.ended, service), RUN_S)
    codes = {service: cluster.seen(service)["State"]["ExitCode"] for service in EVERYBODY}
    assert codes == dict.fromkeys(EVERYBODY, 0)

    cluster.docker("cp", f"{cluster.container('cloud')}:/data/run", str(tmp_path / "run"))
    check_run(tmp_path / "run")


def check_run(run: Path) -> None:
    """It is whole: every interval once, pruned, with pictures that are not all the same."""
    finished = [e["interval"] for e in events(run / "metrics.jsonl") if e["event"] == "interval"]
    assert finished == list(range(1, INTERVALS + 1))
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert summary["parameters"]["after"] < summary["parameters"]["before"]
    with Image.open(run / "samples.png") as grid:
        low, high = grid.convert("L").getextrema()
    assert (low, high) == pytest.approx((0, 255), abs=40)
