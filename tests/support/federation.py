"""A whole federation in one process: the real cloud, edges and clients over grids in memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from support.memory import MemoryGrid
from support.peers import EXACT

from fedphd.client.resident import Resident
from fedphd.common.config.roles import ClientConfig, CloudConfig, load_config
from fedphd.common.events import EventLog, Verdict
from fedphd.common.stores import FileStore
from fedphd.common.wire.grid import streaming_grid
from fedphd.common.wire.messages import TRAIN, IntervalTask, TrainTask
from fedphd.common.wire.records import read_payload
from fedphd.deploy.launch.runs import Resumed
from fedphd.deploy.simulation.virtual_edges import grid_of_edges
from fedphd.edge.app import STATE, EdgeService
from fedphd.server.app import main

FIRST_EDGE, FIRST_CLIENT = 101, 11
# Learns in seconds on one core. Everything that moves a loss is set, so that tuning the preset
# leaves the stored losses alone.
TINY: dict[str, Any] = {
    "model.block_out_channels": [8, 16],
    "model.attention_head_dim": 4,
    "model.norm_num_groups": 4,
    "model.attention_levels": [1],
    "model.layers_per_block": 1,
    "training.learning_rate": 3e-3,
    "training.batch_size": 16,
    "training.local_unit": "epochs",
    "training.local_amount": 2,
    "training.optimizer_state": "keep",
    "selection.policy": "homogeneity",
    "selection.factor": 4.0,
    "aggregation.factor": 20.0,
    "ema.decay": 0.995,
    **{f"wire.{link}": codec for link, codec in EXACT.items()},
    "schedule.num_edges": 2,
    "schedule.min_clients": 4,
    "schedule.intervals": 2,
    "schedule.edge_rounds": 1,
    "schedule.query_batch": 2,
    "pruning.mode": "none",
    "pruning.ratio": 0.5,
    "pruning.sparsity_lambda": 1e-4,
    "evaluation.num_samples": 16,
    "evaluation.sampling_steps": 2,
    "evaluation.reference": None,
    "num_threads": 1,
    "device": "cpu",
}


class Federation:
    """Edges and clients that wait for ``run``.

    Args:
        folder: gets a folder per participant.
        overrides: dotted settings of the cloud, on top of ``TINY``.
        num_edges, num_clients: participants.
        parts: parts that the digits are cut into; clients have the first ones.
        classes: classes of images of each part.
    """

    def __init__(
        self,
        folder: Path,
        overrides: dict[str, Any],
        *,
        num_edges: int = 2,
        num_clients: int = 4,
        parts: int = 30,
        classes: int = 2,
    ) -> None:
        values = {**TINY, "out_dir": str(folder), **overrides}
        self.config = load_config(CloudConfig, None, values)
        self._folder = folder
        self.run_dir = folder / "run"
        self._logs: list[EventLog] = []
        self.stop = threading.Event()
        self.addresses = [f"127.0.0.1:{n + 1}" for n in range(num_edges)]
        self.clients = [self._client(n, parts, classes) for n in range(num_clients)]
        self.edge_grids = [self._edge_grid() for _ in self.addresses]
        self.edges = [self._edge(n, folder) for n in range(num_edges)]
        self.cloud_grid = MemoryGrid(
            {FIRST_EDGE + n: one_at_a_time(edge.handle) for n, edge in enumerate(self.edges)},
            threaded=True,
        )

    def _client(self, number: int, parts: int, classes: int) -> Resident:
        partition = {
            "num_partitions": parts,
            "partition_id": number,
            "classes_per_partition": classes,
        }
        client = Resident(
            ClientConfig.model_validate(
                {
                    "client_id": f"client-{number}",
                    "state_dir": self._folder / f"client-{number}",
                    "edges": tuple(self.addresses),
                    "data": {"partition": partition},
                    "device": "cpu",
                }
            ),
            stop=self.stop,
        )
        for address in self.addresses:
            client.board.set_connected(address, True)
        return client

    def _edge_grid(self) -> MemoryGrid:
        nodes = {
            FIRST_CLIENT + n: one_at_a_time(client.answer) for n, client in enumerate(self.clients)
        }
        return MemoryGrid(nodes, threaded=True)

    def _edge(self, number: int, folder: Path) -> EdgeService:
        log = self._log(folder / f"edge-{number}" / "events.jsonl", "edge", f"edge-{number}")
        grid = streaming_grid(self.edge_grids[number], upload_stall_s=20.0, in_order=False)
        store = FileStore(folder / f"edge-{number}" / STATE, resident=True)
        return EdgeService(f"edge-{number}", grid, log, self.stop, store=store)

    def _log(self, path: Path, role: str, node: str, before: int = 0) -> EventLog:
        self._logs.append(EventLog(path, role=role, node=node, before=before))
        return self._logs[-1]

    def run(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        resumed: Resumed | None = None,
    ) -> Verdict:
        """The whole training run."""
        before, so_far = torch.get_num_threads(), resumed or Resumed()
        try:
            log = self._log(self.run_dir / "metrics.jsonl", "cloud", "cloud", so_far.events)
            grid = grid_of_edges(self.cloud_grid, self.config, log, simulated=False)
            return main(
                grid, self.config, log, self.run_dir, clock=clock, resume=so_far.interval > 0,
            )  # fmt: skip
        finally:
            torch.set_num_threads(before)
            for log in self._logs:
                log.close()

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The cloud's events of a kind."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        content: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return content

    def edge_tasks(self) -> list[IntervalTask]:
        """Orders that the cloud gave."""
        return [read_payload(m, IntervalTask) for m in trainings(self.cloud_grid)]

    def client_tasks(self) -> list[TrainTask]:
        """Orders that the edges gave."""
        return [read_payload(m, TrainTask) for grid in self.edge_grids for m in trainings(grid)]


def run_simulated(grid: MemoryGrid, folder: Path, overrides: dict[str, Any]) -> CloudConfig:
    """A successful run over virtual edges, whose clients are the nodes of ``grid``."""
    config = load_config(CloudConfig, None, {"out_dir": str(folder), **overrides})
    log = EventLog(folder / "metrics.jsonl", role="cloud", node="cloud")
    threads = torch.get_num_threads()
    try:
        edges = grid_of_edges(grid, config, log, simulated=True)
        assert main(edges, config, log, folder, simulated=True).exit_code == 0
    finally:
        torch.set_num_threads(threads)
        log.close()
    return config


def trainings(grid: MemoryGrid) -> list[Message]:
    """Training messages that went over ``grid``."""
    return [m for m in grid.pushed if m.metadata.message_type == TRAIN]


def one_at_a_time(
    handler: Callable[[Message], Message | None],
) -> Callable[[Message], Message | None]:
    """As a node does it."""
    lock = threading.Lock()

    def handle(message: Message) -> Message | None:
        with lock:
            return handler(message)

    return handle
