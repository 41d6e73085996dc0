"""A client's draw of an edge: the equation's frequencies, repeatability, every policy."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations
from typing import Any, get_args

import pytest

from fedphd.client.choice import choose_edge
from fedphd.common.config.run import SelectionPolicy
from fedphd.common.errors import ConfigError
from fedphd.common.wire.offers import Choose, Offer


def offer(edge_id: str, *shares: float, num_samples: float) -> Offer:
    return Offer(edge_id=edge_id, label_distribution=shares, num_samples=num_samples)


LEFT = offer("edge-0", 1.0, 0.0, num_samples=10)
RIGHT = offer("edge-1", 0.0, 1.0, num_samples=10)


def choose(
    *offers: Offer,
    client_id: str = "client-0",
    label_counts: tuple[int, ...] = (0, 10),
    **changes: Any,
) -> str:
    settings: dict[str, Any] = {
        "policy": "homogeneity", "target": (0.5, 0.5), "factor": 100.0, "offset": 0.0,
        "epsilon": 1e-8, "seed": 0, "interval": 1, "edge_round": 1, "offer_wait_s": 0.0,
        "synchronised": False, "num_edges": 2,
    }  # fmt: skip
    asked = Choose(asking="edge-0", offers=offers, **(settings | changes))
    return choose_edge(asked, client_id=client_id, label_counts=label_counts)


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


def test_factor_and_offset_are_in_samples() -> None:
    # 10 * 2 - 10 = 10 against 10 * 1.29 - 10 = 2.9; an offset of -5 leaves only the first.
    draws = {choose(LEFT, RIGHT, factor=10.0, offset=-5.0, edge_round=r + 1) for r in range(50)}
    assert draws == {"edge-0"}


@pytest.mark.parametrize("part", ["seed", "interval", "edge_round"])
def test_each_part_of_the_seed_matters(part: str) -> None:
    assert {choose(LEFT, RIGHT, **{part: value}) for value in range(1, 21)} == {"edge-0", "edge-1"}


def test_client_without_images_can_choose() -> None:
    assert choose(LEFT, RIGHT, label_counts=(0, 0)) in {"edge-0", "edge-1"}


def test_labels_of_other_classes_than_the_runs_are_refused() -> None:
    with pytest.raises(ConfigError, match="client-0 counts labels of 3 classes"):
        choose(LEFT, label_counts=(1, 2, 3))


POLICIES = get_args(SelectionPolicy)
# Of 1,000 images each, so that Eq. 9 with a = 100 is cut off at 0 for all of them.
CROWD = (
    offer("edge-0", 0.6, 0.4, num_samples=1000),
    offer("edge-1", 0.4, 0.6, num_samples=1000),
    offer("edge-2", 0.5, 0.5, num_samples=1000),
)


def draws(policy: str, num: int = 300, offers: tuple[Offer, ...] = CROWD) -> list[str]:
    return [choose(*offers, policy=policy, client_id=f"client-{n}") for n in range(num)]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_one_answer_whatever_the_order_of_offers(policy: str) -> None:
    for number in range(20):
        answers = {
            choose(*order, policy=policy, client_id=f"client-{number}")
            for order in permutations(CROWD)
        }
        assert len(answers) == 1


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        # Client (0, 10): edge-0 lacks class 1. Merged distances from (0.5, 0.5), times 1,010:
        # 95 sqrt(2), 105 sqrt(2), 5 sqrt(2): the even edge is best for homogeneity and KL.
        ("best_homogeneity", "edge-2"),
        ("min_kl", "edge-2"),
        # Products -0.1, 0.1, 0: the edge that the client makes up for.
        ("balanced", "edge-0"),
    ],
)
def test_best_edge_is_always_taken(policy: str, chosen: str) -> None:
    assert set(draws(policy, 20)) == {chosen}


def test_published_rule_is_uniform_where_it_saturates() -> None:
    # The same draws as by chance: no edge is preferred any more.
    assert draws("homogeneity") == draws("random")


@pytest.mark.parametrize("policy", ["random", "static"])
def test_edges_get_even_shares(policy: str) -> None:
    # 900 draws of 3: 300 each, with a standard deviation of 14.
    assert all(250 < count < 350 for count in Counter(draws(policy, 900)).values())
    assert len(set(draws(policy, 900))) == 3


def test_random_edge_differs_from_round_to_round() -> None:
    assert len({choose(*CROWD, policy="random", edge_round=n) for n in range(1, 30)}) == 3


def test_static_edge_stays() -> None:
    for number in range(20):
        name = f"client-{number}"
        home = choose(*CROWD, policy="static", client_id=name)
        for later in range(2, 6):
            moved = [offer.model_copy(update={"num_samples": 7.0 * later}) for offer in CROWD]
            again = choose(
                *moved, policy="static", client_id=name, interval=later, edge_round=later
            )
            assert again == home
        # Where another edge is missing the client stays, too.
        for missing in CROWD:
            there = [offer for offer in CROWD if offer != missing]
            if missing.edge_id != home:
                assert choose(*there, policy="static", client_id=name) == home


def test_static_edges_depend_on_the_runs_seed() -> None:
    assert len({choose(*CROWD, policy="static", seed=n) for n in range(30)}) == 3


@pytest.mark.parametrize("policy", ["best_homogeneity", "balanced", "min_kl"])
def test_ties_are_broken_by_the_seed(policy: str) -> None:
    empty = tuple(Offer.empty(o.edge_id, (0.5, 0.5)) for o in CROWD)
    first = draws(policy, 90, empty)
    assert first == draws(policy, 90, empty)
    assert all(count > 15 for count in Counter(first).values())
    assert len(set(first)) == 3
