"""Requests and keys that somebody made in order to deceive, or to end who reads them."""

from __future__ import annotations

import base64
import ipaddress
import struct
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from support.command import fedphd

from fedphd.common.errors import ConfigError
from fedphd.deploy.keys.authority import Authority, name_of
from fedphd.deploy.keys.files import read_public_key
from fedphd.deploy.keys.registered import register, registered, revoke
from fedphd.deploy.keys.requests import JoinRequest, make_request

KEY = ec.generate_private_key(ec.SECP384R1())
# It moves up a line, and clears it: what was there is not seen.
HIDING = "x.example.org\x1b[1A\x1b[2K"


def asking_for(*names: x509.GeneralName, name: str = "hospital-7") -> bytes:
    """A request of one who signs what ``fedphd keys request`` would not make."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(name_of(name))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.PEM)


def altered(request: bytes, old: bytes, new: bytes) -> bytes:
    """The request with other bytes within."""
    lines = request.splitlines(keepends=True)
    content = base64.b64decode(b"".join(lines[1:-1]))
    assert content.count(old) == 1
    return lines[0] + base64.encodebytes(content.replace(old, new)) + lines[-1]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ([x509.DNSName("cloud.example.org"), x509.DNSName(HIDING)], r"\\x1b\[2K' is not a host"),
        ([x509.DNSName("a, b")], r"'a, b' is not a host"),
        ([x509.DNSName("*.example.org")], r"'\*.example.org' is not a host"),
        ([x509.DNSName("")], r"'' is not a host"),
        ([x509.UniformResourceIdentifier(f"https://{HIDING}")], r"UniformResourceIdentifier 'htt"),
        ([x509.RFC822Name("a@b")], r"asks for the RFC822Name 'a@b'; a server is certified for h"),
        ([x509.DirectoryName(name_of(HIDING))], r"asks for the DirectoryName '<Name\(CN=x.ex"),
        ([x509.IPAddress(ipaddress.ip_network("10.0.0.0/8"))], r"'10.0.0.0/8' is not a host"),
        ([x509.DNSName(f"h{n}") for n in range(40)], r"40 hosts are named; name 32 at the most"),
    ],
)
def test_a_request_asks_for_hosts_that_can_be_shown(
    asked: list[x509.GeneralName], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "r"
    path.write_bytes(asking_for(*asked))
    with pytest.raises(ConfigError, match=why) as refused:
        JoinRequest.read(path)
    assert str(refused.value).isprintable()


def test_a_request_has_one_key_for_each_purpose(tmp_path: Path) -> None:
    path, host = tmp_path / "r", x509.DNSName("h")
    for content, why in (
        (asking_for(host) + asking_for(x509.DNSName("i")), "0 keys of nodes and 2 of servers"),
        (asking_for(host) * 2, "0 keys of nodes and 2 of servers"),
        (asking_for() * 2, "2 keys of nodes and 0 of servers"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=why):
            JoinRequest.read(path)
    path.write_bytes(asking_for() + asking_for(host))
    assert JoinRequest.read(path).hosts == ("h",)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # A version that there is not, a name of a type that nobody knows, an x400Address.
        (b"\x02\x01\x000", b"\x02\x01\x3e0"),
        (b"\x0c\x0ahospital-7", b"\x83\x0ahospital-7"),
        (b"\x82\x0dh.example.org", b"\xa3\x0dh.example.org"),
    ],
)
def test_requests_that_nobody_can_read_are_refused(old: bytes, new: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_bytes(altered(asking_for(x509.DNSName("h.example.org")), old, new))
    with pytest.raises(ConfigError, match=r"r: is not a request of `fedphd keys request`: "):
        JoinRequest.read(path)


def compressed() -> bytes:
    """An OpenSSH public key whose point is written in the short form, which is not supported."""
    point = b"\x02" + KEY.public_key().public_numbers().x.to_bytes(48, "big")
    parts = (b"ecdsa-sha2-nistp384", b"nistp384", point)
    blob = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    return b"ecdsa-sha2-nistp384 " + base64.b64encode(blob) + b" a\n"


def test_a_public_key_of_a_form_that_is_not_supported_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pub").write_bytes(compressed())
    with pytest.raises(ConfigError, match=r"a.pub: is not an OpenSSH public key"):
        read_public_key(tmp_path / "a.pub")


def test_a_name_stays_within_the_folder_of_keys(tmp_path: Path) -> None:
    folder, key = tmp_path / "keys", KEY.public_key()
    for name in ("../evil", "hospital 7", "", "a/b", "a\x1b[2J"):
        with pytest.raises(ConfigError, match=r"is not a valid name; use 1 to 64") as refused:
            register(folder, name, key)
        assert str(refused.value).isprintable()
    assert list(tmp_path.iterdir()) == []
    register(folder, "a", key)
    outside = tmp_path / "outside.pub"
    outside.write_bytes((folder / "a.pub").read_bytes())
    with pytest.raises(ConfigError, match=r"has no key of '../outside'; it has those of a"):
        revoke(folder, "../outside")
    assert outside.exists()


def test_a_file_that_names_nobody_is_named_and_can_be_taken_away(tmp_path: Path) -> None:
    register(tmp_path, "a", KEY.public_key())
    (tmp_path / "a.pub").rename(tmp_path / "a\x1b[2J.pub")
    with pytest.raises(ConfigError, match=r"'a\\x1b\[2J.pub' names nobody: .* remove") as refused:
        registered(tmp_path)
    assert str(refused.value).isprintable()
    revoke(tmp_path, "a\x1b[2J")
    assert registered(tmp_path) == {}


def test_who_asks_to_be_a_server_is_shown_as_one(tmp_path: Path) -> None:
    Authority.new().write(tmp_path / "authority")
    make_request(tmp_path, "client", "a")
    (tmp_path / "b.request").write_bytes(asking_for(x509.DNSName("cloud.example.org"), name="b"))
    sign = ("--node-keys", "in", "--yes")
    client = fedphd("keys", "sign", "a.request", *sign, cwd=tmp_path)
    assert (client.returncode, "SERVER" in client.stdout) == (0, False)
    lines = fedphd("keys", "sign", "b.request", *sign, cwd=tmp_path).stdout.splitlines()
    caution = next(n for n, line in enumerate(lines) if line.startswith("CAUTION"))
    assert "asks to be a SERVER" in lines[caution]
    assert lines[caution + 2] == "  cloud.example.org"


def test_what_would_hide_a_host_is_not_signed(tmp_path: Path) -> None:
    Authority.new().write(tmp_path / "authority")
    names = x509.DNSName("cloud.example.org"), x509.DNSName(HIDING)
    (tmp_path / "r").write_bytes(asking_for(*names))
    done = fedphd("keys", "sign", "r", "--node-keys", "in", "--yes", cwd=tmp_path)
    assert done.returncode == 2
    assert "\x1b" not in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.pem"))
