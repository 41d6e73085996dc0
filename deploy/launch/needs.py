"""What a federation of processes needs of this machine, and whether it had too little of it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedphd.common.config.roles import CloudConfig
from fedphd.deploy.launch.render import human_bytes, human_seconds

# Measured on the demo, each with its SuperLink and ServerApp, and with the command for the cloud:
# proportional set sizes at their peak.
CLIENT_BYTES: Final = 330_000_000
EDGE_BYTES: Final = 545_000_000
CLOUD_BYTES: Final = 930_000_000
# With more, a round takes about as long as it would one client after the other.
CLIENTS_PER_CORE: Final = 4
# What a process computes on one core until it is there.
START_S: Final = 5.0


def advice(config: CloudConfig, *, cores: int, free_bytes: int) -> str | None:
    """What to say before so many processes start on this machine; None where they fit."""
    edges = 0 if config.topology == "flat" else config.schedule.num_edges
    clients = config.schedule.min_clients
    needed = CLOUD_BYTES + edges * EDGE_BYTES + clients * CLIENT_BYTES
    if clients <= CLIENTS_PER_CORE * cores and needed <= free_bytes:
        return None
    start_s = START_S * clients / cores
    return (
        f"{1 + edges + clients} processes on {cores} core(s) need about {human_bytes(needed)} of "
        f"memory ({human_bytes(free_bytes)} are free), and about {human_seconds(start_s)} until "
        f"all have started; fedphd simulate, with the same flags, runs {clients} clients in one "
        "process per core"
    )


def advice_here(config: CloudConfig) -> str | None:
    """``advice`` for this machine, as it is now."""
    return advice(config, cores=cores(), free_bytes=available_memory())


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """The bytes of memory that programs can still have."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def kills_for_memory() -> int:
    """How many processes the kernel has ended for lack of memory so far; 0 if unknown."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text("ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
