"""Authorities, requests and registered keys, as files on a disk."""

from __future__ import annotations

import base64
import datetime
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_ssh_private_key,
)
from support.certificates import write_certificates
from support.command import fedphd

from fedphd.common.errors import ConfigError, StartError
from fedphd.deploy.keys import authority
from fedphd.deploy.keys.authority import Authority, name_of, pem
from fedphd.deploy.keys.files import (
    check_fits,
    check_in_date,
    openssh,
    read_certificate,
    read_public_key,
    read_signing_key,
)
from fedphd.deploy.keys.registered import fingerprint, register, registered, revoke
from fedphd.deploy.keys.requests import JoinRequest, make_request


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_an_authority_outlives_its_process(tmp_path: Path) -> None:
    made = Authority.new(name="Ward 7")
    made.write(tmp_path)
    read = Authority.read(tmp_path)
    assert read.certificate == made.certificate
    assert read.certificate.subject == name_of("Ward 7")
    assert (mode(tmp_path / "ca.key"), mode(tmp_path / "ca.pem")) == (0o600, 0o644)
    with pytest.raises(StartError, match=r"ca.key is there already"):
        Authority.new().write(tmp_path)
    assert Authority.read(tmp_path).certificate == made.certificate


def test_a_certificate_is_good_for_its_hosts_and_loopback(tmp_path: Path) -> None:
    authority, key = Authority.new(), new_key()
    authority.write(tmp_path)
    hosts = ["edge.example.org", "10.0.0.7"]
    certificate = authority.certify("edge-0", key.public_key(), hosts, days=30)
    certificate.verify_directly_issued_by(authority.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == [*hosts, "localhost", "127.0.0.1"]
    assert isinstance(names[1], x509.IPAddress)
    days = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert days == pytest.approx(datetime.timedelta(days=30), abs=datetime.timedelta(minutes=1))
    (tmp_path / "edge-0.pem").write_bytes(pem(certificate))
    check_in_date(tmp_path / "edge-0.pem")
    # What OpenSSL asks of an authority.
    ssl.create_default_context(cafile=tmp_path / "ca.pem")


def test_a_certificate_does_not_outlive_its_authority() -> None:
    authority = Authority.new(days=5)
    certificate = authority.certify("edge-0", new_key().public_key(), ["h"], days=365)
    assert certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_files_of_different_servers_are_named(tmp_path: Path) -> None:
    one, other = write_certificates(tmp_path / "one"), write_certificates(tmp_path / "other")
    certificate, key, authority = (
        Path(one[f"superlink.ssl_{name}"]) for name in ("certfile", "keyfile", "ca_certfile")
    )
    check_fits(certificate, key, authority)
    wrong = Path(other["superlink.ssl_keyfile"])
    text = f"ssl_keyfile = {wrong} is not the key of superlink.ssl_certfile = {certificate}; name"
    with pytest.raises(ConfigError, match=text):
        check_fits(certificate, wrong, authority)
    with pytest.raises(ConfigError, match=f"{key}: is not a certificate in PEM"):
        check_fits(certificate, key, key)
    with pytest.raises(ConfigError, match=r"none.key: cannot be read: No such file"):
        check_fits(certificate, tmp_path / "none.key", authority)
    with pytest.raises(ConfigError, match=f"ssl_keyfile = {certificate}: is not a private key"):
        check_fits(certificate, certificate, authority)
    locked = tmp_path / "locked.key"
    password = BestAvailableEncryption(b"x")
    locked.write_bytes(new_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, password))
    with pytest.raises(ConfigError, match=f"ssl_keyfile = {locked} has a password"):
        check_fits(certificate, locked, authority)


def test_an_expired_certificate_is_named(tmp_path: Path) -> None:
    old = Authority.new().certify("old", new_key().public_key(), ["h"], days=0)
    (tmp_path / "old.pem").write_bytes(pem(old))
    with pytest.raises(ConfigError, match=r"old.pem: has expired on 20\d\d-\d\d-\d\d"):
        check_in_date(tmp_path / "old.pem")


def test_a_certificate_that_is_not_good_yet_is_a_matter_of_clocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of a signer whose clock is fast.
    monkeypatch.setattr(authority, "_EARLIER", -datetime.timedelta(minutes=5))
    early = Authority.new().certify("early", new_key().public_key(), ["h"])
    (tmp_path / "early.pem").write_bytes(pem(early))
    begin = f"{early.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    text = (
        rf"early.pem: is good from {begin}; it is 20\d\d-\d\d-\d\d \d\d:\d\d UTC here; this "
        "machine's clock or the signer's is wrong: correct it"
    )
    with pytest.raises(ConfigError, match=text):
        check_in_date(tmp_path / "early.pem")


