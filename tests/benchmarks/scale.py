"""What simulating many clients costs: time, the ServerApp's memory, and bytes on each link.

Runs ``fedphd simulate`` with a tiny network and a made-up data set of 16 images per client, so
that a client's own work is the same however many there are. Prints for each number of clients
and edges: the seconds of an edge round after the first (which also starts Ray's processes), the
most memory that the ServerApp's process ever held (with Ray's driver and Flower's in-memory
SuperLink), and the bytes over each link.

    python tests/benchmarks/scale.py                        # all cases, about 12 minutes
    python tests/benchmarks/scale.py --clients 10,100 --edges 2
    python tests/benchmarks/scale.py --clients 1000,10000 --edges 100 --within 3600 \\
        --set schedule.participation=0.01
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import numpy as np

IMAGES_PER_CLIENT, NUM_CLASSES, IMAGE_SIZE = 16, 10, 8
SETTINGS: dict[str, Any] = {
    "model.block_out_channels": [16, 32],
    "model.norm_num_groups": 4,
    "model.attention_head_dim": 4,
    "training.local_unit": "steps",
    "training.local_amount": 1,
    "training.batch_size": IMAGES_PER_CLIENT,
    "schedule.intervals": 1,
    "schedule.edge_rounds": 2,
    "schedule.query_batch": 100,
    "waits.start_s": 1800.0,
    "pruning.mode": "none",
    "evaluation.reference": None,
    "evaluation.num_samples": 4,
    "evaluation.sampling_steps": 1,
    "num_threads": 1,
    "device": "cpu",
}
POLL_S = 0.2


@dataclass(frozen=True)
class Cost:
    """What one case cost."""

    clients: int
    edges: int
    start_s: float
    round_s: float
    peak_bytes: int
    client_edge_bytes: int
    edge_cloud_bytes: int
    client_rounds: int
    failures: int


def make_data(path: Path, num_clients: int) -> Path:
    """A parquet file of grey noise with labels, 16 images per client."""
    rng = np.random.default_rng(0)
    num_images = num_clients * IMAGES_PER_CLIENT
    pixels = rng.integers(0, 256, (num_images, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    labels = np.arange(num_images) % NUM_CLASSES
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": list(pixels), "label": labels}, features=features)
    table.to_parquet(str(path))
    return path


def run(clients: int, edges: int, data: Path, settings: dict[str, Any], within_s: float) -> Cost:
    """Simulate one case; raises RuntimeError if it fails or takes longer than ``within_s``."""
    folder = data.parent / f"run-{clients}-{edges}"
    command = [
        sys.executable, "-m", "fedphd.deploy.cli", "simulate", "--clients", str(clients),
        "--edges", str(edges), "--data", str(data), "--run-dir", str(folder),
    ]  # fmt: skip
    for key, value in settings.items():
        command += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    with (data.parent / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            peak_bytes = watch(process, folder / "metrics.jsonl", within_s)
        finally:
            process.terminate()
            process.wait(60)
    if process.returncode:
        raise RuntimeError((data.parent / "log").read_text()[-2000:])
    return cost(clients, edges, folder, peak_bytes)


def watch(process: subprocess.Popen[bytes], events: Path, within_s: float) -> int:
    """Wait for the end; return the highest resident memory of the ServerApp's process."""
    deadline_s = time.monotonic() + within_s
    status: Path | None = None
    peak_bytes = 0
    while process.poll() is None and time.monotonic() < deadline_s:
        if status is None and events.exists() and (text := events.read_text()):
            status = Path(f"/proc/{json.loads(text.splitlines()[0])['pid']}/status")
        if status is not None and status.exists():
            match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            peak_bytes = max(peak_bytes, int(match[1]) * 1024 if match else 0)
        time.sleep(POLL_S)
    return peak_bytes


def cost(clients: int, edges: int, folder: Path, peak_bytes: int) -> Cost:
    """Read the figures that a finished run left."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    seconds: dict[int, list[float]] = defaultdict(list)
    for event in (e for e in events if e["event"] == "round"):
        seconds[event["round"]].append(event["seconds"])
    # A round is over when its slowest edge is.
    later = [max(values) for number, values in seconds.items() if number > 1]
    return Cost(
        clients,
        edges,
        summary["seconds"]["waiting_for_participants"],
        mean(later),
        peak_bytes,
        summary["bytes"]["client_edge"],
        summary["bytes"]["edge_cloud"],
        summary["client_rounds"],
        sum(len(event["failures"]) for event in events if event["event"] == "round"),
    )


def numbers(text: str) -> list[int]:
    """``"10,100"`` as numbers."""
    return [int(part) for part in text.split(",")]


def setting(text: str) -> tuple[str, Any]:
    """``"a.b=3"`` as key and value."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main() -> None:
    """Print the table."""
    datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=numbers, default=[10, 100, 1000])
    parser.add_argument("--edges", type=numbers, default=[2, 5, 20])
    parser.add_argument("--set", type=setting, action="append", default=[], dest="settings")
    parser.add_argument("--within", type=float, default=900.0, help="seconds per case")
    arguments = parser.parse_args()
    settings = {**SETTINGS, **dict(arguments.settings)}
    print(f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}")
    print(
        "| clients | edges | s to greet all | s per edge round | ms per client and round | "
        "ServerApp peak MB | client-edge kB per client and round | edge-cloud kB per edge | "
        "failures |\n|" + "---:|" * 9
    )
    with tempfile.TemporaryDirectory() as folder:
        for clients in arguments.clients:
            data = make_data(Path(folder) / f"{clients}.parquet", clients)
            for edges in arguments.edges:
                try:
                    c = run(clients, edges, data, settings, arguments.within)
                except (RuntimeError, FileNotFoundError) as error:
                    print(f"| {clients} | {edges} | failed: {str(error)[-300:]!r} |", flush=True)
                    continue
                trained = c.client_rounds / settings["schedule.edge_rounds"]
                per_client = c.client_edge_bytes / max(1, c.client_rounds) / 1e3
                print(
                    f"| {clients} | {edges} | {c.start_s:.1f} | {c.round_s:.2f} | "
                    f"{1e3 * c.round_s / max(1, trained):.0f} | {c.peak_bytes / 1e6:.0f} | "
                    f"{per_client:.0f} | {c.edge_cloud_bytes / edges / 1e3:.0f} | {c.failures} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
