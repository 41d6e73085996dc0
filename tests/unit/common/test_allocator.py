"""What was freed is used again, seen by the faults of pages of new memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedphd.common.allocator import allocator_environment
from fedphd.deploy.launch.superlink import flower_environment

MEGABYTES, TIMES = 64, 5
PAGES = (MEGABYTES << 20) // os.sysconf("SC_PAGE_SIZE")
# In a second thread too, as replies come in.
COPIES = f"""
import resource, threading
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def copies():
    for _ in range({TIMES}):
        b"".join((b"", memoryview(source)))
source = bytes({MEGABYTES << 20})
before = faults()
copies()
thread = threading.Thread(target=copies)
thread.start()
thread.join()
print(faults() - before)
"""
BY_ITSELF = "from fedphd.common.allocator import keep_freed_memory as f; f()\n"

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
counts_faults = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt")
    or (HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text("ascii")),
    reason="this C library has no mallopt, or a fault brings a huge page",
)


def faults(program: str, **environment: str) -> int:
    """Faults of pages of a Python process that copies, with nothing chosen but ``environment``."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=own | environment, capture_output=True, check=True
    )
    return int(done.stdout)


@counts_faults
def test_copies_after_the_first_one_need_no_new_memory() -> None:
    usual = faults(COPIES)
    assert usual > 0.9 * 2 * TIMES * PAGES
    for kept in (faults(COPIES, **allocator_environment({})), faults(BY_ITSELF + COPIES)):
        assert kept < 2 * PAGES


@counts_faults
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_who_has_chosen_is_left_alone(name: str) -> None:
    assert allocator_environment({name: "2"}) == {}
    value = "2" if name.startswith("MALLOC") else "glibc.malloc.arena_max=2"
    assert faults(BY_ITSELF + COPIES, **{name: value}) > 0.9 * TIMES * PAGES


def test_a_superlink_and_what_it_starts_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in allocator_environment({}):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    environment = flower_environment(Path("state/flwr"))
    assert environment.items() >= allocator_environment({}).items()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
    environment = flower_environment(Path("state/flwr"))
    assert environment["MALLOC_ARENA_MAX"] == "7"
    assert "MALLOC_MMAP_MAX_" not in environment
