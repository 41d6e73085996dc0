"""An interval: what an edge tells the cloud about its rounds."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, Message
from support.memory import FakeTime, MemoryGrid, streaming
from support.metrics import metrics
from support.peers import NETWORK, FakeClient, interval_task, plan

from fedphd.common.config.run import FederationConfig
from fedphd.common.errors import ReplyError
from fedphd.common.events import EventLog
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.messages import (
    FINISH,
    HELLO,
    TRAIN,
    Ack,
    Finish,
    Hello,
    HelloReply,
    IntervalReply,
    RoundMembers,
)
from fedphd.common.wire.metrics import TrainMetrics
from fedphd.common.wire.payload import Payload
from fedphd.common.wire.records import (
    Dtype,
    read_array,
    read_payload,
    read_weights,
    to_array,
    to_records,
    weights_array,
)
from fedphd.common.wire.roster import Acquaintances, Roster
from fedphd.edge.app import EdgeService
from fedphd.edge.interval import run_interval
from fedphd.edge.link import CloudLink
from fedphd.edge.strategy import update_bounds

START = torch.tensor([10.0, 20.0, 30.0])


def interval(
    clients: Iterable[FakeClient], config: FederationConfig, weights: torch.Tensor = START
) -> tuple[IntervalReply, torch.Tensor]:
    """Run an interval over scripted clients."""
    grid = streaming(MemoryGrid(dict(enumerate(clients, start=2))))
    roster = Roster(
        grid, asking="edge-0", kind="client", hello_s=1.0, retry_s=60.0, max_samples=1000
    )
    reply, array, _ = run_interval(
        interval_task(config),
        Array(weights.numpy()),
        edge_id="edge-0",
        link=CloudLink("edge-0"),
        grid=grid,
        roster=roster,
        on_round=lambda strategy, stats: None,
    )
    dtype: Dtype = "float32" if config.codecs.cloud_up == "fp32" else "uint8"
    return reply, read_array(to_array(array), dtype)


def test_a_quorum_of_the_clients_is_enough() -> None:
    """With real waits: 0.3 s, where ``waits.round_s`` would be 600 s."""
    clients = [FakeClient("first"), FakeClient("second", step=3.0), FakeClient("slow", step=99.0)]
    clients[2].silent = {TRAIN}
    config = plan(schedule={"quorum": 0.6}, waits={"straggler_s": 0.3})
    reply, weights = interval(clients, config)
    assert weights.tolist() == [12.0, 22.0, 32.0]
    assert reply.clients == ("first", "second")
    assert reply.failures == ("slow: no reply within 0.3 s after 2 of 3 had answered",)


def test_reply_sums_up_the_rounds() -> None:
    first = FakeClient("first", (10, 0), step=1.0, loss=0.2)
    second = FakeClient("second", (0, 30), step=5.0, loss=0.6)
    reply, weights = interval([second, first], plan(schedule={"edge_rounds": 2}))
    assert weights.tolist() == [18.0, 28.0, 38.0]
    assert (reply.edge_id, reply.interval) == ("edge-0", 1)
    assert reply.samples_per_round == 40.0
    assert reply.client_rounds == 4
    assert reply.label_distribution == (0.25, 0.75)
    assert reply.metrics.loss.value == pytest.approx(0.5)
    assert reply.mean_steps == 6.0
    assert reply.clients == ("first", "second")
    assert reply.rounds == (RoundMembers(clients=("first", "second")),) * 2
    assert reply.failures == ()
    assert reply.network == NETWORK


def test_validation_is_of_the_weights_that_came_from_the_cloud() -> None:
    class Improving(FakeClient):
        def _train(self, message: Message) -> Any:
            self.reply = {"metrics": metrics(validation_loss=1.0 / (1 + len(self.tasks)))}
            return super()._train(message)

    reply, _ = interval([Improving("a", (5, 5))], plan(schedule={"edge_rounds": 3}))
    validation = reply.metrics.validation_loss
    # Of the 10 images of one of three rounds.
    assert (validation.value, validation.weight) == (1.0, pytest.approx(10 / 3))


def test_rounds_without_clients_count_in_the_mean_samples() -> None:
    class Once(FakeClient):
        def _choose(self, message: Message) -> Any:
            records = super()._choose(message)
            self.edge = "edge-1"
            return records

    reply, weights = interval([Once("a", (5, 5))], plan(schedule={"edge_rounds": 4}))
    assert weights.tolist() == [11.0, 21.0, 31.0]
    assert reply.samples_per_round == 2.5
    assert (reply.client_rounds, reply.mean_steps, reply.metrics.loss.value) == (1, 3.0, 0.5)
    assert [one.clients for one in reply.rounds] == [("a",), (), (), ()]


@pytest.mark.parametrize(
    "clients", [[], [FakeClient("a", edge="edge-1")], [FakeClient("a", weights=START * math.nan)]]
)
def test_edge_without_clients_keeps_the_model(clients: list[FakeClient]) -> None:
    reply, weights = interval(clients, plan())
    assert weights.tolist() == START.tolist()
    assert (reply.client_rounds, reply.samples_per_round) == (0, 0.0)
    assert reply.metrics == TrainMetrics()
    assert reply.label_distribution == (0.5, 0.5)
    assert reply.clients == ()


def test_failures_of_all_rounds_are_reported() -> None:
    bad = FakeClient("bad", reply={"num_examples": 1})
    reply, _ = interval([bad, FakeClient("good")], plan(waits={"retry_s": 1e-9}))
    assert reply.failures == ("bad: claims 1 examples, but registered with 10",)
    assert reply.rounds == (RoundMembers(clients=("good",), left_out=("bad",)),)
    assert reply.clients == ("good",)


def test_traffic_is_that_of_the_interval_only() -> None:
    grid = streaming(MemoryGrid({2: FakeClient("a")}))
    roster = Roster(
        grid, asking="edge-0", kind="client", hello_s=1.0, retry_s=60.0, max_samples=1000
    )
    roster.refresh()
    before = grid.traffic
    replies = [
        run_interval(
            interval_task(plan()), Array(START.numpy()), edge_id="edge-0",
            link=CloudLink("edge-0"), grid=grid, roster=roster,
            on_round=lambda strategy, stats: None,
        )[0]
        for _ in range(2)
    ]  # fmt: skip
    assert before.sent_bytes > 0
    assert replies[0].traffic + replies[1].traffic == grid.traffic.minus(before)
    assert replies[0].traffic.sent_bytes > 0
    assert replies[0].traffic.received_bytes > 0


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (torch.zeros(4), "got 4 values; the network has 3"),
        (torch.tensor([0.0, math.nan, 0.0]), "tensor a holds nan"),
    ],
)
def test_weights_of_the_cloud_are_checked(weights: torch.Tensor, text: str) -> None:
    with pytest.raises(ReplyError, match=text):
        interval([], plan(), weights)


class Service:
    """An edge's service with scripted clients, spoken to as the cloud does."""

    def __init__(self, path: Path, *clients: FakeClient) -> None:
        self.stop = threading.Event()
        self.clients = clients
        self.memory = MemoryGrid(dict(enumerate(clients, start=2)))
        self.events = EventLog(path / "events.jsonl", role="edge", node="edge-0")
        grid = streaming(self.memory, time=FakeTime())
        self.service = EdgeService("edge-0", grid, self.events, self.stop, farewell_s=0.0)

    def ask(
        self, kind: str, payload: Payload, weights: torch.Tensor | Array | None = None
    ) -> Message:
        """Hand over a message of the cloud."""
        return self.service.handle(Message(to_records(payload, weights), 9, kind))


