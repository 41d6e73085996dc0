"""Clients and edges whose answers a test writes down, for networks of a few numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Message, RecordDict
from support.metrics import metrics

from fedphd.common.config.run import FederationConfig
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.parts import PartSubset
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.messages import (
    HELLO,
    TRAIN,
    Ack,
    HelloReply,
    IntervalTask,
    TrainReply,
    TrainTask,
    UNetSpec,
)
from fedphd.common.wire.offers import CHOOSE, Choose, ChooseReply
from fedphd.common.wire.records import read_coded, read_payload, read_variate, to_records

LAYOUT = TensorLayout(("a", "b"), ((2,), ()))
NETWORK = UNetSpec(unet={"kind": "tiny"}, layout=LAYOUT.to_json())


# Numbers that a test works out by hand are not rounded on the way.
EXACT = {link: "fp32" for link in ("cloud_down", "cloud_up", "client_down", "client_up")}


def plan(**sections: dict[str, Any] | Any) -> FederationConfig:
    """A run over two classes; ``schedule={"edge_rounds": 2}`` and the like change it."""
    values: dict[str, Any] = {
        "num_classes": 2,
        "schedule": {"edge_rounds": 1, "num_edges": 2, "min_clients": 1},
        "pruning": {"mode": "none"},
        "wire": EXACT,
    }
    for name, section in sections.items():
        merge = isinstance(section, dict) and name in values
        values[name] = {**values[name], **section} if merge else section
    return FederationConfig.model_validate(values)


def interval_task(config: FederationConfig, **changes: Any) -> IntervalTask:
    """The first interval of ``config`` with the tiny network."""
    num_edges = 1 if config.topology == "flat" else config.schedule.num_edges
    values: dict[str, Any] = {"interval": 1, "sparse": False, "num_clients": 2}
    values["num_edges"] = num_edges
    return IntervalTask(**(values | {"network": NETWORK, "plan": config} | changes))


@dataclass
class FakeClient:
    """A client that trains by adding ``step`` to every weight.

    Args:
        name: its stable name.
        counts: images per class.
        step: what one round of training adds.
        edge: the edge that it always chooses; None chooses the asking one.
        reply: fields of its TrainReply that differ from the honest ones.
        weights: sent instead of the trained ones.
        change: sent beside them, under SCAFFOLD: the change of its control variate.
        silent: message types that it never answers.
    """

    name: str
    counts: tuple[int, ...] = (5, 5)
    step: float = 1.0
    edge: str | None = None
    loss: float = 0.5
    choice: dict[str, Any] = field(default_factory=dict)
    reply: dict[str, Any] = field(default_factory=dict)
    weights: torch.Tensor | None = None
    change: torch.Tensor | None = None
    silent: set[str] = field(default_factory=set)
    asked: list[Choose] = field(default_factory=list)
    tasks: list[TrainTask] = field(default_factory=list)
    variates: list[list[float]] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """Images that it registers with."""
        return sum(self.counts)

    def __call__(self, message: Message) -> Message | None:
        """Answer as a node."""
        kind = message.metadata.message_type
        if kind in self.silent:
            return None
        answers = {HELLO: self._hello, CHOOSE: self._choose, TRAIN: self._train}
        records = answers[kind](message) if kind in answers else to_records(Ack(name=self.name))
        return Message(records, reply_to=message)

    def _hello(self, message: Message) -> RecordDict:
        return to_records(HelloReply(kind="client", name=self.name, num_samples=self.num_samples))

    def _choose(self, message: Message) -> RecordDict:
        asked = read_payload(message, Choose)
        self.asked.append(asked)
        chosen = self.edge or asked.asking
        values: dict[str, Any] = {"client_id": self.name, "edge_id": chosen}
        if chosen == asked.asking:
            values["label_counts"] = self.counts
        return to_records(ChooseReply(**(values | self.choice)))

    def _train(self, message: Message) -> RecordDict:
        task = read_payload(message, TrainTask)
        self.tasks.append(task)
        if task.objective.method == "scaffold":
            self.variates.append(read_variate(message).tolist())
        sent = PartSubset(task.network.tensor_layout(), task.send)
        values: dict[str, Any] = {
            "client_id": self.name,
            "interval": task.interval,
            "edge_round": task.edge_round,
            "network": UNetSpec(unet=task.network.unet, layout=sent.chosen.to_json()),
            "num_examples": self.num_samples,
            "metrics": metrics(loss=self.loss),
            "steps": 3,
            "seconds": 0.1,
        }
        received = sent.take(read_coded(message, Codec(task.codec, task.network.tensor_layout())))
        codec = Codec(task.reply_codec, sent.chosen)
        weights = codec.pack(received + self.step, received)
        if self.weights is not None:
            weights = self.weights
        # Unchecked, so that a test can send what no honest client could.
        return to_records(TrainReply.model_construct(**(values | self.reply)), weights, self.change)
