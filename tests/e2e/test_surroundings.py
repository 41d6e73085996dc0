"""A federation on one machine, whatever the user's environment and current folder hold."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.processes import Processes
from support.site import Site
from support.tiny import TINY, flags

FEDPHD = str(Path(sys.executable).parent / "fedphd")
RUN = {**TINY, "schedule.intervals": 1, "pruning.mode": "none"}
LOOPBACK = b"127.0.0.1"
PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A proxy that the environment names, and that nobody must ask for this machine."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        listener.setblocking(False)
        for name in PROXIES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield
        # What it is asked first names where to. What a library wants of the internet is its matter,
        # and other tests connect to ports at which they think nobody listens.
        assert [asked for asked in _asked(listener) if LOOPBACK in asked] == []


def _asked(listener: socket.socket) -> Iterator[bytes]:
    """What all who have connected so far said first."""
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        with connection:
            connection.settimeout(5.0)
            with suppress(OSError):
                yield connection.recv(4096)


def test_proxies_and_files_named_like_libraries_are_nothing_to_it(
    processes: Processes, proxied: None
) -> None:
    for name in ("random", "torch", "numpy", "flwr", "datasets"):
        text = f"raise SystemExit('{name}.py of the current folder was imported')\n"
        (processes.folder / f"{name}.py").write_text(text, "utf-8")
    settings = flags(RUN)
    command = [
        FEDPHD,
        "local",
        "--edges",
        "1",
        "--clients",
        "1",
        "--classes-per-client",
        "10",
        "--plain",
        "--no-report",
    ]
    program = processes.start_command([*command, *settings, "--run-dir", "run"], os.environ)
    program.wait_line(r"client-0 joined|client-0 .*connected")
    status = processes.start_command([FEDPHD, "status", "--folder", "run"], os.environ)
    assert status.wait_exit() in (0, 1), status.text
    assert "cloud" in status.text
    assert program.wait_exit() == 0, program.text


def test_roles_that_are_started_by_hand_pass_a_proxy_by(
    processes: Processes, proxied: None
) -> None:
    site = Site(
        processes, {**RUN, "schedule.num_edges": 1, "schedule.min_clients": 1}, edges=("edge-0",)
    )
    for name in ("edge-0", "client-0", "cloud"):
        site.start(name)
    assert site.programs["cloud"].wait_exit() == 0, site.programs["cloud"].text
    codes = {name: program.wait_exit() for name, program in site.programs.items()}
    assert codes == dict.fromkeys(codes, 0), site.programs["cloud"].text