Make = Callable[..., Service]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Make]:
    """Makes services, and closes their event logs."""
    made: list[Service] = []

    def make(*clients: FakeClient) -> Service:
        made.append(Service(tmp_path, *clients))
        return made[-1]

    yield make
    for one in made:
        one.events.close()


def test_service_introduces_its_clients(service: Make) -> None:
    world = service(FakeClient("b", (1, 2)), FakeClient("a", (4, 4)))
    reply = read_payload(world.ask(HELLO, Hello(asking="cloud")), HelloReply)
    assert (reply.kind, reply.name, reply.clients) == ("edge", "edge-0", {"a": 8, "b": 3})


def test_edges_of_one_process_speak_for_everybody_once(tmp_path: Path) -> None:
    memory = MemoryGrid({n: FakeClient(name, (1, 2)) for n, name in enumerate("abcde", start=2)})
    known, said = Acquaintances(), list[list[str]]()
    with closing(EventLog(tmp_path / "events.jsonl", role="edge", node="edge")) as events:
        edges = [
            EdgeService(
                f"edge-{number}", streaming(memory, time=FakeTime()), events, threading.Event(),
                known=known, place=(number, 2),
            )
            for number in range(2)
        ]  # fmt: skip
        for edge in edges:
            edge.roster.refresh()
        # Each leaves another one alone, which shifts nobody from one share to the other.
        edges[0].roster.rest("a", "late", "error")
        edges[1].roster.rest("d", "late", "error")
        for edge in edges:
            answer = edge.handle(Message(to_records(Hello(asking="cloud")), 9, HELLO))
            said.append(list(read_payload(answer, HelloReply).clients))
    assert said == [["a", "c", "e"], ["b", "d"]]
    assert len(memory.pushed) == 5


