"""What an edge adds up, and which answers it leaves out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, RecordDict
from support.memory import FakeTime, MemoryGrid, streaming

from fedphd.common.quality.moments import FeatureStatistics
from fedphd.common.wire.messages import (
    HELLO,
    ExtractorSpec,
    HelloReply,
    StatisticsReply,
    StatisticsTask,
)
from fedphd.common.wire.records import read_payload, to_records
from fedphd.common.wire.roster import Roster
from fedphd.edge.statistics import collect_statistics

SPEC = ExtractorSpec(
    kind="classifier", name="f", num_features=2, channels=1, image_size=8, num_classes=2,
    layout="[]",
)  # fmt: skip
TASK = StatisticsTask(
    extractor=SPEC, image_size=8, channels=1, num_classes=2, batch_size=4,
    wait_s=5.0, clients=("a", "b"),
)  # fmt: skip
WEIGHTS = torch.tensor([1.0, 2.0])


@dataclass
class Owner:
    """A client with two points of two features."""

    name: str
    points: torch.Tensor
    reply: dict[str, Any] = field(default_factory=dict)
    sums: torch.Tensor | None = None
    silent: bool = False
    error: str = ""
    tasks: list[StatisticsTask] = field(default_factory=list)

    @property
    def statistics(self) -> FeatureStatistics:
        return FeatureStatistics.of(self.points, torch.tensor([0, 1]), 2)

    def __call__(self, message: Message) -> Message | None:
        if message.metadata.message_type == HELLO:
            hello = HelloReply(kind="client", name=self.name, num_samples=2)
            return Message(to_records(hello), reply_to=message)
        self.tasks.append(read_payload(message, StatisticsTask))
        if self.error:
            return Message(Error(200, self.error), reply_to=message)
        return None if self.silent else Message(self._answer(), reply_to=message)

    def _answer(self) -> RecordDict:
        mine = self.statistics
        values = {"name": self.name, "count": 2, "label_counts": mine.label_counts}
        answer = StatisticsReply(**(values | self.reply))
        return to_records(answer, mine.pack() if self.sums is None else self.sums)


A = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
B = torch.tensor([[5.0, 5.0], [1.0, 0.0]])


def collect(*owners: Owner, task: StatisticsTask = TASK) -> tuple[StatisticsReply, torch.Tensor]:
    memory = MemoryGrid(dict(enumerate(owners, start=2)))
    grid = streaming(memory, time=FakeTime(), in_order=False)
    roster = Roster(
        grid, asking="edge-0", kind="client", hello_s=1.0, retry_s=60.0, max_samples=100
    )
    roster.refresh()
    before = grid.traffic
    reply, sums = collect_statistics(task, WEIGHTS, edge_id="edge-0", grid=grid, roster=roster)
    assert reply.traffic == grid.traffic.minus(before)
    return reply, sums


def test_sums_of_two_clients() -> None:
    a, b = Owner("a", A), Owner("b", B)
    reply, sums = collect(a, b)
    assert (reply.name, reply.count, reply.label_counts) == ("edge-0", 4, (2, 2))
    assert (reply.clients, reply.failures) == (("a", "b"), ())
    # Sums (8, 9); squares 0 + 4 + 25 + 1, products 0 + 6 + 25 + 0, squares 1 + 9 + 25 + 0.
    assert sums.tolist() == [8, 9, 30, 31, 35]
    assert a.tasks[0].clients == ()


def test_sums_are_added_in_one_order_whoever_answers_first() -> None:
    a, b = Owner("a", A), Owner("b", B)
    memory, held = MemoryGrid({2: a, 3: b}), list[Message]()
    time = FakeTime({0.5: lambda: memory.deliver(held[0], a(held[0]))})
    grid = streaming(memory, time=time, in_order=False)
    roster = Roster(
        grid, asking="edge-0", kind="client", hello_s=1.0, retry_s=60.0, max_samples=100
    )
    roster.refresh()
    memory.nodes[2] = held.append
    reply, _ = collect_statistics(TASK, WEIGHTS, edge_id="edge-0", grid=grid, roster=roster)
    assert reply.clients == ("a", "b")


def test_only_the_named_clients_are_asked() -> None:
    a, b = Owner("a", A), Owner("b", B)
    reply, sums = collect(a, b, task=TASK.model_copy(update={"clients": ("b", "c")}))
    assert (a.tasks, reply.clients) == ([], ("b",))
    assert reply.failures == ("c: is not connected to edge-0",)
    assert sums.tolist() == b.statistics.pack().tolist()


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"silent": True}, "b: .*no reply within 5 s"),
        ({"reply": {"name": "a"}}, "b: answers as a with 2 images, but registered as b with 2"),
        ({"reply": {"count": 3}}, "b: answers as b with 3 images"),
        ({"reply": {"label_counts": (2,)}}, "b: counts 1 classes; expected 2"),
        ({"reply": {"label_counts": (2, 2)}}, r"b: label counts \[2, 2\] are not those of 2"),
        ({"sums": torch.zeros(4, dtype=torch.float64)}, "b: statistics hold 4 values"),
        ({"sums": torch.full((5,), torch.inf, dtype=torch.float64)}, "b: .* not finite"),
        ({"sums": torch.zeros(5)}, "b: weights: expected a flat float64 array"),
        ({"sums": torch.tensor([9.0, 0, 1, 0, 0]).double()}, "b: .* impossible for 2 images"),
    ],
)
def test_a_bad_answer_is_named_and_left_out(bad: dict[str, Any], problem: str) -> None:
    a = Owner("a", A)
    reply, sums = collect(a, Owner("b", B, **bad))
    assert (reply.clients, reply.count) == (("a",), 2)
    assert sums.tolist() == a.statistics.pack().tolist()
    (failure,) = reply.failures
    assert re.search(problem, failure), failure


def test_an_error_of_a_client_is_told_in_one_short_line() -> None:
    reply, _ = collect(Owner("a", A), Owner("b", B, error="\x1b[2J\nedge-0 is fine" + "x" * 10**6))
    (failure,) = reply.failures
    assert failure.startswith("b: ")
    assert failure.isprintable()
    assert len(failure) < 600
