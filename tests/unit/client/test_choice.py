"""A client's draw of an edge: the equation's frequencies, repeatability, refusal of bad offers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from fedphd.client.choice import choose_edge
from fedphd.common.errors import ConfigError, ReplyError
from fedphd.common.homogeneity import Offer

LEFT = Offer("edge-0", (1.0, 0.0), 10)
RIGHT = Offer("edge-1", (0.0, 1.0), 10)


def choose(*offers: Offer, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "label_counts": (0, 10), "target": (0.5, 0.5), "factor": 100.0, "offset": 0.0,
        "epsilon": 1e-8, "run_seed": 0, "client_id": "client-0", "interval": 1, "edge_round": 1,
    }  # fmt: skip
    return choose_edge(offers, **(settings | changes))


def test_only_offer_is_taken() -> None:
    assert choose(LEFT) == "edge-0"


def test_answer_does_not_depend_on_the_order_of_offers() -> None:
    for edge_round in range(1, 30):
        assert choose(LEFT, RIGHT, edge_round=edge_round) == choose(
            RIGHT, LEFT, edge_round=edge_round
        )


def test_frequencies_follow_the_equation() -> None:
    draws = [choose(LEFT, RIGHT, client_id=f"client-{i}") for i in range(2000)]
    # Merged: (0.5, 0.5) with score 2, and (0, 1) with score 2 - sqrt(0.5); a = 100, n_e = 10.
    left, right = 200 - 10, 100 * (2 - math.sqrt(0.5)) - 10
    assert draws.count("edge-0") / 2000 == pytest.approx(left / (left + right), abs=0.035)


def test_factornd_offset_are_in_samples() -> None:
    # 10 * 2 - 10 = 10 against 10 * 1.29 - 10 = 2.9; an offset of -5 leaves only the first.
    draws = {choose(LEFT, RIGHT, factor=10.0, offset=-5.0, edge_round=r) for r in range(50)}
    assert draws == {"edge-0"}


@pytest.mark.parametrize("part", ["run_seed", "interval", "edge_round"])
def test_each_part_of_the_seed_matters(part: str) -> None:
    assert {choose(LEFT, RIGHT, **{part: value}) for value in range(20)} == {"edge-0", "edge-1"}


def test_client_without_images_can_choose() -> None:
    assert choose(LEFT, RIGHT, label_counts=(0, 0)) in {"edge-0", "edge-1"}


@pytest.mark.parametrize(
    ("offer", "text"),
    [
        (replace(LEFT, label_distribution=(1.0,)), r"edge-0: .* has shape \(1,\); expected \(2,\)"),
        (replace(LEFT, label_distribution=(math.nan, 1.0)), r"edge-0: .*\[nan, 1.0\]"),
        (replace(LEFT, label_distribution=(-0.5, 1.5)), r"edge-0: .*\[-0.5, 1.5\]"),
        (replace(LEFT, label_distribution=(0.5, 0.2)), r"edge-0: .* sums to 0.7; expected 1"),
        (replace(LEFT, num_samples=-1), r"edge-0: num_samples = -1"),
        (replace(LEFT, num_samples=math.inf), r"edge-0: num_samples = inf"),
        (RIGHT, r"edge-1 offers itself twice"),
    ],
)
def test_malformed_offers_are_refused(offer: Offer, text: str) -> None:
    with pytest.raises(ReplyError, match=text):
        choose(offer, RIGHT)


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ReplyError, match="no edge offers itself"):
        choose()
    with pytest.raises(ReplyError, match=r"target sums to 0\.9"):
        choose(LEFT, target=(0.5, 0.4))
    with pytest.raises(ConfigError, match="client-0 counts labels of 3 classes"):
        choose(LEFT, label_counts=(1, 2, 3))
