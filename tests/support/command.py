"""The ``fedphd`` command as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def fedphd(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, on a wide terminal without colours."""
    return subprocess.run(
        [sys.executable, "-m", "fedphd.deploy.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"},
    )
