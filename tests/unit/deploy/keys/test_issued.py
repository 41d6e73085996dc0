"""A server's certificate and the authority that it is checked against."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.certificates import write_certificates
from support.command import fedphd
from support.processes import free_port
from support.tiny import write_toml

from fedphd.common.errors import ConfigError
from fedphd.deploy.keys.authority import Authority, alternative_names, name_of, pem
from fedphd.deploy.keys.files import (
    PrivateFormat,
    PrivateKey,
    check_fits,
    check_issued,
    hosts_of,
    read_certificate,
    read_latest,
    write_private_key,
)

ANOTHER = r"is not signed by superlink.ssl_ca_certfile = .*; name the authority that signed it"


def new_key() -> PrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def write(path: Path, *certificates: x509.Certificate) -> Path:
    path.write_bytes(b"".join(pem(certificate) for certificate in certificates))
    return path


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    # Of one name: it is the signature that tells them apart.
    own, other = Authority.new(), Authority.new()
    server = write(tmp_path / "s.pem", own.certify("s", new_key().public_key(), ["h"]))
    check_issued(server, write(tmp_path / "own.pem", own.certificate))
    check_issued(server, write(tmp_path / "both.pem", other.certificate, own.certificate))
    for authority in (other, Authority.new(name="Another")):
        with pytest.raises(ConfigError, match=f"ssl_certfile = {server} {ANOTHER}"):
            check_issued(server, write(tmp_path / "other.pem", authority.certificate))


def test_an_authority_that_has_expired_is_refused(tmp_path: Path) -> None:
    old = Authority.new(days=0)
    server = write(tmp_path / "s.pem", old.certify("s", new_key().public_key(), ["h"]))
    text = r"ssl_ca_certfile = .*old.pem: has expired on 20\d\d-\d\d-\d\d; make a new authority"
    with pytest.raises(ConfigError, match=text):
        check_issued(server, write(tmp_path / "old.pem", old.certificate))


def test_a_certificate_may_bring_what_leads_to_its_authority(tmp_path: Path) -> None:
    root, key = Authority.new(), new_key()
    now = datetime.datetime.now(datetime.UTC)
    between = Authority(
        x509.CertificateBuilder(
            root.certificate.subject,
            name_of("Between"),
            key.public_key(),
            x509.random_serial_number(),
            now,
            now + datetime.timedelta(days=1),
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(root.key, hashes.SHA256()),
        key,
    )
    signed = between.certify("s", new_key().public_key(), ["h"])
    authority = write(tmp_path / "ca.pem", root.certificate)
    check_issued(write(tmp_path / "chain.pem", signed, between.certificate), authority)
    with pytest.raises(ConfigError, match=ANOTHER):
        check_issued(write(tmp_path / "alone.pem", signed), authority)


def test_a_process_ends_at_once_where_another_authority_signed_its_certificate(
    tmp_path: Path,
) -> None:
    values = write_certificates(tmp_path)
    Authority.new().write(tmp_path / "other")
    address = f"127.0.0.1:{free_port()}"
    values |= {
        "superlink.ssl_ca_certfile": str(tmp_path / "other/ca.pem"),
        "superlink.address": address,
    }
    config = write_toml(tmp_path / "cloud.toml", values)
    done = fedphd("cloud", "--config", str(config), "--no-report", cwd=tmp_path)
    assert (done.returncode, "server.pem is not signed by" in done.stderr) == (2, True), done
    # No SuperLink was started.
    assert not list(tmp_path.rglob("superlink.log"))


def test_a_certificate_that_is_not_good_for_loopback_is_refused(tmp_path: Path) -> None:
    authority, key = Authority.new(), new_key()
    now = datetime.datetime.now(datetime.UTC)
    foreign = (
        x509.CertificateBuilder(
            authority.certificate.subject,
            name_of("cloud"),
            key.public_key(),
            x509.random_serial_number(),
            now,
            now + datetime.timedelta(days=1),
        )
        .add_extension(alternative_names(["cloud.example.org", "localhost"]), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    authority.write(tmp_path)
    server = write(tmp_path / "s.pem", foreign)
    write_private_key(tmp_path / "s.key", key, PrivateFormat.PKCS8)
    text = f"{server} is good for cloud.example.org, localhost, and not for 127.0.0.1, at which"
    with pytest.raises(ConfigError, match=text):
        check_fits(server, tmp_path / "s.key", tmp_path / "ca.pem")


def test_what_a_file_of_certificates_is_good_for(tmp_path: Path) -> None:
    short, long = Authority.new(days=1), Authority.new(days=2)
    both = write(tmp_path / "both.pem", short.certificate, long.certificate)
    assert (read_certificate(both), read_latest(both)) == (short.certificate, long.certificate)
    assert hosts_of(both) == []
    server = write(tmp_path / "s.pem", long.certify("s", new_key().public_key(), ["h"]))
    assert hosts_of(server) == ["h", "localhost", "127.0.0.1"]
    with pytest.raises(ConfigError, match=r"empty.pem: is not a certificate in PEM"):
        read_latest(write(tmp_path / "empty.pem"))
