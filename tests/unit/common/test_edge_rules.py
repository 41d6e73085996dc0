"""The rules of edge choice beside the paper's, with values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from fedphd.common.homogeneity import (
    Vector,
    balanced_probabilities,
    best_homogeneity_probabilities,
    kl_divergence,
    min_kl_probabilities,
    selection_probabilities,
)

EVEN = [0.5, 0.5]
Rule = Callable[..., Vector]
RULES: list[Rule] = [
    partial(best_homogeneity_probabilities, a=40),
    partial(balanced_probabilities, a=40),
    min_kl_probabilities,
]


def test_best_homogeneity_by_hand() -> None:
    # Client (0, 10). Edge 0, (1, 0) of 10: merged (0.5, 0.5), score 2. Edge 1, none: merged
    # (0, 1), score 2 - sqrt(0.5) = 1.293. With a = 10: 20 - 10 = 10 against 12.93.
    edges: list[Any] = [([1, 0], 10), (EVEN, 0)]
    assert best_homogeneity_probabilities(edges, [0, 1], 10, EVEN, a=10).tolist() == [0, 1]
    # With a = 20: 40 - 10 = 30 against 25.86.
    assert best_homogeneity_probabilities(edges, [0, 1], 10, EVEN, a=20).tolist() == [1, 0]


def test_balanced_by_hand() -> None:
    # Client (0, 10), deviation (-0.5, 0.5). Edge 0 holds 10 of the other class: deviation
    # (0.5, -0.5), product -0.5, cost 10 * (-0.5 a + 10). Edge 1 is empty and costs 0.
    edges: list[Any] = [([1, 0], 10), (EVEN, 0)]
    # a = 10: cost 50, the label gain is not worth the load; a = 40: cost -100.
    assert balanced_probabilities(edges, [0, 1], 10, EVEN, a=10).tolist() == [0, 1]
    assert balanced_probabilities(edges, [0, 1], 10, EVEN, a=40).tolist() == [1, 0]
    # a = 20: both cost 0.
    assert balanced_probabilities(edges, [0, 1], 10, EVEN, a=20).tolist() == [0.5, 0.5]


def test_balanced_counts_imbalance_in_samples() -> None:
    # Client (0, 10). Edge 0: 10 * (0.25, -0.25); edge 1: 100 * (0.05, -0.05), a slighter
    # imbalance of more samples. Products -0.25 and -0.05; a = 400:
    # 10 * (-100 + 10) = -900 against 100 * (-20 + 10) = -1000.
    edges: list[Any] = [([0.75, 0.25], 10), ([0.55, 0.45], 100)]
    assert balanced_probabilities(edges, [0, 1], 10, EVEN, a=400).tolist() == [0, 1]
    # a = 320: 10 * (-80 + 10) = -700 against 100 * (-16 + 10) = -600.
    assert balanced_probabilities(edges, [0, 1], 10, EVEN, a=320).tolist() == [1, 0]


def test_balanced_is_a_greedy_step_down_the_potential() -> None:
    rng = np.random.default_rng(0)
    target = np.full(4, 0.25)

    def potential(counts: list[np.ndarray[Any, Any]], a: float, n_n: float) -> float:
        return sum(a * ((c - c.sum() * target) ** 2).sum() + n_n * c.sum() ** 2 for c in counts)

    chosen = set()
    for _ in range(30):
        held = [rng.integers(1, 40, 4).astype(float) for _ in range(3)]
        client = rng.integers(0, 30, 4).astype(float)
        n_n, a = client.sum(), 200.0
        after = [
            potential([c + client * (i == e) for i, c in enumerate(held)], a, n_n) for e in range(3)
        ]
        edges = [(c / c.sum(), c.sum()) for c in held]
        got = balanced_probabilities(edges, client / n_n, n_n, target, a=a)
        assert got.argmax() == np.argmin(after)
        chosen.add(int(got.argmax()))
    assert chosen == {0, 1, 2}


def test_kl_divergence_by_hand() -> None:
    assert kl_divergence(EVEN, EVEN) == 0.0
    assert kl_divergence([1, 0], EVEN) == pytest.approx(math.log(2), rel=1e-15)
    # 0.75 ln 1.5 + 0.25 ln 0.5
    assert kl_divergence([0.75, 0.25], EVEN) == pytest.approx(0.13081203594113694, rel=1e-12)
    assert kl_divergence([0.5, 0.5], [1, 0]) == math.inf


def test_min_kl_by_hand() -> None:
    # Client (0, 10). Merged with (10, 0): (0.5, 0.5), 0 nats; with (10, 10): (1/3, 2/3),
    # ln 2 + (1/3) ln(1/3) + (2/3) ln(2/3) = 0.057 nats; alone: ln 2 = 0.69 nats.
    edges: list[Any] = [(EVEN, 20), ([1, 0], 10), (EVEN, 0)]
    assert min_kl_probabilities(edges, [0, 1], 10, EVEN).tolist() == [0, 1, 0]
    assert min_kl_probabilities(edges[::2], [0, 1], 10, EVEN).tolist() == [1, 0]


def test_min_kl_where_every_edge_is_infinitely_far() -> None:
    edges: list[Any] = [([0, 1], 5), ([1, 0], 5)]
    assert min_kl_probabilities(edges, [0, 1], 10, [1, 0]).tolist() == [0.5, 0.5]


def test_published_rule_saturates_where_the_others_still_tell_edges_apart() -> None:
    # Both counts exceed 2 a = 80, so Eq. 9 has 0 for both; edge 1 lacks what the client has.
    edges: list[Any] = [([0.4, 0.6], 100), ([0.6, 0.4], 100)]
    asked = (edges, [0, 1], 10, EVEN)
    assert selection_probabilities(*asked, a=40).tolist() == [0.5, 0.5]
    for rule in RULES:
        assert rule(*asked).tolist() == [0, 1], rule
    # And a fuller edge stays less attractive however full both are.
    crowded: list[Any] = [(EVEN, 1030), (EVEN, 1000)]
    assert selection_probabilities(crowded, EVEN, 10, EVEN, a=40).tolist() == [0.5, 0.5]
    assert best_homogeneity_probabilities(crowded, EVEN, 10, EVEN, a=40).tolist() == [0, 1]
    assert balanced_probabilities(crowded, EVEN, 10, EVEN, a=40).tolist() == [0, 1]


@pytest.mark.parametrize("rule", RULES)
def test_equals_share_the_choice(rule: Rule) -> None:
    # What 0.1 + 0.2 and 0.3 make of the same shares is not a reason to prefer an edge.
    edges: list[Any] = [([0.1 + 0.2, 0.7], 30), ([0.3, 0.7], 30), ([0.0, 1.0], 60)]
    assert rule(edges, [0, 1], 10, EVEN).tolist() == [0.5, 0.5, 0.0]
    empty: list[Any] = [(EVEN, 0)] * 4
    assert rule(empty, [0, 1], 10, EVEN).tolist() == [0.25] * 4


@pytest.mark.parametrize("rule", RULES)
def test_huge_counts_stay_finite(rule: Rule) -> None:
    edges: list[Any] = [([0.5, 0.5], 1e308), ([1, 0], 10)]
    assert rule(edges, [0, 1], 10, EVEN).tolist() in ([0, 1], [0.5, 0.5])


@pytest.mark.parametrize("rule", RULES)
def test_wrong_arguments_are_refused(rule: Rule) -> None:
    with pytest.raises(ValueError, match="edges is empty"):
        rule([], [1], 1, [1])
    with pytest.raises(ValueError, match=r"n_e = \[-1.0\] has a negative value"):
        rule([(EVEN, -1)], EVEN, 1, EVEN)
    with pytest.raises(ValueError, match=r"q_n has 1 values|q_e has 2 values, but q_n has 1"):
        rule([(EVEN, 1)], [1], 1, EVEN)
    with pytest.raises(ValueError, match="q_e has 1 values"):
        rule([([1], 1)], EVEN, 1, EVEN)
