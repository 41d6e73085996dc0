"""A simulated run against a bare loop of the same training calls: what the federation costs.

``fedphd simulate`` with the digits' preset, everybody in every edge round, without evaluation,
against as many processes as there are cores, each of which trains its share of the clients by the
same ``Trainer``, on the same images and for as many steps, and does nothing else: no messages, no
averages, nothing stored. An edge round of the simulation lasts from the end of an interval to the
end of the next one, over its edge rounds; the first interval, which starts Ray's processes, is
left out. Both take turns, since times drift on a shared machine: the ratio is what to look at.

    python tests/benchmarks/bare.py                          # about 6 minutes
    python tests/benchmarks/bare.py --preset cifar10-16 --data DIR --intervals 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

EDGES = 2
# Neither counts images, nor draws, nor prunes in the midst of what is timed.
QUIET: dict[str, Any] = {
    "evaluation.every_intervals": 1000,
    "evaluation.num_samples": 2,
    "evaluation.sampling_steps": 1,
    "evaluation.grid_rows": 1,
    "evaluation.classifier_epochs": 1,
    "pruning.mode": "none",
    "num_threads": 1,
}


def simulated_s(arguments: argparse.Namespace) -> float:
    """Seconds of an edge round of a simulated run, the median over its intervals but the first."""
    settings = {**QUIET, "schedule.intervals": arguments.intervals + 1}
    command = [
        sys.executable, "-m", "fedphd.deploy.cli", "simulate", "--preset", arguments.preset,
        "--clients", str(arguments.clients), "--edges", str(EDGES),
    ]  # fmt: skip
    if arguments.data:
        command += ["--data", arguments.data]
    for key, value in settings.items():
        command += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        done = subprocess.run(
            [*command, "--run-dir", str(run_dir)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        events = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    ended = [event for event in events if event["event"] == "interval"]
    rounds = max(event["edge_round"] for event in events if event["event"] == "round")
    trained = {event["client_rounds"] for event in ended}
    if trained != {rounds * arguments.clients}:
        raise RuntimeError(f"not everybody trained in every round: {trained}")
    times = [event["time"] for event in ended]
    return median(after - before for before, after in pairwise(times)) / rounds


def bare_s(arguments: argparse.Namespace) -> float:
    """Seconds of as many training calls in as many processes; that of the slowest process."""
    cores = os.cpu_count() or 1
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    workers = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for n in range(cores)
    ]
    for worker in workers:
        worker.stdout.readline()  # type: ignore[union-attr]
    # All are ready, and begin together.
    for worker in workers:
        worker.stdin.write(b"go\n")  # type: ignore[union-attr]
        worker.stdin.flush()  # type: ignore[union-attr]
    answers = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError("a process of the bare loop failed")
    return max(map(float, answers))


def work(arguments: argparse.Namespace) -> None:
    """One process of the bare loop: say that it is ready, wait for a line, say what it took."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.training import flat_weights, train_task

    from fedphd.client.flat_unet import UNetCache
    from fedphd.client.trainer import ClientImages, Trainer
    from fedphd.common.config.roles import CloudConfig, load_config
    from fedphd.common.data.images import LabelledImages
    from fedphd.deploy.launch.client_data import PRESET, SOURCE
    from fedphd.deploy.simulation.run_config import client_config, default_run_config

    torch.set_num_threads(1)
    run = load_config(CloudConfig, None, {"preset": arguments.preset, **QUIET})
    networks, weights = UNetCache(), flat_weights(run.model)
    asked = {**default_run_config(), PRESET: arguments.preset}
    if arguments.data:
        asked[SOURCE] = arguments.data
    players = []
    for part in range(arguments.worker, arguments.clients, os.cpu_count() or 1):
        client = client_config(asked, part, arguments.clients)
        images = LabelledImages(client.data)
        size, channels = run.model.image_size, run.model.channels
        player = Trainer(client_id=f"client-{part}", device="cpu", networks=networks)
        players.append((player, ClientImages(*images.split(image_size=size, channels=channels))))

    def edge_round(number: int) -> None:
        task = train_task(
            run.model, edge_round=number, training=run.federation().training,
            objective=run.objective, diffusion=run.diffusion,
        )  # fmt: skip
        for player, images in players:
            player.train(task, weights, images)

    edge_round(1)
    print(0, flush=True)
    sys.stdin.readline()
    rounds = arguments.intervals * run.schedule.edge_rounds
    started_s = time.perf_counter()
    for number in range(2, rounds + 2):
        edge_round(number)
    print((time.perf_counter() - started_s) / rounds, flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--data", help="a data set in place of the preset's")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--intervals", type=int, default=3, help="that are timed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    print(f"{os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}\n")
    print(f"| an edge round of {arguments.clients} clients | simulated, s | bare loop, s | ratio |")
    print("|---|---:|---:|---:|")
    ratios = []
    for turn in range(1, arguments.turns + 1):
        bare, simulated = bare_s(arguments), simulated_s(arguments)
        ratios.append(simulated / bare)
        print(f"| turn {turn} | {simulated:.2f} | {bare:.2f} | {ratios[-1]:.2f} |", flush=True)
    print(f"| median | | | {median(ratios):.2f} |")


if __name__ == "__main__":
    main()
