"""Which servers a node reaches without the proxy that its environment names."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from fedphd.common.wire.channel import is_loopback, open_channel


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "localhost", "LocalHost", "[::1]"])
def test_this_machines_own_addresses(host: str) -> None:
    assert is_loopback(f"{host}:9092")


@pytest.mark.parametrize("host", ["10.0.0.1", "edge.example.org", "[fd00::1]", "127.example.org"])
def test_addresses_of_others(host: str) -> None:
    assert not is_loopback(f"{host}:9092")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A proxy that says nothing, and that the environment names."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield listener


def test_loopback_is_reached_without_the_proxy(proxy: socket.socket) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        channel = open_channel(f"127.0.0.1:{port}", None)
        with channel, pytest.raises(grpc.RpcError) as answered:
            channel.unary_unary("/nobody/Serves")(b"", timeout=60, wait_for_ready=True)
        assert answered.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        server.stop(None).wait()
    proxy.setblocking(False)
    with pytest.raises(BlockingIOError):
        proxy.accept()


def test_others_are_reached_through_the_proxy(proxy: socket.socket) -> None:
    proxy.settimeout(60)
    with open_channel("edge.example.org:9192", None) as channel:
        call = channel.unary_unary("/nobody/Serves").future(b"", wait_for_ready=True)
        with proxy.accept()[0] as asked:
            assert asked.recv(200).startswith(b"CONNECT edge.example.org:9192 HTTP/1.1")
        call.cancel()
