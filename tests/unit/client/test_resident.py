"""One client of several edges: their offers are brought together, with bounded waits."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from support.waiting import HANG_S

from fedphd.client.resident import OfferBoard, Resident
from fedphd.common.config.links import NodeConfig
from fedphd.common.config.roles import ClientConfig
from fedphd.common.errors import ConfigError, ConnectionLostError
from fedphd.common.history.status import CONNECTED
from fedphd.common.wire.node import Node
from fedphd.common.wire.offers import CHOOSE, Choose, ChooseReply, Offer
from fedphd.common.wire.records import read_payload, to_records

TARGET = (0.1,) * 10


def offer(edge_id: str, num_samples: float = 0.0) -> Offer:
    return Offer(edge_id=edge_id, label_distribution=TARGET, num_samples=num_samples)


def question(edge_id: str, num_samples: float = 0.0, **changes: Any) -> Choose:
    """What an edge asks: it knows its own offer only."""
    values: dict[str, Any] = {
        "offers": (offer(edge_id, num_samples),), "interval": 1, "edge_round": 1, "target": TARGET,
        "policy": "homogeneity", "factor": 100.0, "offset": 0.0, "epsilon": 1e-8, "seed": 0,
        "offer_wait_s": 30.0, "synchronised": False,
        "num_edges": 2,
    }  # fmt: skip
    return Choose(asking=edge_id, **(values | changes))


def board(num_edges: int = 2, connected: int | None = None) -> OfferBoard:
    made = OfferBoard()
    for number in range(num_edges if connected is None else connected):
        made.set_connected(f"127.0.0.1:{number + 1}", True)
    return made


def figures(merged: Choose) -> dict[str, float]:
    return {offer.edge_id: offer.num_samples for offer in merged.offers}


def waits(future: Future[Choose]) -> bool:
    """Whether it is still waiting after a while."""
    time.sleep(0.1)
    return not future.done()


@pytest.fixture
def pool() -> Any:
    with ThreadPoolExecutor(max_workers=4) as made:
        yield made


def test_one_edge_never_waits() -> None:
    assert figures(board(1).merge(question("edge-0", 3))) == {"edge-0": 3}


@pytest.mark.parametrize("synchronised", [False, True])
def test_first_question_of_a_round_waits_for_the_other_edge(
    pool: ThreadPoolExecutor, synchronised: bool
) -> None:
    made = board()
    for number in (1, 2):
        asked = {"edge_round": number, "synchronised": synchronised}
        first = pool.submit(made.merge, question("edge-0", 3 * number, **asked))
        assert waits(first)
        both = {"edge-0": 3 * number, "edge-1": 5 * number}
        assert figures(made.merge(question("edge-1", 5 * number, **asked))) == both
        assert figures(first.result(HANG_S)) == both


@pytest.mark.parametrize(
    ("synchronised", "expected"),
    [(False, {"edge-0": 40, "edge-1": 5}), (True, {"edge-0": 40})],
)
def test_edge_that_is_behind_counts_as_it_last_was(
    pool: ThreadPoolExecutor, synchronised: bool, expected: dict[str, float]
) -> None:
    made = board()
    first = pool.submit(made.merge, question("edge-0", 3, synchronised=synchronised))
    made.merge(question("edge-1", 5, synchronised=synchronised))
    first.result(HANG_S)
    asked = {"edge_round": 2, "synchronised": synchronised, "offer_wait_s": 0.0}
    assert figures(made.merge(question("edge-0", 40, **asked))) == expected


def test_offers_of_an_earlier_interval_do_not_count(pool: ThreadPoolExecutor) -> None:
    made = board()
    first = pool.submit(made.merge, question("edge-0", 3))
    made.merge(question("edge-1", 5))
    first.result(HANG_S)
    second = pool.submit(made.merge, question("edge-0", 0, interval=2))
    assert waits(second)
    made.merge(question("edge-1", 1, interval=2))
    assert figures(second.result(HANG_S)) == {"edge-0": 0, "edge-1": 1}


def test_whoever_waits_for_other_offers_says_so_once(pool: ThreadPoolExecutor) -> None:
    made, told = board(3), list[str]()

    def merge(edge_id: str) -> Choose:
        return made.merge(question(edge_id, num_edges=3), on_wait=lambda: told.append(edge_id))

    first = pool.submit(merge, "edge-0")
    assert waits(first)
    second = pool.submit(merge, "edge-1")
    assert waits(second)
    merge("edge-2")
    first.result(HANG_S)
    second.result(HANG_S)
    assert told == ["edge-0", "edge-1"]


def test_wait_is_bounded() -> None:
    # Nobody else ever asks.
    assert figures(board().merge(question("edge-0", 3, offer_wait_s=0.2))) == {"edge-0": 3}


def test_edge_that_is_not_connected_is_not_waited_for() -> None:
    asked = question("edge-0", 3, offer_wait_s=1e6)
    assert figures(board(connected=1).merge(asked)) == {"edge-0": 3}


def test_an_edge_without_an_order_is_not_waited_for() -> None:
    """It has joined in mid-interval."""
    asked = question("edge-0", 3, offer_wait_s=1e6, num_edges=1)
    assert figures(board(connected=2).merge(asked)) == {"edge-0": 3}


def test_offers_of_another_run_do_not_count(pool: ThreadPoolExecutor) -> None:
    made = board()
    first = pool.submit(made.merge, question("edge-0", 3, run_name="a"))
    made.merge(question("edge-1", 5, run_name="a"))
    first.result(HANG_S)
    second = pool.submit(made.merge, question("edge-0", 0, run_name="b"))
    assert waits(second)
    made.merge(question("edge-1", 1, run_name="b"))
    assert figures(second.result(HANG_S)) == {"edge-0": 0, "edge-1": 1}


def test_losing_an_edge_ends_the_wait_for_it(pool: ThreadPoolExecutor) -> None:
    made = board()
    first = pool.submit(made.merge, question("edge-0", 3))
    assert waits(first)
    made.set_connected("127.0.0.1:2", False)
    assert figures(first.result(HANG_S)) == {"edge-0": 3}


def test_what_a_lost_edge_offered_draws_nobody_to_it(pool: ThreadPoolExecutor) -> None:
    made = board()
    first = pool.submit(made.merge, question("edge-0", 3), address="127.0.0.1:1")
    made.merge(question("edge-1", 5), address="127.0.0.1:2")
    first.result(HANG_S)
    made.set_connected("127.0.0.1:2", False)
    later = question("edge-0", 40, edge_round=2)
    assert figures(made.merge(later, address="127.0.0.1:1")) == {"edge-0": 40}
    # It counts again once it asks again, in whatever round.
    made.set_connected("127.0.0.1:2", True)
    again = question("edge-1", 0, edge_round=3)
    assert figures(made.merge(again, address="127.0.0.1:2")) == {"edge-0": 40, "edge-1": 0}


def test_an_edge_that_is_lost_while_it_waits_still_gets_a_whole_question(
    pool: ThreadPoolExecutor,
) -> None:
    made = board()
    first = pool.submit(made.merge, question("edge-0", 3), address="127.0.0.1:1")
    assert waits(first)
    made.set_connected("127.0.0.1:1", False)
    made.set_connected("127.0.0.1:2", False)
    assert figures(first.result(HANG_S)) == {"edge-0": 3}


def test_rest_of_the_question_stays() -> None:
    asked = question("edge-0", 3, offer_wait_s=0.0, interval=4)
    assert board(1).merge(asked) == asked


def client(**changes: Any) -> ClientConfig:
    values: dict[str, Any] = {
        "edges": ("127.0.0.1:1", "127.0.0.1:2"),
        "data": {"partition": {"num_partitions": 60}},
        "device": "cpu",
    }
    return ClientConfig.model_validate(values | changes)


def test_both_edges_get_the_same_answer_from_the_offers_of_both(pool: ThreadPoolExecutor) -> None:
    resident = Resident(client(), stop=threading.Event())
    for address in ("127.0.0.1:1", "127.0.0.1:2"):
        resident.board.set_connected(address, True)

    def answer(asked: Choose) -> ChooseReply:
        message = Message(to_records(asked), 5, CHOOSE)
        return read_payload(resident.answer(message), ChooseReply)

    # Alone each edge would be chosen; together, the one that is full has no chance.
    full = pool.submit(answer, question("edge-0", 1e6))
    empty = pool.submit(answer, question("edge-1", 0.0))
    assert full.result(HANG_S).edge_id == empty.result(HANG_S).edge_id == "edge-1"
    assert full.result().label_counts == ()
    assert sum(empty.result().label_counts) > 0


def test_a_question_makes_the_nodes_of_the_other_edges_hurry() -> None:
    resident, stop = Resident(client(), stop=threading.Event()), threading.Event()
    addresses = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
    hurried: list[str] = []

    class Watched(Node):
        def hurry(self) -> None:
            hurried.append(self.address)

    for address in addresses:
        resident.board.set_connected(address, True)
        resident.nodes[address] = Watched(address, NodeConfig(), resident.answer, stop=stop)
    asked = Message(to_records(question("edge-0", offer_wait_s=0.1)), 5, CHOOSE)
    resident.answer(asked, address=addresses[1])
    assert hurried == [addresses[0], addresses[2]]


def test_no_edge_can_be_reached() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    said: list[str] = []
    config = client(edges=(address,), node={"lost_after_s": 0.3})
    with pytest.raises(ConnectionLostError, match=rf"no SuperLink at {address} for 0.3 s"):
        Resident(config, stop=threading.Event(), say=said.append).run()
    assert len(said) == 2


def test_stop_ends_a_client_early() -> None:
    stop = threading.Event()
    stop.set()
    assert Resident(client(), stop=stop).run().message == "stopped"


class Scripted(Node):
    """A node whose server is away, ``times`` times for too long, and then there until the end."""

    times = 0

    def run(self) -> None:
        if self.times:
            self.times -= 1
            time.sleep(0.05)
            raise ConnectionLostError(f"no SuperLink at {self.address}")
        self.on_change(CONNECTED)
        self.stop.wait(HANG_S)


def scripted(resident: Resident, *times: int) -> None:
    """Let each of the client's nodes lose its server so often."""
    for (address, node), number in zip(list(resident.nodes.items()), times, strict=True):
        made = Scripted(
            address, node.config, node.handler, stop=node.stop, on_change=node.on_change
        )
        made.times = number
        resident.nodes[address] = made


def test_an_edge_that_was_away_for_too_long_is_served_again() -> None:
    stop, said = threading.Event(), list[str]()
    resident = Resident(client(), stop=stop, say=said.append)
    scripted(resident, 3, 0)
    thread = threading.Thread(target=resident.run)
    thread.start()
    while len(resident.board.connected) < 2:
        assert thread.is_alive()
        time.sleep(0.01)
    stop.set()
    thread.join(HANG_S)
    lost = "no SuperLink at 127.0.0.1:1"
    data, *said = said
    assert data == "31 images to train on, of classes 0, 1"
    assert sorted(said) == [f"127.0.0.1:{n} {CONNECTED}" for n in (1, 2)] + [lost]


def test_a_client_ends_once_all_its_edges_are_lost() -> None:
    resident = Resident(client(), stop=threading.Event())
    scripted(resident, 1000, 1000)
    with pytest.raises(ConnectionLostError, match="no SuperLink at"):
        resident.run()


def test_certificates_that_cannot_be_read_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"node\.root_certificates = .*missing\.pem"):
        Resident(
            client(node={"root_certificates": Path("/nowhere/missing.pem")}), stop=threading.Event()
        )
