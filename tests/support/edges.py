"""Edges whose answers a test writes down, and the cloud's strategy over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Message
from support.memory import FakeTime, MemoryGrid, streaming
from support.metrics import metrics
from support.peers import EXACT

from fedphd.common.config.run import FederationConfig
from fedphd.common.unet.costs import PruneReport
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_unet
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.messages import HELLO, HelloReply, IntervalReply, IntervalTask
from fedphd.common.wire.records import (
    read_payload,
    read_variate,
    to_records,
    weights_array,
    weights_record,
)
from fedphd.common.wire.roster import Roster
from fedphd.common.wire.traffic import Traffic
from fedphd.edge.link import CloudLink
from fedphd.server.stats import IntervalStats
from fedphd.server.strategy import FedPhD


def run_config(**sections: Any) -> FederationConfig:
    """A run over two classes with a U-Net that trains in no time."""
    values: dict[str, Any] = {
        "num_classes": 2,
        "model": {
            "block_out_channels": (8, 16), "attention_levels": (1,), "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        "schedule": {"intervals": 1, "edge_rounds": 2, "num_edges": 1, "min_clients": 1},
        "pruning": {"mode": "none"},
        "aggregation": {"factor": 2.0},
        "wire": EXACT,
    }  # fmt: skip
    for name, section in sections.items():
        nested = isinstance(section, dict) and name in values
        values[name] = {**values[name], **section} if nested else section
    return FederationConfig.model_validate(values)


@dataclass
class FakeEdge:
    """An edge whose interval adds ``step`` to every weight.

    One that does not remember says that it holds no weights.
    """

    name: str
    step: float = 1.0
    clients: dict[str, int] = field(default_factory=lambda: {"a": 10})
    shares: tuple[float, ...] = (0.5, 0.5)
    samples: float = 10.0
    client_rounds: int = 2
    reply: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[torch.Tensor], torch.Tensor] | None = None
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    silent: bool = False
    remembers: bool = True
    tasks: list[IntervalTask] = field(default_factory=list)
    given: list[torch.Tensor] = field(default_factory=list)
    variates: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.link = CloudLink(self.name)

    def __call__(self, message: Message) -> Message | None:
        """Answer as a node."""
        if message.metadata.message_type == HELLO:
            holds = self.link.holds if self.remembers else None
            hello = HelloReply(kind="edge", name=self.name, clients=self.clients, holds=holds)
            return Message(to_records(hello), reply_to=message)
        if self.silent:
            return None
        task = read_payload(message, IntervalTask)
        given = self.link.receive(task, weights_array(message))
        self.tasks.append(task)
        self.given.append(given.clone())
        change = None
        if self.change:
            codec = Codec(task.plan.codecs.cloud_variate_down, task.network.tensor_layout())
            self.variates.append(read_variate(message, codec).clone())
            up = Codec(task.plan.codecs.cloud_up, task.network.tensor_layout())
            change = up.pack(self.change(self.variates[-1]))
        values: dict[str, Any] = {
            "edge_id": self.name, "interval": task.interval, "network": task.network,
            "samples_per_round": self.samples, "client_rounds": self.client_rounds,
            "label_distribution": self.shares, "metrics": metrics(self.samples, loss=0.5),
            "mean_steps": 4.0,
            "traffic": Traffic(sent_bytes=3, received_bytes=4), "seconds": 0.1,
            "clients": tuple(self.clients), "failures": (),
        }  # fmt: skip
        # Unchecked, so that a test can send what no honest edge could.
        reply = IntervalReply.model_construct(**(values | self.reply))
        trained = self.weights(given) if self.weights else given + self.step
        weights = Codec(task.plan.codecs.cloud_up, task.network.tensor_layout()).pack(
            trained, given
        )
        return Message(to_records(reply, weights, change), reply_to=message)


class Cloud:
    """The cloud's strategy with scripted edges."""

    def __init__(self, *edges: FakeEdge, config: FederationConfig | None = None) -> None:
        self.config = config or run_config()
        self.edges = {edge.name: edge for edge in edges}
        self.time = FakeTime()
        memory = MemoryGrid(dict(enumerate(edges, start=2)))
        self.nodes, self.grid = memory.nodes, streaming(memory, time=self.time)
        self.roster = Roster(
            self.grid, asking="cloud", kind="edge", hello_s=1.0, retry_s=1e6, max_samples=1000,
            clock=self.time.clock,
        )  # fmt: skip
        self.pruned: list[tuple[int, PruneReport]] = []
        self.told: list[IntervalStats] = []
        unet = build_unet(self.config.model, seed=0)
        self.dense = TensorLayout.of(unet.state_dict()).pack(unet.state_dict())
        self.strategy = FedPhD(
            self.config,
            unet,
            self.roster,
            on_interval=self.told.append,
            on_pruned=lambda interval, report: self.pruned.append((interval, report)),
            gather=lambda: self.roster.refresh(ask_again=True) and None,
        )

    def run(self) -> torch.Tensor:
        """All intervals; returns by how much the weights changed, (numel,)."""
        before = self.strategy.weights()
        self.strategy.start(
            self.grid,
            weights_record(before),
            num_rounds=self.config.schedule.intervals,
            timeout=5.0,
        )
        after = self.strategy.weights()
        return after - before if len(after) == len(before) else after


def scheduled(sparse_rounds: int = 4, intervals: int = 3) -> FederationConfig:
    return run_config(
        pruning={"mode": "scheduled", "ratio": 0.5, "sparse_rounds": sparse_rounds},
        schedule={"intervals": intervals},
    )
