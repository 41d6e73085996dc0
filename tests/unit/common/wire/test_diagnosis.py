"""Why a server does not let a node in, found by asking real sockets."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedphd.common.wire.diagnosis import explain
from fedphd.deploy.keys.authority import Authority, pem
from fedphd.deploy.keys.files import PrivateFormat, write_private_key


class Failure(grpc.RpcError):
    """A gRPC error that says what a test wants."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


AWAY = Failure(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses")


@contextmanager
def serving(context: ssl.SSLContext | None) -> Iterator[str]:
    """A server that greets whoever comes, by TLS or not at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                try:
                    link, _ = server.accept()
                except TimeoutError:
                    continue
                link.settimeout(5)
                with link:
                    try:
                        if context is None:
                            link.recv(10)
                            link.sendall(b"no TLS here")
                        else:
                            context.wrap_socket(link, server_side=True).close()
                    except OSError:
                        continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


def certified(folder: Path, host: str, *, days: int = 1) -> tuple[ssl.SSLContext, bytes]:
    """A server with a certificate for ``host``, and the authority that signed it."""
    folder.mkdir()
    authority, key = Authority.new(), ec.generate_private_key(ec.SECP384R1())
    authority.write(folder)
    certificate = authority.certify("server", key.public_key(), [host], days=days)
    write_private_key(folder / "key", key, PrivateFormat.PKCS8)
    (folder / "pem").write_bytes(pem(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pem", folder / "key")
    return context, (folder / "ca.pem").read_bytes()


def test_what_is_wrong_with_a_certificate_is_said(tmp_path: Path) -> None:
    good, ours = certified(tmp_path / "good", "127.0.0.1")
    expired, its_own = certified(tmp_path / "expired", "127.0.0.1", days=0)
    with serving(good) as address:
        # TLS is as it should be, so what gRPC says stands.
        assert explain(AWAY, address, ours).startswith("UNAVAILABLE: failed to connect")
        assert "its certificate is refused: " in explain(AWAY, address, its_own)
        assert explain(AWAY, address, None).startswith("it speaks TLS, this node plain text")
    with serving(expired) as address:
        assert "refused: certificate has expired; it must be" in explain(AWAY, address, its_own)
        assert explain(AWAY, address, None).startswith("it speaks TLS, this node plain text")


def test_an_authority_that_is_none_is_named() -> None:
    for content in (b"-", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        said = explain(AWAY, "127.0.0.1:1", content)
        assert said == "node.root_certificates holds no certificate in PEM"


def test_a_server_without_tls_is_recognised(tmp_path: Path) -> None:
    _, authority = certified(tmp_path / "site", "127.0.0.1")
    with serving(None) as address:
        assert explain(AWAY, address, authority).startswith("it speaks plain text, this node TLS")
        assert explain(AWAY, address, None).startswith("UNAVAILABLE: failed to connect")


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ("No SuperNode found with the given public key.", "it does not know this node's key"),
        ("SuperNode authentication is enabled. All must be registered.", "give node.private_key"),
        ("Invalid timestamp", "this machine's clock differs"),
        ("Invalid node ID", "it was started anew and does not know this node yet"),
        (
            "SuperNode with node ID 7 could not be activated.",
            "a process with this key (node.private_key) was there",
        ),
    ],
)
def test_what_flower_refuses_has_a_fix(details: str, text: str) -> None:
    refused = Failure(grpc.StatusCode.FAILED_PRECONDITION, details)
    assert text in explain(refused, "127.0.0.1:1", None)
    other = Failure(grpc.StatusCode.INTERNAL, "x" * 1000 + "\nsecond line")
    assert explain(other, "127.0.0.1:1", None) == ("INTERNAL: " + "x" * 1000)[:200]
