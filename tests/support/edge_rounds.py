"""An edge with scripted clients, without a cloud."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import Message
from support.memory import FakeTime, MemoryGrid, streaming
from support.peers import FakeClient, interval_task, plan

from fedphd.common.config.run import FederationConfig
from fedphd.common.wire.records import read_array, weights_record
from fedphd.common.wire.roster import Roster
from fedphd.edge.round import RoundStats
from fedphd.edge.strategy import EdgeAverage

START = torch.tensor([10.0, 20.0, 30.0])


class ScriptedEdge:
    """An edge with scripted clients."""

    def __init__(
        self,
        clients: Iterable[FakeClient],
        config: FederationConfig | None = None,
        *,
        shared_questions: bool = False,
        **task: Any,
    ) -> None:
        self.config = config or plan()
        self.clients = {client.name: client for client in clients}
        self.memory = MemoryGrid({n: c for n, c in enumerate(self.clients.values(), start=2)})
        self.time = FakeTime()
        self.grid = streaming(self.memory, time=self.time)
        self.failed: list[tuple[str, str]] = []
        self.roster = Roster(
            self.grid,
            asking="edge-0",
            kind="client",
            hello_s=1.0,
            retry_s=60.0,
            max_samples=1000,
            on_change=self._on_change,
            clock=self.time.clock,
        )
        self.told: list[RoundStats] = []
        self.strategy = EdgeAverage(
            "edge-0",
            interval_task(self.config, **task),
            self.roster,
            on_round=self.told.append,
            shared_questions=shared_questions,
        )

    def _on_change(self, name: str, change: str, detail: str) -> None:
        if change == "failed":
            self.failed.append((name, detail))

    def run(self) -> torch.Tensor | None:
        """All rounds of the interval; the edge's weights if anybody trained."""
        result = self.strategy.start(
            self.grid,
            weights_record(START.clone()),
            num_rounds=self.config.schedule.edge_rounds,
            timeout=3.0,
        )
        return read_array(next(iter(result.arrays.values()))) if result.arrays else None

    def sent(self, kind: str) -> list[Message]:
        """Messages of a type, in the order in which they were sent."""
        return [m for m in self.memory.pushed if m.metadata.message_type == kind]