@pytest.mark.parametrize(
    ("role", "files"),
    [
        ("cloud", {"site.key", "site.request"}),
        ("edge", {"site.key", "site-node", "site-node.pub", "site.request"}),
        ("client", {"site-node", "site-node.pub", "site.request"}),
    ],
)
def test_a_request_holds_what_the_role_needs_and_no_private_key(
    role: str, files: set[str], tmp_path: Path
) -> None:
    hosts = () if role == "client" else ("a.example.org", "10.0.0.1")
    made = make_request(tmp_path, role, "site", hosts)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == files
    assert all(mode(tmp_path / name) == 0o600 for name in files & {"site.key", "site-node"})
    read = JoinRequest.read(tmp_path / "site.request")
    assert read == made
    assert (read.name, read.hosts) == ("site", hosts)
    assert (read.node_key is None, read.server_key is None) == (role == "cloud", role == "client")
    assert b"PRIVATE" not in (tmp_path / "site.request").read_bytes()
    if read.node_key is not None:
        own = load_ssh_private_key((tmp_path / "site-node").read_bytes(), password=None)
        assert fingerprint(read.node_key) == fingerprint(own.public_key())  # type: ignore[arg-type]
        assert read_public_key(tmp_path / "site-node.pub") == read.node_key


def test_requests_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"edge edge-0 serves others: name a host"):
        make_request(tmp_path, "edge", "edge-0")
    with pytest.raises(ConfigError, match=r"'a b' is not a valid name"):
        make_request(tmp_path, "client", "a b")
    make_request(tmp_path, "client", "a")
    with pytest.raises(StartError, match=r"a-node is there already"):
        make_request(tmp_path, "client", "a")
    # Not even a part of it is made.
    (tmp_path / "e.request").touch()
    with pytest.raises(StartError, match=r"e.request is there already"):
        make_request(tmp_path, "edge", "e", ("host",))
    assert not list(tmp_path.glob("e[.-][kn]*"))


def csr(name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(name_of(name))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_requests_of_somebody_hostile_are_refused(tmp_path: Path) -> None:
    good, path = csr("a", new_key()), tmp_path / "r"
    # One letter within the signature, which ends the block.
    lines = good.splitlines(keepends=True)
    forged = b"".join([*lines[:-2], lines[-2][:5] + b"AAAA" + lines[-2][9:], lines[-1]])
    two = good + csr("b", new_key())
    small = rsa.generate_private_key(65537, 2048)
    der = x509.load_pem_x509_csr(good).public_bytes(Encoding.DER)
    # secp384r1, and a curve that nobody knows.
    curve, unknown = bytes.fromhex("06052b81040022"), bytes.fromhex("06052b81040079")
    exotic = base64.encodebytes(der.replace(curve, unknown))
    for content, why in (
        (b"", "it names 0 sites"),
        (b"junk" * 100_000, "it names 0 sites"),
        (two, "it names 2 sites"),
        (forged, ""),
        (csr("../a", new_key()), "'../a' is not a valid name"),
        (csr("a", small), "its key is not an EC key"),
        (good.replace(b"MI", b"!!"), ""),
        (lines[0] + exotic + lines[-1], "Curve .* is not supported"),
    ):
        path.write_bytes(content)
        with pytest.raises(
            ConfigError, match=f"is not a request of `fedphd keys request`: .*{why}"
        ):
            JoinRequest.read(path)


def test_registered_keys_are_files(tmp_path: Path) -> None:
    first, second = new_key().public_key(), new_key().public_key()
    register(tmp_path, "b", first)
    register(tmp_path, "a", second)
    # Again, which changes nothing.
    register(tmp_path, "a", second)
    assert registered(tmp_path) == {"a": second, "b": first}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.pub", "b.pub"]
    revoke(tmp_path, "a")
    assert registered(tmp_path) == {"b": first}
    with pytest.raises(ConfigError, match=r"has no key of a; it has those of b"):
        revoke(tmp_path, "a")


def test_a_name_has_one_key_and_a_key_one_name(tmp_path: Path) -> None:
    first, second = new_key().public_key(), new_key().public_key()
    register(tmp_path, "a", first)
    with pytest.raises(ConfigError, match=r"this key is registered for a; b needs its own"):
        register(tmp_path, "b", first)
    with pytest.raises(ConfigError, match=r"a has another key, SHA256:.*; --replace takes"):
        register(tmp_path, "a", second)
    register(tmp_path, "a", second, replace=True)
    assert registered(tmp_path) == {"a": second}
    (tmp_path / "c.pub").write_bytes(openssh(second, "c"))
    with pytest.raises(ConfigError, match=r"a and c have one key; remove one of them"):
        registered(tmp_path)


def test_what_is_no_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none: is not a folder with the nodes' public keys"):
        registered(tmp_path / "none")
    (tmp_path / "a.pub").write_text("ssh-rsa nonsense")
    with pytest.raises(ConfigError, match=r"a.pub: is not an OpenSSH public key"):
        registered(tmp_path)
    (tmp_path / "x.key").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"x.key: is not a private key in PEM"):
        read_signing_key(tmp_path / "x.key")
    with pytest.raises(ConfigError, match=r"x.key: is not a certificate in PEM"):
        read_certificate(tmp_path / "x.key")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_keys_and_fingerprints_are_those_of_openssh(tmp_path: Path) -> None:
    path = tmp_path / "key"
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True)
    public = read_public_key(tmp_path / "key.pub")
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(tmp_path / "key.pub")], capture_output=True, check=True
    )
    assert fingerprint(public) == shown.stdout.decode().split()[1]


