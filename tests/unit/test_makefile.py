"""What `make` does where Python's own venv cannot make the environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
# What Debian's python3 without python3-venv does: it makes the folder, and then has no ensurepip.
WITHOUT_ENSUREPIP = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    {python} "$1" venv --without-pip .venv && echo "ensurepip is not available" >&2 && exit 1
fi
exec {python} "$@"
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def make(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Make the environment alone, by that Python."""
    command = ["make", "-f", str(MAKEFILE), f"PYTHON={python}", ".venv/bin/pip"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_first_failure_says_what_to_install_and_leaves_nothing(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text(WITHOUT_ENSUREPIP.format(python=sys.executable), "utf-8")
    python.chmod(0o755)
    failed = make(tmp_path, str(python))
    assert failed.returncode == 2
    assert "ensurepip is not available" in failed.stderr
    assert "sudo apt install python3-venv" in failed.stdout
    assert not (tmp_path / ".venv").exists()


def test_what_an_earlier_failure_left_is_made_anew(tmp_path: Path) -> None:
    # Half of it, as it was left by a start that was cut off: a Python, and no pip.
    half = [sys.executable, "-m", "venv", "--without-pip", ".venv"]
    subprocess.run(half, cwd=tmp_path, check=True)
    assert (tmp_path / ".venv/bin/python").exists()
    done = make(tmp_path, sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / ".venv/bin/pip").exists()
    # Now it is there.
    assert "up to date" in make(tmp_path, sys.executable).stdout
