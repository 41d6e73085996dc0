"""Who may join follows a folder of keys; who was turned away is read from a log."""

from __future__ import annotations

import base64
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.disk import unreadable

from fedphd.common.errors import ConfigError, FedPhDError, RefusedError, exit_code_of
from fedphd.common.wire.names import BoundNames
from fedphd.deploy.keys.authority import Authority, pem
from fedphd.deploy.keys.registered import fingerprint, register, revoke
from fedphd.deploy.launch.keyring import MOST_S, KeyRing
from fedphd.deploy.launch.refusals import Refusals


def new_key() -> ec.EllipticCurvePublicKey:
    return ec.generate_private_key(ec.SECP384R1()).public_key()


@dataclass
class Door:
    """A registry that remembers, and as Flower takes no key a second time."""

    inside: dict[str, int] = field(default_factory=dict)
    ever: set[str] = field(default_factory=set)
    silent: bool = False

    def register(self, key: ec.EllipticCurvePublicKey) -> int:
        print_ = fingerprint(key)
        if self.silent:
            raise FedPhDError("DEADLINE_EXCEEDED")
        if print_ in self.ever:
            raise RefusedError("Public key already in use.")
        self.ever.add(print_)
        self.inside[print_] = len(self.ever)
        return self.inside[print_]

    def unregister(self, node_id: int) -> None:
        if self.silent:
            raise FedPhDError("DEADLINE_EXCEEDED")
        self.inside = {p: node for p, node in self.inside.items() if node != node_id}


@dataclass
class Scene:
    """A folder of keys, the door that it opens, and what was said."""

    folder: Path
    door: Door = field(default_factory=Door)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = self.folder / "keys"
        self.keys.mkdir()
        names = self.folder / "names.json"
        self.now_s = 0.0
        self.ring = KeyRing(self.keys, self.door, names, self.said.append, clock=lambda: self.now_s)
        self.bound = BoundNames(names)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_who_has_a_key_at_the_start_may_join(scene: Scene) -> None:
    register(scene.keys, "a", new_key())
    register(scene.keys, "b", new_key())
    scene.ring.start()
    assert sorted(scene.door.inside.values()) == [1, 2]
    assert (scene.bound(1), scene.bound(2), scene.bound(3)) == ("a", "b", None)
    scene.ring.follow()
    assert scene.said == []


def test_who_comes_and_goes_later_is_said(scene: Scene) -> None:
    first, second = new_key(), new_key()
    register(scene.keys, "a", first)
    scene.ring.start()
    register(scene.keys, "b", second)
    scene.ring.follow()
    assert scene.said == ["b may join: its key was registered"]
    assert scene.bound(2) == "b"
    revoke(scene.keys, "a")
    scene.ring.follow()
    assert scene.said[1:] == ["a may join no more: its key was revoked"]
    assert set(scene.door.inside) == {fingerprint(second)}
    # One who read the names before forgets them with the next that it does not know.
    assert BoundNames(scene.ring.names)(1) is None


def test_who_is_let_in_has_its_name_before_the_next_one(scene: Scene) -> None:
    scene.ring.start()
    for name in ("a", "b"):
        register(scene.keys, name, new_key())
    named = list[str | None]()
    let_in = scene.door.register

    def knock(key: ec.EllipticCurvePublicKey) -> int:
        # Whoever came before has knocked by now.
        named.extend(scene.bound(node) for node in scene.door.inside.values())
        return let_in(key)

    scene.door.register = knock  # type: ignore[method-assign]
    scene.ring.follow()
    assert (named, scene.bound(2)) == (["a"], "b")


def test_a_replaced_key_is_another(scene: Scene) -> None:
    register(scene.keys, "a", new_key())
    scene.ring.start()
    other = new_key()
    register(scene.keys, "a", other, replace=True)
    scene.ring.follow()
    assert set(scene.door.inside) == {fingerprint(other)}
    assert scene.bound(2) == "a"


def test_a_revoked_key_does_not_come_back(scene: Scene) -> None:
    key = new_key()
    register(scene.keys, "a", key)
    scene.ring.start()
    revoke(scene.keys, "a")
    scene.ring.follow()
    register(scene.keys, "a", key)
    scene.ring.follow()
    assert scene.said[-1].startswith("a may not join: Public key already in use.")
    assert scene.door.inside == {}


def test_a_silent_superlink_is_told_again_until_it_hears(scene: Scene) -> None:
    first, second = new_key(), new_key()
    register(scene.keys, "a", first)
    scene.ring.start()
    scene.door.silent = True
    revoke(scene.keys, "a")
    register(scene.keys, "b", second)
    for _ in range(3):
        scene.ring.follow()
    assert len(scene.said) == 1
    assert scene.said[0].startswith(f"keys are not yet as {scene.keys} says, trying again: DEAD")
    scene.door.silent = False
    scene.ring.follow()
    assert set(scene.door.inside) == {fingerprint(second)}
    assert scene.said[1:] == [
        "a may join no more: its key was revoked",
        "b may join: its key was registered",
    ]


