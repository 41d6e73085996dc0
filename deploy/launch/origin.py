"""Which code and which machine a run came from, for reports that others can repeat."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

UNKNOWN = "unknown"
# At the end of a commit whose checkout has other files.
DIRTY = "-dirty"
_GIT_S = 10.0
_LIBRARIES = ("torch", "diffusers", "flwr")


def commit() -> str:
    """The installed checkout's commit, ``-dirty`` if files differ; ``unknown`` without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return UNKNOWN
    describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", f"--dirty={DIRTY}"]
    try:
        done = subprocess.run([*describe, "--exclude=*"], capture_output=True, timeout=_GIT_S)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return done.stdout.decode().strip() if done.returncode == 0 else UNKNOWN


def machine() -> str:
    """Processor, cores and the versions that a run's numbers depend on, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    python = platform.python_version()
    return f"{_processor()}, {cores} cores, {platform.system()}; Python {python}, {libraries}"


def origin() -> dict[str, str]:
    """Version, commit and machine of this process."""
    return {"fedphd_version": version("fedphd"), "commit": commit(), "machine": machine()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
