"""Seconds of a round of FedAvg with a large network and next to no training: the wire's cost.

Real processes on this machine's loopback: one server, four clients, the U-Net for CIFAR-10 (143 MB
as float32) on images of 8 pixels, of which a client has two. Flower's stock nodes beside this
project's flat topology, with each codec, in plain text and with TLS and keys. All in one run, since
times drift on a shared machine: the ratios are what to look at, and the CPU seconds of all
processes together in a round. A round lasts from the end of the one before; the first one is left
out. Flower's clients add a constant to the weights, ours take one step of SGD, which is more.

    python tests/benchmarks/peers.py                       # all, about 15 minutes
    python tests/benchmarks/peers.py --only stock-flat,fp32,int8 --rounds 2
    python tests/benchmarks/peers.py --small --rounds 10   # 11 MB, one client: latency
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.links import Link
from support.processes import Processes, free_port
from support.site import Site

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.unet.model import build_unet
from fedphd.common.wire.messages import PACKAGE_VERSION

STOCK = Path(__file__).with_name("stock")
WITHIN_S = 1800.0
# As many images as the largest number of clients needs, two each.
CLIENT: dict[str, Any] = {
    "num_threads": 1,
    "data.partition.num_partitions": 4,
    "data.partition.kind": "iid",
    "data.max_images": 8,
}
RUN: dict[str, Any] = {
    "topology": "flat",
    "model.image_size": 8,
    "model.channels": 1,
    "training.local_unit": "steps",
    "training.local_amount": 1,
    "training.batch_size": 2,
    # Flower's clients of this benchmark keep nothing between rounds; so neither do ours.
    "training.optimizer": "sgd",
    "schedule.edge_rounds": 1,
    "schedule.participation": 1.0,
    "pruning.mode": "none",
    "evaluation.every_intervals": 1000,
    "evaluation.num_samples": 2,
    "evaluation.sampling_steps": 1,
    "evaluation.grid_rows": 1,
    "evaluation.classifier_epochs": 1,
    "num_threads": 1,
}


Run = Callable[[Processes, int], list[float]]


@dataclass(frozen=True)
class Load:
    """A network and how many clients train it; ``preset`` is the network's, but for ``model``.

    ``least_parameters`` makes sure that it is this network that was measured.
    """

    title: str
    preset: str
    model: dict[str, Any]
    clients: int
    least_parameters: float

    def settings(self) -> dict[str, Any]:
        """The settings of the U-Net, whatever the images' size."""
        loaded = load_config(CloudConfig, None, {"preset": self.preset, **self.model})
        model = loaded.model.model_dump(mode="json")
        return {f"model.{key}": value for key, value in model.items() if value is not None}