@pytest.mark.parametrize("expired", [True, False])
def test_a_process_that_cannot_shut_out_ends(expired: bool, scene: Scene, tmp_path: Path) -> None:
    authority = Authority.new()
    until = authority.certify("a", new_key(), [], days=0 if expired else 1)
    scene.ring.certificate = tmp_path / "a.pem"
    scene.ring.certificate.write_bytes(pem(until))
    register(scene.keys, "a", new_key())
    scene.ring.start()
    scene.door.silent = True
    # Who only waits to be let in hurts nobody.
    register(scene.keys, "b", new_key())
    scene.ring.follow()
    scene.now_s += 2 * MOST_S
    scene.ring.follow()
    revoke(scene.keys, "a")
    scene.ring.follow()
    scene.now_s += MOST_S
    scene.ring.follow()
    scene.now_s += 1
    why = "a could not be shut out for 60 s, so this process ends: "
    with pytest.raises(FedPhDError, match=why) as raised:
        scene.ring.follow()
    assert str(raised.value).startswith(why)
    found = f"{tmp_path}/a.pem: has expired on" if expired else "DEADLINE_EXCEEDED"
    assert found in str(raised.value)
    assert exit_code_of(raised.value) == (2 if expired else 1)
    # A SuperLink that was silent for a while is asked anew, and has as much time again.
    scene.door.silent = False
    scene.ring.follow()
    assert "a may join no more: its key was revoked" in scene.said
    scene.door.silent = True
    revoke(scene.keys, "b")
    scene.ring.follow()


def test_names_that_cannot_be_written_are_written_later(scene: Scene) -> None:
    scene.ring.start()
    scene.ring.names.mkdir()
    register(scene.keys, "a", new_key())
    scene.ring.follow()
    assert scene.said[-1].startswith(f"keys are not yet as {scene.keys} says, trying again: ")
    scene.ring.names.rmdir()
    scene.ring.follow()
    assert scene.bound(1) == "a"


def test_a_bad_file_is_named_and_nobody_is_shut_out(scene: Scene) -> None:
    register(scene.keys, "a", new_key())
    scene.ring.start()
    (scene.keys / "b.pub").write_text("junk", encoding="utf-8")
    scene.ring.follow()
    scene.ring.follow()
    assert len(scene.said) == 1
    assert scene.said[0].startswith(f"nobody new may join: {scene.keys}/b.pub: is not an OpenSSH")
    assert len(scene.door.inside) == 1
    # It keeps nobody in.
    revoke(scene.keys, "a")
    scene.ring.follow()
    assert scene.door.inside == {}
    assert "a may join no more: its key was revoked" in scene.said
    with pytest.raises(ConfigError, match=r"b.pub: is not an OpenSSH public key"):
        KeyRing(scene.keys, scene.door, scene.ring.names, print).start()


def test_a_folder_that_cannot_be_read_shuts_nobody_out(scene: Scene) -> None:
    register(scene.keys, "a", new_key())
    scene.ring.start()
    for times in (1, 2):
        with unreadable(scene.keys):
            scene.ring.follow()
            scene.ring.follow()
        assert len(scene.said) == times
        assert scene.said[-1] == (
            f"who may join stays as it is: {scene.keys} cannot be read: Permission denied; make it "
            "readable for this process"
        )
        assert len(scene.door.inside) == 1
        scene.ring.follow()
    register(scene.keys, "b", new_key())
    scene.ring.follow()
    assert scene.said[2:] == ["b may join: its key was registered"]
    with unreadable(scene.keys), pytest.raises(ConfigError, match=r"keys: cannot be read: Perm"):
        KeyRing(scene.keys, scene.door, scene.ring.names, print).start()


def test_a_file_that_cannot_be_looked_at_is_named(scene: Scene) -> None:
    register(scene.keys, "a", new_key())
    scene.ring.start()
    path = scene.keys / "a.pub"
    content = path.read_bytes()
    path.unlink()
    # A link to itself, which no system follows.
    path.symlink_to(path)
    scene.ring.follow()
    scene.ring.follow()
    assert scene.said == [
        f"nobody new may join: {path}: cannot be read: Too many levels of symbolic links"
    ]
    assert len(scene.door.inside) == 1
    path.unlink()
    path.write_bytes(content)
    scene.ring.follow()
    assert (len(scene.said), len(scene.door.inside)) == (1, 1)


