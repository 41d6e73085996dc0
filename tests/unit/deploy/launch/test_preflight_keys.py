"""Keys and authorities are checked before a run, whether a server answers or not."""

from __future__ import annotations

import datetime
import shutil
import socketserver
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from support.certificates import write_certificates
from support.processes import free_port

from fedphd.common.config.links import NodeConfig
from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.deploy.keys.authority import Authority, pem
from fedphd.deploy.keys.files import read_certificate, write_private_key
from fedphd.deploy.keys.registered import fingerprint
from fedphd.deploy.launch import preflight
from fedphd.deploy.launch.preflight import Check


class AnswersPlain(socketserver.StreamRequestHandler):
    """A web server that knows no TLS."""

    def handle(self) -> None:
        self.request.recv(1024)
        self.wfile.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


EC = ec.generate_private_key(ec.SECP384R1())


def node(root: Path, key: Path | None = None) -> dict[str, Check]:
    """What is found of a node whose server does not run yet."""
    away = f"127.0.0.1:{free_port()}"
    config = NodeConfig(root_certificates=root, private_key=key)
    found = {check.name: check for check in preflight._node(config, (away,))}
    assert found[f"reach {away}"].outcome == "warning"
    return found


def server(values: dict[str, str]) -> dict[str, Check]:
    address = {"superlink.address": f"127.0.0.1:{free_port()}"}
    config = load_config(CloudConfig, overrides={**values, **address}).superlink
    return {check.name: check for check in preflight._server(config, None)}


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    Authority.new().write(tmp_path)
    return tmp_path / "ca.pem"


def test_a_node_that_is_ready_has_its_authority_and_its_key(
    authority: Path, tmp_path: Path
) -> None:
    write_private_key(tmp_path / "a-node", EC, PrivateFormat.OpenSSH)
    found = node(authority, tmp_path / "a-node")
    assert found["authority"].outcome == "ok"
    assert found["authority"].found.startswith(f"{authority} is good from 20")
    # What the operator has registered is compared with it.
    assert found["node.private_key"] == Check(
        "node.private_key",
        "ok",
        f"{tmp_path / 'a-node'} has mode 0600: {fingerprint(EC.public_key())}",
    )


@pytest.mark.parametrize(
    ("mode", "outcome"),
    [
        # By its group a service's user reads a key, and a pod its secret.
        *((mode, "ok") for mode in (0o400, 0o600, 0o440, 0o640)),
        *((mode, "failed") for mode in (0o604, 0o644, 0o660, 0o602)),
    ],
)
def test_a_key_is_for_its_owner_and_perhaps_for_its_group_to_read(
    mode: int, outcome: str, tmp_path: Path
) -> None:
    key = tmp_path / "a-node"
    key.touch()
    key.chmod(mode)
    check = preflight._private(key, "node.private_key")
    assert (check.outcome, check.found) == (outcome, f"{key} has mode {mode:04o}")
    assert check.fix == ("" if outcome == "ok" else f"chmod 600 {key}")


def test_a_server_in_plain_text_is_said_and_not_asked_for_the_key(
    authority: Path, tmp_path: Path
) -> None:
    write_private_key(tmp_path / "a-node", EC, PrivateFormat.OpenSSH)
    config = NodeConfig(root_certificates=authority, private_key=tmp_path / "a-node")
    with socketserver.TCPServer(("127.0.0.1", 0), AnswersPlain) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        away = f"127.0.0.1:{plain.server_address[1]}"
        found = {check.name: check for check in preflight._node(config, (away,))}
        plain.shutdown()
    assert found[f"reach {away}"].found == "answers from 127.0.0.1"
    assert found[f"TLS {away}"] == Check(
        f"TLS {away}",
        "failed",
        "it does not speak TLS, as this node does",
        "give the server superlink.ssl_certfile, or correct the address",
    )
    assert f"key registered {away}" not in found


