"""Health over real HTTP, and the tree that is drawn from it."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from rich.console import Console
from support.command import fedphd

from fedphd.common.config.links import HealthConfig
from fedphd.common.config.roles import EdgeConfig, load_config
from fedphd.common.errors import ConfigError, ConnectionLostError
from fedphd.common.history.events import SERVES, LinkChanged, PeerChanged, Started
from fedphd.common.history.status import StatusBoard
from fedphd.deploy.cli.status import ask, draw, find
from fedphd.deploy.launch import health
from fedphd.deploy.launch.health import HEALTH, MOST_CONNECTIONS, HealthAddress, serving


def get(address: str, path: str) -> tuple[int, dict[str, object]]:
    try:
        with urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())


def edge_board() -> StatusBoard:
    board = StatusBoard("edge", "edge-0")
    board.event(Started(pid=1))
    board.event(PeerChanged(peer="client-1", change="joined", detail="", time=100.0))
    return board


def test_live_and_ready_are_codes(tmp_path: Path) -> None:
    board = edge_board()
    with serving(HealthConfig(), board, tmp_path / "edge-0") as address:
        assert address is not None
        assert get(address, "/live") == (200, {"live": True})
        expected = {"ready": False, "reason": "it is connected to no server"}
        assert get(address, "/ready") == (503, expected)
        board.event(LinkChanged(server="c:1", change="connected"))
        assert get(address, "/ready") == (200, {"ready": True, "reason": ""})
        assert get(address, "/status")[1]["node"] == "edge-0"
        assert get(address, "/")[0] == 404
        assert [found.address for found in find(tmp_path)] == [address]
    assert not (tmp_path / "edge-0" / HEALTH).exists()
    with pytest.raises(ConnectionLostError, match="no process answers"):
        ask(address)


def test_a_supervisors_question_copies_no_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = edge_board()
    with serving(HealthConfig(), board, tmp_path) as address:
        assert address is not None
        monkeypatch.setattr(board, "snapshot", lambda: pytest.fail("copied"))
        assert (get(address, "/live")[0], get(address, "/ready")[0]) == (200, 503)


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def until(true: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 10
    while not true() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return true()


def test_who_connects_and_says_nothing_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert health._Handler.timeout == health.SILENCE_S
    monkeypatch.setattr(health._Handler, "timeout", 0.2)
    with serving(HealthConfig(), edge_board(), tmp_path) as address:
        assert address is not None
        with connect(address) as silent, connect(address) as slow:
            slow.sendall(b"GET /live HT")
            assert (silent.recv(1), slow.recv(1)) == (b"", b"")


def test_silent_connections_neither_pile_up_nor_keep_a_supervisor_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = threading.active_count()
    with serving(HealthConfig(), edge_board(), tmp_path) as address:
        assert address is not None
        silent = [connect(address) for _ in range(3 * MOST_CONNECTIONS)]
        try:
            # All of them have been taken on by now, since they wait in line.
            assert get(address, "/live") == (200, {"live": True})
            assert threading.active_count() - before <= MOST_CONNECTIONS + 1
            # The oldest have made room.
            assert silent[0].recv(1) == b""
            assert get(address, "/ready")[0] == 503
        finally:
            for one in silent:
                one.close()
        assert until(lambda: threading.active_count() - before <= 1)
    assert capfd.readouterr().err == ""


def test_where_no_room_can_be_made_a_connection_is_closed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = threading.Semaphore(0), threading.Event()

    def slow(handler: health._Handler) -> None:
        asked.release()
        go_on.wait(10)
        handler._answer(True, {})

    monkeypatch.setattr(health._Handler, "do_GET", slow)
    monkeypatch.setattr(health, "MAKE_ROOM_S", 0.05)
    with serving(HealthConfig(), edge_board(), tmp_path) as address:
        assert address is not None
        at_work = [connect(address) for _ in range(MOST_CONNECTIONS)]
        for one in at_work:
            one.sendall(b"GET /live HTTP/1.0\r\n\r\n")
            assert asked.acquire(timeout=10)
        with connect(address) as more:
            assert more.recv(1) == b""
        go_on.set()
        assert at_work[-1].recv(4) == b"HTTP"
        for one in at_work:
            one.close()
        assert until(lambda: get(address, "/live")[0] == 200)


def test_an_address_in_use_does_not_keep_anybody_from_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = HealthConfig(address=f"127.0.0.1:{taken.getsockname()[1]}")
        with serving(config, edge_board(), tmp_path) as address:
            assert address is None
    assert "nothing answers there" in caplog.text


def test_it_can_be_switched_off_and_a_wrong_address_is_refused(tmp_path: Path) -> None:
    with serving(HealthConfig(address=None), edge_board(), tmp_path) as address:
        assert address is None
    with pytest.raises(ConfigError, match=r"health.address: 'here' is not an address"):
        load_config(EdgeConfig, overrides={"health.address": "here"})


@pytest.mark.parametrize("address", ["here:0", "[::1]:0", "10.0.0.1:8080"])
def test_addresses_that_it_may_have(address: str) -> None:
    assert HealthConfig(address=address).address == address


@pytest.mark.parametrize("address", [":0", "a b:0", "::1:0", "http://here:0", "here:65536"])
def test_port_0_needs_a_host_too(address: str) -> None:
    text = f"health.address: '{address}' is not an address; write host:port with a port from 0"
    with pytest.raises(ConfigError, match=re.escape(text)):
        load_config(EdgeConfig, overrides={"health.address": address})


def test_it_answers_over_ipv6(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    config = HealthConfig(address="[::1]:0")
    with serving(config, edge_board(), tmp_path / "edge-0") as address:
        assert address is not None
        assert address.startswith("[::1]:")
        assert not address.endswith(":0")
        assert ask(address).node == "edge-0"
        done = fedphd("status", cwd=tmp_path)
        assert "edge-0 not ready" in done.stdout
        # Where it is taken, that is said of IPv6 as of IPv4.
        with serving(HealthConfig(address=address), edge_board(), tmp_path / "other") as second:
            assert second is None


def test_a_proxy_is_not_asked_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(HealthConfig(), edge_board(), tmp_path / "edge-0") as address:
        assert address is not None
        assert ask(address).node == "edge-0"


@pytest.mark.parametrize("content", [b"", b"{", b"\0\0", b"[1]", b'{"address": 1}', b"\xff"])
def test_a_broken_file_is_named_beside_those_that_answer(tmp_path: Path, content: bytes) -> None:
    broken = tmp_path / "client-0" / HEALTH
    broken.parent.mkdir()
    broken.write_bytes(content)
    done = fedphd("status", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (5, "")
    assert f"client-0/{HEALTH}: names no health address" in done.stdout
    with serving(HealthConfig(), edge_board(), tmp_path / "edge-0"):
        done = fedphd("status", cwd=tmp_path)
        assert "edge-0 not ready" in done.stdout
        assert f"client-0/{HEALTH}: names no health address" in done.stdout
        done = fedphd("status", "--json", cwd=tmp_path)
    assert [one["node"] for one in json.loads(done.stdout)] == ["edge-0"]
    assert f"client-0/{HEALTH}: names no health address" in done.stderr


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"no such thing as HTTP\r\n\r\n", "no process answers: no such thing as HTTP"),
        (b"", "no process answers: Remote end closed connection without response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "no process answers: Incomplete"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "what answers there is no fedphd"),
    ],
)
def test_what_else_answers_is_an_error_in_words(said: bytes, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            with listener.accept()[0] as link:
                link.recv(4096)
                link.sendall(said)

        pool.submit(answer)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionLostError, match=f"^{address}: {why}"):
            ask(address)


def test_an_address_that_cannot_be_asked_is_an_error_in_words() -> None:
    with pytest.raises(ConnectionLostError, match=r"^here and there:1: no process answers: "):
        ask("here and there:1")


def test_the_tree_has_clients_below_their_edges(tmp_path: Path) -> None:
    cloud, edge = StatusBoard("cloud", "cloud"), edge_board()
    cloud.event(Started(pid=1))
    for name in ("edge-0", "edge-1"):
        cloud.event(PeerChanged(peer=name, change="joined", detail="", time=100.0))
    cloud.event(PeerChanged(peer="edge-1", change=SERVES, detail="client-8", time=100.0))
    cloud.event(PeerChanged(peer="edge-1", change="failed", detail="late", time=101.0))
    edge.event(LinkChanged(server="c:1", change="connected"))
    console = Console(width=200)
    with console.capture() as captured:
        for tree in draw([cloud.snapshot(), edge.snapshot()], now=160.0):
            console.print(tree)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    version = cloud.snapshot().version
    assert lines == [
        f"cloud ready | fedphd {version}",
        f"├── edge-0 ready | c:1 connected | fedphd {version}",
        "│   └── client-1 connected | seen 60 s ago",
        "└── edge-1 failed: late | seen 59 s ago",
        "    └── client-8",
    ]


def test_in_a_folder_of_runs_it_finds_the_newest(tmp_path: Path) -> None:
    for number, run in enumerate(("20261101-120000", "20261102-120000")):
        for name in ("cloud", "edge-0"):
            state = tmp_path / "runs" / run / "state" / name
            state.mkdir(parents=True)
            found = HealthAddress(node=name, role=name.partition("-")[0], address=f"a:{number}")
            (state / HEALTH).write_text(found.model_dump_json(), "utf-8")
        os.utime(tmp_path / "runs" / run, (number, number))
    for folder in (tmp_path, tmp_path / "runs", tmp_path / "runs/20261102-120000"):
        assert [(one.node, one.address) for one in find(folder)] == [
            ("cloud", "a:1"), ("edge-0", "a:1"),
        ]  # fmt: skip


def test_the_command_names_what_is_missing(tmp_path: Path) -> None:
    done = fedphd("status", cwd=tmp_path)
    assert done.returncode == 1
    assert "no running process has its state below" in done.stderr
    done = fedphd("status", "--address", "127.0.0.1:1", cwd=tmp_path)
    assert done.returncode == 5
    assert "127.0.0.1:1: no process answers: Connection refused" in done.stdout
    done = fedphd("status", "--address", "localhost", cwd=tmp_path)
    assert done.returncode == 2
    assert "--address = localhost: is not an address; write host:port" in done.stderr


def test_a_process_that_was_killed_is_named(tmp_path: Path) -> None:
    left = tmp_path / "cloud" / HEALTH
    left.parent.mkdir()
    gone = HealthAddress(address="127.0.0.1:1", role="cloud", node="cloud")
    left.write_text(gone.model_dump_json(), "utf-8")
    done = fedphd("status", cwd=tmp_path)
    assert done.returncode == 5
    assert "cloud was killed, or hangs: 127.0.0.1:1: no process answers" in done.stdout


def test_why_a_client_is_below_two_edges_is_said(tmp_path: Path) -> None:
    other = StatusBoard("edge", "edge-1")
    other.event(PeerChanged(peer="client-1", change="joined", detail="", time=100.0))
    why = "A client is connected to every edge that it may choose."
    with serving(HealthConfig(), edge_board(), tmp_path / "edge-0"):
        assert why not in fedphd("status", cwd=tmp_path).stdout
        with serving(HealthConfig(), other, tmp_path / "edge-1"):
            shown = fedphd("status", cwd=tmp_path).stdout
    assert shown.count("client-1 connected") == 2
    assert why in shown


def test_the_command_prints_json(tmp_path: Path) -> None:
    with serving(HealthConfig(), edge_board(), tmp_path / "edge-0"):
        done = fedphd("status", "--json", cwd=tmp_path)
    # Not ready: a script can use the code.
    assert done.returncode == 1, done.stderr
    (answer,) = json.loads(done.stdout)
    assert (answer["node"], answer["ready"]) == ("edge-0", False)