def test_operator_and_site_need_one_command_each(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = fedphd("keys", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("authority")
    asked = run("request", "edge", "edge-0", "--host", "edge.example.org", "--out", "site")
    signed = run("sign", "site/edge-0.request", "--node-keys", "cloud-lets-in", "--yes")
    # Both sides see the same fingerprints, which they compare by telephone.
    prints = [line for line in asked.splitlines() if "SHA256" in line]
    assert len(prints) == 2
    assert all(line in signed for line in prints)
    certificate = read_certificate(tmp_path / "site/edge-0.pem")
    certificate.verify_directly_issued_by(read_certificate(tmp_path / "authority/ca.pem"))
    listed = run("list", "--node-keys", "cloud-lets-in")
    assert listed.split()[0] == "edge-0"
    run("revoke", "edge-0", "--node-keys", "cloud-lets-in")
    assert run("list", "--node-keys", "cloud-lets-in") == ""


def test_a_request_is_signed_only_when_the_operator_says_so(tmp_path: Path) -> None:
    fedphd("keys", "authority", cwd=tmp_path)
    fedphd("keys", "request", "client", "a", cwd=tmp_path)
    done = fedphd("keys", "sign", "a.request", "--node-keys", "in", cwd=tmp_path)
    assert done.returncode != 0
    assert not (tmp_path / "in").exists()


def test_a_site_renews_its_keys(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = fedphd("keys", *words, cwd=tmp_path)
        return done.stdout + done.stderr

    run("authority")
    sign = ("--node-keys", "in", "--yes")
    for folder in ("old", "new"):
        run("request", "edge", "edge-0", "--host", "h", "--out", folder)
    run("sign", "old/edge-0.request", *sign)
    assert "edge-0 has another key" in run("sign", "new/edge-0.request", *sign)
    assert not (tmp_path / "new/edge-0.pem").exists()
    assert "edge-0 may join" in run("sign", "new/edge-0.request", *sign, "--replace")
    assert registered(tmp_path / "in") == {
        "edge-0": read_public_key(tmp_path / "new/edge-0-node.pub")
    }
    assert (tmp_path / "new/edge-0.pem").exists()


def test_development_keys_that_were_cut_off_are_not_taken_for_whole(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    make_request(tmp_path / "keys", "cloud", "cloud", ("cloud",))
    done = fedphd("keys", "dev", cwd=tmp_path)
    assert done.returncode == 3
    assert "keys/cloud.key is there already; move it, or name another folder" in done.stderr


def test_development_keys_are_made_once(tmp_path: Path) -> None:
    words = ("keys", "dev", "--edges", "1", "--clients", "2", "--host", "box")
    assert "made for cloud, edge-0, client-0, client-1" in fedphd(*words, cwd=tmp_path).stdout
    keys = tmp_path / "keys"
    before = {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()}
    private = [keys / name for name in ("ca.key", "cloud.key", "edge-0-node", "client-1-node")]
    assert [mode(path) for path in private] == [0o600] * 4
    assert list(registered(keys / "edges")) == ["edge-0"]
    assert list(registered(keys / "clients")) == ["client-0", "client-1"]
    names = read_certificate(keys / "edge-0.pem").extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert [str(n.value) for n in names.value] == ["edge-0", "box", "localhost", "127.0.0.1"]
    assert "they stay as they are" in fedphd(*words, cwd=tmp_path).stdout
    assert before == {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()}