def test_service_answers_an_interval_and_logs_its_rounds(service: Make, tmp_path: Path) -> None:
    world = service(FakeClient("a"), FakeClient("b", edge="edge-1"))
    task = interval_task(plan(schedule={"edge_rounds": 2, "intervals": 3}), interval=2)
    message = world.ask(TRAIN, task, START)
    assert read_payload(message, IntervalReply).client_rounds == 2
    assert read_weights(message).tolist() == [12.0, 22.0, 32.0]
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    rounds = [event for event in map(json.loads, lines) if event["event"] == "round"]
    assert [(e["round"], e["rounds"], e["clients"]) for e in rounds] == [
        (3, 6, ["a"]),
        (4, 6, ["a"]),
    ]
    assert rounds[0]["label_distribution"] == [0.5, 0.5]


def test_service_forgets_another_run(service: Make) -> None:
    """What it learns from round to round belongs to the run, and depends on its settings."""
    world = service(FakeClient("a"))
    one = {"edge_rounds": 1, "num_edges": 1}
    for run_name in ("first", "first", "second"):
        world.ask(TRAIN, interval_task(plan(schedule=one), run_name=run_name), START)
    assert [asked.run_name for asked in world.clients[0].asked] == ["first", "second"]
    # Another number of part sets, each with a bound of its own.
    bounds = world.service._bounds
    parts = plan(schedule=one, exchange={"parts": "usplit"})
    world.service._begin(interval_task(parts, run_name="third"))
    assert len(world.service._bounds) == len(update_bounds(parts)) > len(bounds)


def test_service_logs_who_trains_and_who_has_answered_while_others_train(
    service: Make, tmp_path: Path
) -> None:
    broken = FakeClient("b")
    broken.silent = {TRAIN}
    world = service(FakeClient("a"), broken, FakeClient("c", edge="edge-1"))
    world.ask(
        TRAIN, interval_task(plan(schedule={"edge_rounds": 1}, waits={"round_s": 0.2})), START
    )
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    began, replied, *_ = (e for e in events if e["event"] in ("round_began", "replied", "round"))
    assert (began["event"], began["clients"]) == ("round_began", ["a", "b"])
    assert (replied["event"], replied["client"]) == ("replied", "a")
    assert replied["loss"] is not None
    assert 0 <= replied["seconds"] < 60
    kinds = [event["event"] for event in events]
    # The reply is told before the round's end, for which the edge waits.
    assert kinds.index("replied") < kinds.index("round")