def test_a_server_is_not_blamed_for_an_authority_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("nonsense")
    with socketserver.TCPServer(("127.0.0.1", 0), AnswersPlain) as plain:
        away = f"127.0.0.1:{plain.server_address[1]}"
        for name in ("bad.pem", "none.pem"):
            config = NodeConfig(root_certificates=tmp_path / name)
            found = {check.name: check for check in preflight._node(config, (away,))}
            assert found[f"TLS {away}"].outcome == "skipped"
            assert found["authority"].outcome == "failed"


def test_a_servers_authority_that_ends_soon_is_a_warning(tmp_path: Path) -> None:
    # Good for two days.
    check = server(write_certificates(tmp_path))["authority"]
    assert check.outcome == "warning"
    assert "make another, and certificates of it" in check.fix


def test_an_authority_that_is_none_fails(tmp_path: Path) -> None:
    check = node(tmp_path / "none.pem")["authority"]
    assert check.outcome == "failed"
    assert check.found == f"{tmp_path / 'none.pem'}: cannot be read: No such file or directory"
    (tmp_path / "bad.pem").write_text("nonsense")
    check = node(tmp_path / "bad.pem")["authority"]
    assert (check.outcome, "bad.pem: is not a certificate in PEM" in check.found) == (
        "failed",
        True,
    )


def test_an_authority_that_has_expired_fails(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days, outcome in ((3600, "ok"), (3640, "warning"), (3651, "failed")):
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        with monkeypatch.context() as patch:
            patch.setattr(preflight, "_now", lambda now=now: now)
            check = node(authority)["authority"]
        assert (check.outcome, bool(check.fix)) == (outcome, outcome != "ok")


def test_a_certificate_that_is_not_good_yet_is_a_matter_of_clocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = write_certificates(tmp_path)
    path = tmp_path / "server.pem"
    begin = read_certificate(path).not_valid_before_utc
    before = begin - datetime.timedelta(minutes=2)
    monkeypatch.setattr(preflight, "_now", lambda: before)
    check = server(values)["certificate"]
    text = f"is good from {begin:%Y-%m-%d %H:%M} UTC; it is {before:%Y-%m-%d %H:%M} UTC here"
    assert (check.outcome, check.found) == ("failed", f"{path} {text}")
    assert check.fix == "this machine's clock or the signer's is wrong: correct it"


def test_of_two_authorities_the_one_that_lasts_counts(authority: Path) -> None:
    old = Authority.new(days=0)
    authority.write_bytes(pem(old.certificate) + authority.read_bytes())
    assert node(authority)["authority"].outcome == "ok"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"nonsense", "is not an OpenSSH private key"),
        (EC.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "is not an OpenSSH"),
        (
            ed25519.Ed25519PrivateKey.generate().private_bytes(
                Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
            ),
            "is not an EC key; make one with `fedphd keys request`",
        ),
    ],
)
def test_a_key_that_no_node_can_use_fails(
    content: bytes, text: str, authority: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a-node"
    path.write_bytes(content)
    path.chmod(0o600)
    check = node(authority, path)["node.private_key"]
    assert check.outcome == "failed"
    assert f"{path}: {text}" in check.found
    assert "`fedphd keys request`" in check.fix


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_key_with_a_password_fails(authority: Path, tmp_path: Path) -> None:
    path = tmp_path / "a-node"
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", str(path)]
    subprocess.run(command, check=True)
    check = node(authority, path)["node.private_key"]
    assert check.outcome == "failed"
    assert "a-node: has a password, for which nobody could be asked" in check.found


def test_a_servers_authority_is_the_one_that_signed_it(tmp_path: Path) -> None:
    values = write_certificates(tmp_path)
    found = server(values)
    assert found["certificate's key"].outcome == found["certificate's authority"].outcome == "ok"
    Authority.new().write(tmp_path / "other")
    found = server({**values, "superlink.ssl_ca_certfile": str(tmp_path / "other/ca.pem")})
    check = found["certificate's authority"]
    assert (check.outcome, "server.pem is not signed by" in check.found) == ("failed", True)
    assert found["certificate's key"].outcome == "ok"
