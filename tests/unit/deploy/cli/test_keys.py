"""``fedphd keys``: what cannot be made is refused by name, and nothing is made then."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command import fedphd


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("authority", "--name", ""), 2, "--name '': cannot be an authority's name; use 1 to 64"),
        (("authority", "--name", "a\x1b[2J"), 2, r"--name 'a\x1b[2J': cannot be an authority's"),
        (("authority", "--name", "a" * 65), 2, "cannot be an authority's name; use 1 to 64"),
        (("authority", "--days", "99999999"), 2, "99999999 is not in the range 1<=x<=3650"),
        (("dev", "--days", "3651"), 2, "3651 is not in the range 1<=x<=3650"),
        (("dev", "--host", "box:9092"), 2, "'box:9092' is not a host; write a DNS name"),
        (("dev", "--host", "b", "--host", "b"), 2, "host b is named twice; name each host once"),
        (("request", "edge", "e", "--host", ""), 2, "'' is not a host; write a DNS name"),
        (("request", "edge", "e", "--host", "https://e"), 2, "'https://e' is not a host"),
        (("request", "cloud", "c", "--host", "0.0.0.0"), 2, "others reach a server; write the"),
        (("request", "client", "c", "--host", "h"), 2, "client c serves nobody, but has the host"),
    ],
)
def test_what_cannot_be_made_is_refused(
    words: tuple[str, ...], code: int, text: str, tmp_path: Path
) -> None:
    done = fedphd("keys", *words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_key_is_registered_under_a_name_that_a_node_may_have(tmp_path: Path) -> None:
    fedphd("keys", "request", "client", "a", cwd=tmp_path)
    for name in ("../evil", "hospital 7"):
        words = ("register", name, "a-node.pub", "--node-keys", "in")
        done = fedphd("keys", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert f"'{name}' is not a valid name; use 1 to 64" in done.stderr
    assert not (tmp_path / "in").exists()
    assert not (tmp_path / "evil.pub").exists()


def test_development_keys_are_those_that_are_asked_for(tmp_path: Path) -> None:
    def dev(*words: str) -> tuple[int, str]:
        done = fedphd("keys", "dev", *words, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    assert dev("--edges", "1", "--clients", "2", "--host", "box")[0] == 0
    held = "keys holds keys of 1 edge and 2 clients"
    kept = (0, f"{held} already; they stay as they are\n")
    assert dev() == kept
    assert dev("--edges", "1", "--clients", "2", "--host", "box") == kept
    for words in (("--clients", "3"), ("--clients", "1"), ("--edges", "2")):
        code, text = dev(*words)
        assert (code, f"{' '.join(words)}: {held}; leave the option out" in text) == (2, True), text
    code, text = dev("--host", "box", "--host", "other")
    assert code == 2
    good = "cloud, box, localhost, 127.0.0.1"
    assert f"--host other: keys/cloud.pem is good for {good}; leave the option out" in text


@pytest.mark.parametrize(
    ("edges", "text"),
    [
        ("1", "keys/edges: the cloud's superlink.node_keys; keys/clients: every edge's\n"),
        ("0", "keys/clients: the cloud's superlink.node_keys; without edges it is flat\n"),
    ],
)
def test_development_keys_name_the_folders_that_are_there(
    edges: str, text: str, tmp_path: Path
) -> None:
    done = fedphd("keys", "dev", "--edges", edges, "--clients", "1", cwd=tmp_path)
    assert text in done.stdout
    assert ("keys/edges" in done.stdout) == (tmp_path / "keys" / "edges").exists()


def test_an_authority_is_not_taken_for_development_keys(tmp_path: Path) -> None:
    fedphd("keys", "authority", "--out", "keys", cwd=tmp_path)
    done = fedphd("keys", "dev", cwd=tmp_path)
    assert (done.returncode, "keys/ca.pem is there already; move it" in done.stderr) == (3, True)
