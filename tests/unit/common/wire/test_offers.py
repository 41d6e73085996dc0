"""What an edge offers by whom it has, and with which edges' offers a question is answered."""

from __future__ import annotations

import math
from typing import Any

import pytest
from flwr.app import Message

from fedphd.common.errors import ReplyError
from fedphd.common.wire.offers import CHOOSE, Choose, Offer, OfferBook
from fedphd.common.wire.records import read_payload, to_records


def offer(edge_id: str, num_samples: float = 0.0) -> Offer:
    return Offer(edge_id=edge_id, label_distribution=(0.5, 0.5), num_samples=num_samples)


def question(edge_id: str, num_samples: float = 0.0, **changes: Any) -> Choose:
    """What an edge asks: it knows its own offer only."""
    values: dict[str, Any] = {
        "offers": (offer(edge_id, num_samples),), "interval": 1, "edge_round": 1,
        "target": (0.5, 0.5), "policy": "homogeneity", "factor": 100.0, "offset": 0.0,
        "epsilon": 1e-8, "seed": 0, "offer_wait_s": 30.0, "synchronised": False,
        "num_edges": 2,
    }  # fmt: skip
    return Choose(asking=edge_id, **(values | changes))


def figures(asked: Choose) -> list[tuple[str, float]]:
    return [(offer.edge_id, offer.num_samples) for offer in asked.offers]


def merged(book: OfferBook, asked: Choose) -> list[tuple[str, float]]:
    """What the question offers together with all that were noted in its round."""
    return figures(book.merged(asked, book.of_round(asked).values()))


def test_an_edge_with_its_clients_by_hand() -> None:
    empty = Offer.empty("e", (0.5, 0.5))
    assert (empty.edge_id, empty.label_distribution, empty.num_samples) == ("e", (0.5, 0.5), 0.0)
    one = empty.with_client((3, 1))
    # Nothing held yet, so the client's own shares.
    assert one.label_distribution == (0.75, 0.25)
    two = one.with_client((0, 4))
    # (4 * 0.75 + 4 * 0) / 8
    assert (two.edge_id, two.label_distribution, two.num_samples) == ("e", (0.375, 0.625), 8.0)
    assert (one.label_distribution, one.num_samples) == ((0.75, 0.25), 4.0)
    assert (empty.label_distribution, empty.num_samples) == ((0.5, 0.5), 0.0)


@pytest.mark.parametrize("synchronised", [False, True])
def test_offers_of_a_round_come_together_in_the_order_of_names(synchronised: bool) -> None:
    book = OfferBook(past_intervals=0)
    late = question("edge-1", 5, synchronised=synchronised)
    book.note(late)
    book.note(question("edge-0", 3))
    assert merged(book, late) == [("edge-0", 3), ("edge-1", 5)]


def test_the_rest_of_the_question_stays() -> None:
    asked = question("edge-0", 3, interval=4)
    assert OfferBook(past_intervals=0).merged(asked, asked.offers) == asked


@pytest.mark.parametrize(
    ("synchronised", "expected"),
    [(False, [("edge-0", 40), ("edge-1", 9), ("edge-2", 2)]), (True, [("edge-0", 40)])],
)
def test_of_edges_that_are_behind_the_latest_offer_of_the_interval_counts(
    synchronised: bool, expected: list[tuple[str, float]]
) -> None:
    book = OfferBook(past_intervals=0)
    book.note(question("edge-0", 1))
    book.note(question("edge-1", 9, edge_round=2))
    # What an edge offered in an earlier round does not replace it, whenever it came.
    book.note(question("edge-1", 5))
    book.note(question("edge-2", 2))
    now = question("edge-0", 40, edge_round=3, synchronised=synchronised)
    book.note(now)
    assert merged(book, now) == expected


def test_a_later_offer_of_the_same_round_replaces_the_first() -> None:
    book = OfferBook(past_intervals=0)
    book.note(question("edge-0", 1))
    book.note(question("edge-0", 2))
    assert merged(book, question("edge-1")) == [("edge-0", 2)]


def test_an_interval_begins_with_new_offers() -> None:
    book = OfferBook(past_intervals=1)
    book.note(question("edge-1", 5))
    now = question("edge-0", 0, interval=2)
    book.note(now)
    assert merged(book, now) == [("edge-0", 0)]


def test_an_edge_speaks_for_no_other() -> None:
    book = OfferBook(past_intervals=0)
    book.note(question("edge-0", 1, offers=(offer("edge-1", 1e6), offer("edge-0", 1))))
    assert merged(book, question("edge-0")) == [("edge-0", 1)]


@pytest.mark.parametrize(("past_intervals", "remembered"), [(0, []), (1, [("edge-0", 1)])])
def test_offers_of_past_intervals_are_forgotten(
    past_intervals: int, remembered: list[tuple[str, float]]
) -> None:
    book = OfferBook(past_intervals=past_intervals)
    book.note(question("edge-0", 1))
    book.note(question("edge-1", 2, interval=2))
    assert merged(book, question("edge-1")) == remembered
    book.note(question("edge-1", 3, interval=3))
    assert merged(book, question("edge-1")) == []


def unchecked(**changes: Any) -> Offer:
    """An offer that no honest edge could make."""
    values = {"edge_id": "edge-0", "label_distribution": (1.0, 0.0), "num_samples": 10.0}
    return Offer.model_construct(**(values | changes))


@pytest.mark.parametrize(
    ("offers", "text"),
    [
        ([unchecked(label_distribution=(1.0,))],
         "edge edge-0 offers 1 label shares; expected 2, as many as the target has"),
        ([unchecked(label_distribution=(math.nan, 1.0))], "offers.0.label_distribution.0: "),
        ([unchecked(label_distribution=(-0.5, 1.5))],
         r"offers.0.label_distribution: .*\[-0.5, 1.5\] are not shares; expected .* >= 0"),
        ([unchecked(label_distribution=())], r"\[\] are not shares; expected at least one"),
        ([unchecked(label_distribution=(0.5, 0.2))], "the shares sum to 0.7; expected 1"),
        ([unchecked(num_samples=-1.0)], "offers.0.num_samples: "),
        ([unchecked(num_samples=math.inf)], "offers.0.num_samples: "),
        ([unchecked(), unchecked()], "edge edge-0 offers itself twice; one offer per edge"),
        ([], "malformed Choose: offers: .*at least 1"),
    ],
)  # fmt: skip
def test_malformed_offers_are_refused(offers: list[Offer], text: str) -> None:
    sent = question("edge-0").model_copy(update={"offers": tuple(offers)})
    with pytest.raises(ReplyError, match=text):
        read_payload(Message(to_records(sent), 5, CHOOSE), Choose)


def test_a_target_that_is_no_distribution_is_refused() -> None:
    sent = question("edge-0").model_copy(update={"target": (0.5, 0.4)})
    with pytest.raises(ReplyError, match=r"target: .*the shares sum to 0.9; expected 1"):
        read_payload(Message(to_records(sent), 5, CHOOSE), Choose)