def test_service_sends_weights_on_as_they_came(service: Make) -> None:
    world = service(FakeClient("a"), FakeClient("b"))
    received = Array(START.numpy())
    world.ask(TRAIN, interval_task(plan(schedule={"edge_rounds": 1})), received)
    orders = [m for m in world.memory.pushed if m.metadata.message_type == TRAIN]
    # One copy in memory, however large the network and however many clients.
    assert [weights_array(order).data is received.data for order in orders] == [True, True]


def test_service_drops_clients_that_the_plan_does_not_allow(service: Make) -> None:
    world = service(FakeClient("a", (50, 50)), FakeClient("b", (5, 5)))
    world.ask(HELLO, Hello(asking="cloud"))
    task = interval_task(plan(schedule={"max_client_samples": 50}))
    assert read_payload(world.ask(TRAIN, task, START), IntervalReply).clients == ("b",)


def test_service_tells_its_clients_the_end(service: Make) -> None:
    world = service(FakeClient("a", silent={FINISH}), FakeClient("b"))
    world.ask(HELLO, Hello(asking="cloud"))
    reply = world.ask(FINISH, Finish(exit_code=4, message="too few"))
    assert read_payload(reply, Ack).name == "edge-0"
    told = [m for m in world.memory.pushed if m.metadata.message_type == FINISH]
    assert [read_payload(m, Finish).message for m in told] == ["too few"] * 2
    assert (world.service.verdict.exit_code, world.service.verdict.message) == (4, "too few")
    world.stop.wait()


def test_service_refuses_other_messages(service: Make) -> None:
    world = service()
    with pytest.raises(ValueError, match=r"an edge does not answer 'evaluate'"):
        world.ask("evaluate", Hello(asking="cloud"))
    with pytest.raises(ReplyError, match="malformed IntervalTask"):
        world.ask(TRAIN, Hello(asking="cloud"), START)
    with pytest.raises(ReplyError, match="carries no weights"):
        world.ask(TRAIN, interval_task(plan()))


def test_codecs_on_both_links() -> None:
    """Weights come whole where the edge has none, and differences go up."""
    wire = dict.fromkeys(("cloud_down", "client_down", "client_up", "cloud_up"), "bf16")
    config = plan(wire=wire, schedule={"edge_rounds": 2})
    start = torch.tensor([10.0, 20.0, 30.0])
    codec = Codec("bf16", NETWORK.tensor_layout())
    clients = [FakeClient("a", step=1.0), FakeClient("b", step=2.0)]
    reply, came = interval(clients, config, start)
    assert reply.failures == ()
    # Two rounds that each moved by 1.5, as a difference.
    assert codec.unpack(came, start).tolist() == [13.0, 23.0, 33.0]
    assert {task.codec for client in clients for task in client.tasks} == {"bf16"}


def test_rounding_on_the_way_down_does_not_move_the_master() -> None:
    """Clients that train nothing send no difference, so float32 weights stay what they were."""
    config = plan(wire={"client_down": "bf16", "client_up": "int8"}, schedule={"edge_rounds": 3})
    start = torch.tensor([10.01, 20.02, 30.03])
    assert not torch.equal(start, start.bfloat16().float())
    reply, weights = interval([FakeClient("a", step=0.0), FakeClient("b", step=0.0)], config, start)
    assert reply.client_rounds == 6
    # A mean of float32 values is off by their last bit; bf16 would be by 0.03.
    assert weights.tolist() == pytest.approx(start.tolist(), abs=1e-5)


def test_a_flat_federation_has_no_link_above() -> None:
    wire = dict.fromkeys(("cloud_down", "client_down", "client_up", "cloud_up"), "int8")
    codecs = plan(wire=wire, topology="flat").codecs
    assert (codecs.cloud_down, codecs.cloud_up) == ("fp32", "fp32")
    assert (codecs.client_down, codecs.client_up) == ("int8", "int8")