LARGE = Load("143 MB, 4 clients", "cifar10", {}, clients=4, least_parameters=35e6)
SMALL = Load(
    "11 MB, 1 client", "digits", {"model.block_out_channels": [64, 128]},
    clients=1, least_parameters=2.7e6,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row of the table; ``run`` gives the moments at which rounds ended, s since 1970."""

    name: str
    title: str
    run: Run


class Watch:
    """What the processes of a case take together, looked at often.

    Attributes:
        gigabytes: the most memory that all of them held.
        server_gigabytes: the most that the server's held, its SuperLink and its ServerApp together.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes, self._stop = processes, threading.Event()
        self.gigabytes = self.server_gigabytes = 0.0
        # CPU seconds of each process, also of one that has ended, and their sums over time.
        self._spent_s: dict[int, float] = {}
        self._sums: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            total = servers = 0
            for pid in self._processes.running():
                try:
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
                    stat = Path(f"/proc/{pid}/stat").read_text("ascii")
                except OSError:
                    continue
                kilobytes = next(int(x.split()[1]) for x in text.splitlines() if x[:4] == "Pss:")
                total += kilobytes
                servers += kilobytes if is_server(pid) else 0
                # The fields after the name: utime and stime are the 14th and 15th of all.
                user, system = stat.rpartition(")")[2].split()[11:13]
                self._spent_s[pid] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
            self.gigabytes = max(self.gigabytes, total / 1e6)
            self.server_gigabytes = max(self.server_gigabytes, servers / 1e6)
            self._sums.append((time.time(), sum(self._spent_s.values())))

    def cpu_s(self, moment_s: float) -> float:
        """CPU seconds that all had taken at a moment, in seconds since 1970, to 1 s."""
        return next((spent for at, spent in self._sums if at >= moment_s), self._sums[-1][1])

    def end(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()


def is_server(pid: int) -> bool:
    """Whether a process is of the server: Flower's names for its parts, and this project's role."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    parts = {"flower-superlink", "flwr-serverapp", "flower-superexec", "cloud"}
    return bool(parts & {Path(word).name for word in words})


def stock(load: Load, flat: bool, links: Sequence[Link] = ()) -> Run:
    """Flower's stock SuperLink, SuperNodes and FedAvg; each node behind a link, if there are."""

    def run(processes: Processes, rounds: int) -> list[float]:
        folder = processes.folder
        config = load_config(CloudConfig, None, load.settings())
        state = build_unet(config.model, seed=0).state_dict()
        shapes, times = folder / "shapes.json", folder / "times"
        shapes.write_text(json.dumps({name: list(t.shape) for name, t in state.items()}), "utf-8")
        control, port = f"127.0.0.1:{free_port()}", free_port()
        processes.start_flower(
            "flower-superlink", "--insecure", "--isolation", "subprocess",
            "--control-api-address", control, "--serverappio-api-address", "127.0.0.1:0",
            "--fleet-api-address", f"{'0.0.0.0' if links else '127.0.0.1'}:{port}",
        )  # fmt: skip
        clients = len(links) or load.clients
        for link in links or [None] * clients:
            processes.start_flower(
                "flower-supernode", "--insecure",
                "--superlink", f"{link.outside if link else '127.0.0.1'}:{port}",
                "--clientappio-api-address", "127.0.0.1:0",
                prefix=link.prefix if link else (),
            )  # fmt: skip
        home = folder / "flower-home"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{control}"\n'
            "insecure = true\n"
        )
        values = f'shapes="{shapes}" times="{times}" clients={clients} rounds={rounds + 1}'
        values += f" flat={str(flat).lower()}"
        time.sleep(10)
        submitted = processes.start_flower("flwr", "run", str(STOCK), "--run-config", values)
        if submitted.wait_exit() != 0:
            raise RuntimeError(submitted.text)
        deadline_s = time.monotonic() + WITHIN_S
        while len(ended := times.read_text().split() if times.exists() else []) < rounds + 2:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{len(ended)} of {rounds + 2} rounds: see {folder}")
            time.sleep(0.5)
        return [float(moment) for moment in ended[1:]]

    return run


def measured(site: Site, load: Load, *, clients: int | None = None) -> list[float]:
    """The moments at which the intervals of ``site`` ended, s since 1970, once it has ended."""
    running = dict(site.programs)
    while running:
        for name, program in list(running.items()):
            if code := program.process.poll():
                raise RuntimeError(f"{name} ended with {code}:\n{program.text}")
            if code == 0:
                del running[name]
        time.sleep(0.2)
    ended = site.events("interval")
    if (found := ended[0]["parameters"]) < load.least_parameters:
        raise RuntimeError(f"not the network of {load.title}: {found} parameters")
    if any(len(event["clients"]) < (clients or load.clients) for event in ended):
        raise RuntimeError("not all clients trained in every round")
    return [float(event["time"]) for event in ended]


def ours(load: Load, down: str, up: str, *, tls: bool) -> Run:
    """This project's cloud and clients."""

    def run(processes: Processes, rounds: int) -> list[float]:
        settings = {
            **load.settings(),
            **RUN,
            "schedule.min_clients": load.clients,
            **{"wire.client_down": down, "wire.client_up": up},
            "schedule.intervals": rounds + 1,
        }
        keys = None
        if tls:
            keys = processes.folder / "keys"
            command = [sys.executable, "-m", "fedphd.deploy.cli", "keys", "dev", "--edges", "0"]
            subprocess.run(
                [*command, "--clients", str(load.clients)], cwd=processes.folder, check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
        site = Site(processes, settings, edges=(), keys=keys)
        site.start("cloud")
        for number in range(load.clients):
            site.start(f"client-{number}", **CLIENT)
        return measured(site, load)

    return run


def cases(load: Load = LARGE) -> list[Case]:
    """All rows."""
    rows = [
        Case("stock", "Flower 1.31, an array per tensor", stock(load, False)),
        Case("stock-flat", "Flower 1.31, one flat array", stock(load, True)),
    ]
    for name, down, up in (
        ("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16"), ("int8", "bf16", "int8"),
        ("int8-both", "int8", "int8"), ("int4", "bf16", "int4"),
    ):  # fmt: skip
        title = f"this project, {down} down, {up} up"
        rows.append(Case(name, title, ours(load, down, up, tls=False)))
        rows.append(Case(f"{name}-tls", f"{title}, TLS and keys", ours(load, down, up, tls=True)))
    return rows


def limits_s() -> dict[str, float]:
    """What nobody can do without, in seconds for 143 MB; the least of five tries."""
    data = os.urandom(1 << 20) * 143
    listener = socket.create_server(("127.0.0.1", 0))

    def receive() -> None:
        connection, _ = listener.accept()
        with connection:
            into = memoryview(bytearray(1 << 20))
            while connection.recv_into(into):
                pass

    def loopback() -> None:
        thread = threading.Thread(target=receive)
        thread.start()
        with socket.create_connection(listener.getsockname()) as sender:
            sender.sendall(data)
        thread.join()

    works: dict[str, Callable[[], object]] = {
        "copy": lambda: bytearray(data),
        "SHA-256": lambda: hashlib.sha256(data).digest(),
        "loopback, one way": loopback,
    }
    found = {}
    for name, work in works.items():
        times = []
        for _ in range(5):
            started_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - started_s)
        found[name] = min(times)
    listener.close()
    return found


def commit() -> str:
    """The commit that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(command, cwd=STOCK, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "an unknown commit"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="names, with commas: " + ", ".join(c.name for c in cases()))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="11 MB and one client")
    arguments = parser.parse_args()
    load = SMALL if arguments.small else LARGE
    names = arguments.only.split(",") if arguments.only else [case.name for case in cases()]
    print(f"{os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}, ")
    print(f"torch {torch.__version__}, fedphd {PACKAGE_VERSION} at {commit()}; ")
    print(f"{arguments.rounds} rounds after the first; 143 MB take:")
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in limits_s().items()), "\n")
    print(
        f"| {load.title} | round, s (least, median, most) | of the first row | CPU s | GB | "
        "server's GB |\n|---|---|---:|---:|---:|---:|",
        flush=True,
    )
    first = None
    for case in (case for case in cases(load) if case.name in names):
        with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
            watch = Watch(processes)
            moments = case.run(processes, arguments.rounds)
            watch.end()
        seconds = [after - before for before, after in pairwise(moments)]
        cpu_s = (watch.cpu_s(moments[-1]) - watch.cpu_s(moments[0])) / len(seconds)
        middle = median(seconds)
        first = first or middle
        spread = f"{min(seconds):.3g}, {middle:.3g}, {max(seconds):.3g}"
        ratio = f"{middle / first:.2f}"
        print(
            f"| {case.title} | {spread} | {ratio} | {cpu_s:.3g} | {watch.gigabytes:.1f} | "
            f"{watch.server_gigabytes:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
