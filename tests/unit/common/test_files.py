"""Files are replaced whole or not at all."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from support.disk import files_limited_to

from fedphd.common.files import STALE_S, replaced


@pytest.mark.parametrize("content", [b"new \x00\xff", b""])
def test_new_content_takes_the_place_of_the_old(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.bin"
    for old in (None, b"old"):
        if old is not None:
            path.write_bytes(old)
        with replaced(path) as beside:
            beside.write_bytes(content)
            assert (path.read_bytes() if path.exists() else None) == old
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_is_hidden_beside_the_real_one_and_this_processs_own(
    tmp_path: Path,
) -> None:
    with replaced(tmp_path / "a.json") as beside:
        beside.touch()
    assert beside.parent == tmp_path
    assert beside.name == f".a.json.{os.getpid()}"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_half_one(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def fail_half_way() -> None:
        with replaced(path) as beside:
            beside.write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert path.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with (
        pytest.raises(OSError, match="File too large"),
        files_limited_to(1000),
        replaced(path) as beside,
    ):
        beside.write_bytes(b"x" * 2000)
    assert path.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), replaced(tmp_path / "folder") as beside:
        beside.touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_looked_through_once_however_many_files_it_has(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale = [tmp_path / f".{name}.{ended.pid}" for name in "ab"]
    for path in stale:
        path.touch()
        os.utime(path, (0, 0))
    looked = []
    with pytest.MonkeyPatch.context() as patched:
        iterdir = Path.iterdir
        patched.setattr(Path, "iterdir", lambda folder: looked.append(folder) or iterdir(folder))
        for name in "ab":
            with replaced(tmp_path / name) as beside:
                beside.touch()
    assert looked == [tmp_path]
    assert not [path for path in stale if path.exists()]


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    ended, other = subprocess.Popen(["true"]), subprocess.Popen(["true"])
    for process in (ended, other):
        process.wait()
    minutes_ago = time.time() - 2 * STALE_S
    left = {
        "stale": tmp_path / f".a[1].json.{ended.pid}",
        "new": tmp_path / f".a[1].json.{other.pid}",
        "in use": tmp_path / f".a[1].json.{os.getppid()}",
        "another's": tmp_path / f".b.json.{ended.pid}",
        "no process's": tmp_path / f".a[1].json.{10**20}",
        "no number": tmp_path / ".a[1].json.swp",
    }
    for name, path in left.items():
        path.write_text("half")
        if name != "new":
            os.utime(path, (minutes_ago, minutes_ago))
    with replaced(tmp_path / "a[1].json") as beside:
        beside.write_text("whole")
    assert {name for name, path in left.items() if not path.exists()} == {"stale", "no process's"}
    # Of another machine, as far as one could tell, until nobody had written to it for a minute.
    os.utime(left["new"], (minutes_ago, minutes_ago))
    with replaced(tmp_path / "a[1].json") as beside:
        beside.write_text("whole")
    assert not left["new"].exists()
    assert left["in use"].exists()


def test_a_second_name_of_the_file_itself_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "former"
    path.write_text("state")
    # As where a process was killed between two writes: a rename then does nothing.
    with replaced(path) as beside:
        os.link(path, beside)
    assert [entry.name for entry in tmp_path.iterdir()] == ["former"]