def test_a_key_in_a_form_that_is_not_supported_is_named(scene: Scene) -> None:
    register(scene.keys, "a", new_key())
    scene.ring.start()
    # Its point is written in the short form.
    point = b"\x02" + new_key().public_numbers().x.to_bytes(48, "big")
    parts = (b"ecdsa-sha2-nistp384", b"nistp384", point)
    blob = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    path = scene.keys / "b.pub"
    path.write_bytes(parts[0] + b" " + base64.b64encode(blob) + b"\n")
    scene.ring.follow()
    assert scene.said == [f"nobody new may join: {path}: is not an OpenSSH public key"]
    assert len(scene.door.inside) == 1


def test_a_file_that_becomes_readable_is_read(scene: Scene) -> None:
    scene.ring.start()
    register(scene.keys, "a", new_key())
    path = scene.keys / "a.pub"
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(b"#" * len(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    scene.ring.follow()
    assert scene.said[0].startswith(f"nobody new may join: {path}")
    # As after a change of its mode, its size and the time of its content are those of before.
    changed_ns = path.stat().st_ctime_ns
    path.write_bytes(content)
    # The file system's clock may be as coarse as some milliseconds.
    while path.stat().st_ctime_ns == changed_ns:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    scene.ring.follow()
    assert scene.said[1:] == ["a may join: its key was registered"]


PLAIN = "I1 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: error:1:" \
    "SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER: Invalid certificate\n"  # fmt: skip
UNKNOWN = "ERROR : [Fleet.ActivateNode] Activation failed: No SuperNode found with the given " \
    "public key.\n"  # fmt: skip


def test_who_knocked_before_the_keys_were_there_is_not_refused(tmp_path: Path) -> None:
    log, said = tmp_path / "superlink.log", list[str]()
    watch = Refusals(log, said.append)
    log.write_text(UNKNOWN + UNKNOWN, encoding="utf-8")
    watch.forget()
    watch.follow()
    assert said == []
    with log.open("a", encoding="utf-8") as file:
        file.write(UNKNOWN)
    watch.follow()
    assert said == [f"refused a node whose key is not registered here; see {log}"]


def test_refusals_are_said_seldom(tmp_path: Path) -> None:
    log, said, now_s = tmp_path / "superlink.log", list[str](), [0.0]
    log.write_text("", encoding="utf-8")
    watch = Refusals(log, said.append, clock=lambda: now_s[0])
    watch.follow()
    assert said == []
    log.write_text("Hello\n" + UNKNOWN + PLAIN[:20], encoding="utf-8")
    watch.follow()
    where = f"; see {log}"
    assert said == [f"refused a node whose key is not registered here{where}"]
    # The rest of a line, and two more tries within half a minute.
    log.write_text("Hello\n" + UNKNOWN + PLAIN + UNKNOWN + UNKNOWN, encoding="utf-8")
    now_s[0] = 10.0
    watch.follow()
    assert said[1:] == [f"refused somebody who spoke plain text{where}"]
    now_s[0] = 31.0
    watch.follow()
    assert said[2:] == [f"refused a node whose key is not registered here (2 times){where}"]
    log.unlink()
    watch.follow()
    assert len(said) == 3


def test_a_log_that_strangers_fill_is_cut_and_says_so(tmp_path: Path) -> None:
    log, said = tmp_path / "superlink.log", list[str]()
    watch = Refusals(log, said.append, clock=lambda: 0.0, most_bytes=10 * len(PLAIN))
    log.touch()
    # As a SuperLink does, which keeps it open.
    with log.open("ab", buffering=0) as child:
        child.write(PLAIN.encode())
        watch.follow()
        child.write(PLAIN.encode() * 10)
        watch.follow()
        refused, where = "refused somebody who spoke plain text", f"; see {log}"
        cut = f"{log} was cut, since it was too long"
        assert said == [refused + where, f"{refused} (10 times){where}", cut]
        (line,) = log.read_text("utf-8").splitlines()
        expected = f"cut this log at {11 * len(PLAIN)} bytes; refused so far: somebody who spoke "
        assert line.endswith(f"{expected}plain text (11 times)")
        # What comes next is read from the start, and written there.
        child.write(UNKNOWN.encode())
        watch.follow()
    assert said[3:] == [f"refused a node whose key is not registered here{where}"]
    assert log.read_bytes() == f"{line}\n{UNKNOWN}".encode()


def test_a_log_that_somebody_else_cut_is_read_on(tmp_path: Path) -> None:
    log, said = tmp_path / "superlink.log", list[str]()
    watch = Refusals(log, said.append)
    log.write_text("Hello\n" * 100, "utf-8")
    watch.follow()
    log.write_text(UNKNOWN, "utf-8")
    watch.follow()
    assert len(said) == 1
