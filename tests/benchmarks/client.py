"""What a client's process needs: memory at its most, and seconds until its first answer.

Real processes of the `digits` run on loopback: one cloud, one edge, which wait, and then the
clients one after the other, each of which gets a line. Its start is that of its process, its
first answer the moment at which the edge knows it. Then they train for some edge rounds. Memory
is the resident set's peak, of which libraries that other processes have loaded too are a part; the
proportional set divides these among them.

    python tests/benchmarks/client.py
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.processes import Processes, Program
from support.site import Site
from support.tiny import events

from fedphd.common.wire.messages import PACKAGE_VERSION

RUN: dict[str, Any] = {
    "preset": "digits",
    "schedule.num_edges": 1,
    "schedule.intervals": 1,
    "schedule.participation": 1.0,
    "pruning.mode": "none",
    "evaluation.num_samples": 2,
    "evaluation.sampling_steps": 1,
    "evaluation.grid_rows": 1,
    "evaluation.classifier_epochs": 1,
    "num_threads": 1,
}
CLIENT: dict[str, Any] = {"num_threads": 1, "data.partition.num_partitions": 20}


class DigitsSite(Site):
    """A site whose cloud has the preset's network, not a test's tiny one."""

    def _cloud(self, name: str) -> dict[str, Any]:
        return {**self.run, **self._server(name, "edges"), "state_dir": str(self.folder_of(name))}


def joined_s(site: Site, name: str) -> float:
    """When the edge knew a client, in seconds since 1970; raises RuntimeError if that ended."""
    while site.programs[name].process.poll() is None:
        for event in events(site.folder_of("edge-0") / "events.jsonl"):
            if event["event"] == "peer" and (event["peer"], event["change"]) == (name, "joined"):
                return float(event["time"])
        time.sleep(0.1)
    raise RuntimeError(site.programs[name].text)


def kilobytes(program: Program, file: str, name: str) -> int:
    """A figure of the process's memory; 0 once it has ended."""
    try:
        text = Path(f"/proc/{program.pid}/{file}").read_text("ascii")
    except OSError:
        return 0
    return next((int(x.split()[1]) for x in text.splitlines() if x.startswith(name)), 0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--edge-rounds", type=int, default=5)
    arguments = parser.parse_args()
    names = [f"client-{number}" for number in range(arguments.clients)]
    print(f"{os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}, ")
    print(f"torch {torch.__version__}, fedphd {PACKAGE_VERSION}\n")
    run = {
        **RUN, "schedule.min_clients": len(names), "schedule.edge_rounds": arguments.edge_rounds,
    }  # fmt: skip
    started, joined = dict[str, float](), dict[str, float]()
    peak, shared = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
        site = DigitsSite(processes, run, edges=("edge-0",))
        cloud = site.start("cloud")
        site.start("edge-0")
        cloud.wait_line(r"clients: 0 of")
        for name in names:
            started[name] = time.time()
            site.start(name, **CLIENT)
            joined[name] = joined_s(site, name)
        while cloud.process.poll() is None:
            for name in names:
                program = site.programs[name]
                peak[name] = max(peak[name], kilobytes(program, "status", "VmHWM:"))
                shared[name] = max(shared[name], kilobytes(program, "smaps_rollup", "Pss:"))
            time.sleep(0.5)
        if cloud.process.returncode:
            raise RuntimeError(cloud.text)
    print("| client | start to first answer, s | peak, MB | proportional, MB |")
    print("|---|---:|---:|---:|")
    for name in names:
        took_s = joined[name] - started[name]
        print(f"| {name} | {took_s:.1f} | {peak[name] / 1024:.0f} | {shared[name] / 1024:.0f} |")


if __name__ == "__main__":
    main()
