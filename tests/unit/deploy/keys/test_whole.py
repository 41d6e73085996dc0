"""What fails leaves things as they were: no half of a set, no key that is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.disk import files_limited_to

from fedphd.common.errors import ConfigError, StartError
from fedphd.deploy.keys.authority import Authority
from fedphd.deploy.keys.development import grant, make_all
from fedphd.deploy.keys.registered import register, registered
from fedphd.deploy.keys.requests import JoinRequest, make_request

# Bytes in a file: a private key of a server fits, and a certificate does not.
SMALL = 400
FULL = r": cannot be written: File too large; make room, or choose a folder"


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def renewal(tmp_path: Path) -> tuple[JoinRequest, Path]:
    """An edge's request for new keys, and the folder in which its old key is registered."""
    old = make_request(tmp_path / "old", "edge", "edge-0", ("h",))
    new = make_request(tmp_path / "new", "edge", "edge-0", ("h",))
    keys = tmp_path / "keys"
    grant(old, Authority.new(), certificate=tmp_path / "old/edge-0.pem", node_keys=keys)
    return new, keys


def test_a_key_is_replaced_with_its_certificate_or_not_at_all(
    renewal: tuple[JoinRequest, Path], tmp_path: Path
) -> None:
    request, keys = renewal
    authority, before = Authority.new(), everything(tmp_path)
    there, free = tmp_path / "old/edge-0.pem", tmp_path / "new/edge-0.pem"
    with pytest.raises(StartError, match=r"old/edge-0.pem is there already; move it"):
        grant(request, authority, certificate=there, node_keys=keys, replace=True)
    assert everything(tmp_path) == before
    with files_limited_to(SMALL), pytest.raises(StartError, match=f"new/edge-0.pem{FULL}"):
        grant(request, authority, certificate=free, node_keys=keys, replace=True)
    assert everything(tmp_path) == before
    # What has a key of that name cannot be told from it.
    with pytest.raises(ConfigError, match=r"edge-0 has another key"):
        grant(request, authority, certificate=free, node_keys=keys)
    with pytest.raises(ConfigError, match=r"--days 3651: a certificate is good for 3650 days"):
        grant(request, authority, certificate=free, node_keys=keys, replace=True, days=3651)
    assert everything(tmp_path) == before
    grant(request, authority, certificate=free, node_keys=keys, replace=True)
    assert registered(keys) == {"edge-0": request.node_key}


def test_no_certificate_is_left_where_the_key_cannot_be_registered(tmp_path: Path) -> None:
    request = make_request(tmp_path / "site", "edge", "edge-0", ("h",))
    (tmp_path / "keys").write_text("a file")
    before = everything(tmp_path)
    with pytest.raises(StartError, match=r"keys: cannot be written: File exists; make room"):
        grant(request, Authority.new(), certificate=tmp_path / "a.pem", node_keys=tmp_path / "keys")
    assert everything(tmp_path) == before


def test_a_full_disk_keeps_the_registered_key(
    renewal: tuple[JoinRequest, Path], tmp_path: Path
) -> None:
    request, keys = renewal
    before = everything(tmp_path)
    assert request.node_key is not None
    with files_limited_to(100), pytest.raises(StartError, match=f"keys/edge-0.pub{FULL}"):
        register(keys, "edge-0", request.node_key, replace=True)
    assert everything(tmp_path) == before


def test_a_full_disk_leaves_no_half_of_an_authority(tmp_path: Path) -> None:
    for size, name in ((100, "ca.key"), (SMALL, "ca.pem")):
        with files_limited_to(size), pytest.raises(StartError, match=f"{name}{FULL}"):
            Authority.new().write(tmp_path)
        assert everything(tmp_path) == {}
    (tmp_path / "ca.pem").touch()
    with pytest.raises(StartError, match=r"ca.pem is there already"):
        Authority.new().write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ca.pem"]


def test_a_full_disk_leaves_no_half_of_a_sites_keys(tmp_path: Path) -> None:
    with files_limited_to(SMALL), pytest.raises(StartError, match=f"cloud.request{FULL}"):
        make_request(tmp_path, "cloud", "cloud", ("a.example.org", "b.example.org"))
    with files_limited_to(SMALL), pytest.raises(StartError, match=f"a-node{FULL}"):
        make_request(tmp_path, "client", "a")
    assert everything(tmp_path) == {}
    make_request(tmp_path, "client", "a")


def test_a_full_disk_leaves_no_half_of_development_keys(tmp_path: Path) -> None:
    def make() -> None:
        make_all(tmp_path, edges=1, clients=1, hosts=("box",), days=1)

    # A certificate fits, and both keys of an edge in one request do not.
    with files_limited_to(850), pytest.raises(StartError, match=f"edge-0.request{FULL}"):
        make()
    assert everything(tmp_path) == {}
    make()


def test_development_keys_are_not_added_to_what_others_left(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients/client-0.pub").touch()
    before = everything(tmp_path)
    with pytest.raises(StartError, match=r"clients/client-0.pub is there already; move it"):
        make_all(tmp_path, edges=1, clients=1, hosts=(), days=1)
    assert everything(tmp_path) == before


def test_an_authority_that_cannot_sign_is_refused(tmp_path: Path) -> None:
    Authority.new().write(tmp_path / "one")
    Authority.new().write(tmp_path / "two")
    (tmp_path / "two/ca.key").rename(tmp_path / "one/ca.key")
    with pytest.raises(ConfigError, match=r"one/ca.key is not the key of .*one/ca.pem; bring back"):
        Authority.read(tmp_path / "one")
    Authority.new(days=0).write(tmp_path / "old")
    with pytest.raises(ConfigError, match=r"old/ca.pem: has expired on 20\d\d"):
        Authority.read(tmp_path / "old")
