"""The paper's equations: hand-worked values, the reference figures, corner cases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedphd.common.homogeneity import (
    aggregation_weights,
    homogeneity_score,
    merge,
    selection_probabilities,
)

REFERENCE = Path(__file__).parents[4] / "shared" / "reference" / "homogeneity.json"
UNIFORM = [0.25, 0.25, 0.25, 0.25]

# Copied from the reference figures, so that they are checked where that file is absent.
COPIED: list[dict[str, Any]] = [
    {
        "target": [0.25, 0.25, 0.25, 0.25],
        "client_label_counts": [1107, 2616, 1380, 0],
        "edges": [
            {
                "label_distribution": [0.07488986784140969, 0.9251101321585903, 0.0, 0.0],
                "num_samples": 2497,
            },
            {
                "label_distribution": [0.4612708295184032, 0.0, 0.0, 0.5387291704815967],
                "num_samples": 5461,
            },
            {
                "label_distribution": [0.0, 0.49105410648846737, 0.5089458935115326, 0.0],
                "num_samples": 4639,
            },
        ],
        "selection": {
            "a": 10000.0,
            "b": 0.0,
            "epsilon": 1e-08,
            "merged_homogeneity": [1.5182644775674028, 1.8458571730416935, 1.5965891371535677],
            "probabilities": [0.3427616265701963, 0.3511897823533147, 0.30604859107648885],
        },
        "aggregation": {
            "a": 0.0,
            "b": 0.0,
            "edge_num_samples": [3915, 10560, 41051],
            "homogeneity": [1.218055469404774, 1.4970090484984993, 1.4998399675889331],
            "weights": [0.0705075099953175, 0.19018117638583726, 0.7393113136188453],
        },
    },
    {
        "target": [0.1] * 10,
        "client_label_counts": [0, 0, 0, 579, 0, 0, 0, 0, 0, 0],
        "edges": [
            {"label_distribution": [0.1] * 10, "num_samples": 0},
            {
                "label_distribution": [
                    0.5831842576028623, 0.0, 0.259391771019678, 0.15742397137745975,
                    0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                ],
                "num_samples": 559,
            },
        ],
        "selection": {
            "a": 10000.0,
            "b": 0.0,
            "epsilon": 1e-08,
            "merged_homogeneity": [1.051316701949486, 1.4153372357996534],
            "probabilities": [0.4360945700377874, 0.5639054299622126],
        },
        "aggregation": {
            "a": 5000.0,
            "b": -12000.0,
            "edge_num_samples": [10942, 5287],
            "homogeneity": [2.0, 1.4236578481901763],
            "weights": [0.9566409864396522, 0.043359013560347784],
        },
    },
]  # fmt: skip


def agrees(case: dict[str, Any]) -> None:
    counts = np.array(case["client_label_counts"])
    q_n, n_n = counts / counts.sum(), int(counts.sum())
    edges = [(edge["label_distribution"], edge["num_samples"]) for edge in case["edges"]]
    choice, cloud = case["selection"], case["aggregation"]
    merged = [homogeneity_score(merge(q, n, q_n, n_n), case["target"]) for q, n in edges]
    chances = selection_probabilities(
        edges, q_n, n_n, case["target"], a=choice["a"], b=choice["b"], epsilon=choice["epsilon"]
    )
    scores = [homogeneity_score(q, case["target"]) for q, _ in edges]
    weights = aggregation_weights(cloud["edge_num_samples"], scores, a=cloud["a"], b=cloud["b"])
    assert merged == pytest.approx(choice["merged_homogeneity"], rel=1e-9, abs=0)
    assert chances == pytest.approx(choice["probabilities"], rel=1e-9, abs=0)
    assert scores == pytest.approx(cloud["homogeneity"], rel=1e-9, abs=0)
    assert weights == pytest.approx(cloud["weights"], rel=1e-9, abs=0)


@pytest.mark.parametrize("case", COPIED)
def test_copied_reference_figures(case: dict[str, Any]) -> None:
    agrees(case)


@pytest.mark.skipif(not REFERENCE.is_file(), reason="../shared/reference is not beside the code")
def test_all_reference_figures() -> None:
    cases = json.loads(REFERENCE.read_text("utf-8"))
    assert len(cases) >= 12
    for case in cases:
        agrees(case)


def test_score_by_hand() -> None:
    assert homogeneity_score(UNIFORM, UNIFORM) == 2.0
    # Differences 0.75, -0.25, -0.25, -0.25: squares sum to 0.75.
    assert homogeneity_score([1, 0, 0, 0], UNIFORM) == pytest.approx(2 - math.sqrt(0.75), rel=1e-15)
    assert homogeneity_score([1, 0], [0, 1]) == pytest.approx(2 - math.sqrt(2), rel=1e-15)


def test_merge_by_hand() -> None:
    # (30 * (1, 0) + 10 * (0, 1)) / 40
    assert merge([1, 0], 30, [0, 1], 10).tolist() == [0.75, 0.25]


def test_merge_without_samples() -> None:
    assert merge(UNIFORM, 0, [0.1, 0.2, 0.3, 0.4], 7).tolist() == [0.1, 0.2, 0.3, 0.4]
    assert merge([0.1, 0.2, 0.3, 0.4], 7, [0, 0, 0, 0], 0).tolist() == [0.1, 0.2, 0.3, 0.4]
    edge = np.array(UNIFORM)
    merged = merge(edge, 0, [0, 0, 0, 0], 0)
    assert merged.tolist() == UNIFORM
    merged[0] = 9
    assert edge.tolist() == UNIFORM


@pytest.mark.parametrize("huge", [10**18, 1e308])
def test_huge_counts_stay_exact(huge: float) -> None:
    assert merge([1, 0], huge, [0, 1], huge).tolist() == [0.5, 0.5]
    assert aggregation_weights([huge, huge], [2.0, 1.0], a=1.0).tolist() == [0.5, 0.5]
    chances = selection_probabilities([([1, 0], huge), ([1, 0], 0)], [0, 1], 1, [0.5, 0.5], a=1e4)
    # s = (0 + 1e-8, 1e4 * (2 - sqrt(0.5)) + 1e-8)
    assert chances[0] == pytest.approx(1e-8 / (1e4 * (2 - math.sqrt(0.5))), rel=1e-9)


def test_selection_by_hand() -> None:
    # Merged with 10 of class 1: edge A (1, 0) x 10 becomes even, score 2; edge B is empty and
    # becomes (0, 1), score 2 - sqrt(0.5). With a = 100 and b = 5: s_A = 195, s_B = 134.289...
    chances = selection_probabilities(
        [([1, 0], 10), ([0.5, 0.5], 0)], [0, 1], 10, [0.5, 0.5], a=100, b=5, epsilon=0.5
    )
    s_a, s_b = 195.5, 100 * (2 - math.sqrt(0.5)) + 5.5
    assert chances == pytest.approx([s_a / (s_a + s_b), s_b / (s_a + s_b)], rel=1e-14)


@pytest.mark.parametrize("epsilon", [1e-8, 1.0, 0.0])
def test_choice_is_uniform_when_every_score_is_cut_off(epsilon: float) -> None:
    edges = [([1, 0], 50_000), ([0, 1], 90_000), ([0.5, 0.5], 70_000)]
    chances = selection_probabilities(edges, [0, 1], 9, [0.5, 0.5], a=1e4, epsilon=epsilon)
    assert chances == pytest.approx([1 / 3] * 3, rel=1e-15)


def test_weights_by_hand() -> None:
    # 100 + 50 * 2 - 150 = 50; 200 + 50 * 1 - 150 = 100; 10 + 50 * 1 - 150 < 0
    weights = aggregation_weights([100, 200, 10], [2.0, 1.0, 1.0], a=50, b=-150)
    assert weights == pytest.approx([1 / 3, 2 / 3, 0], rel=1e-15)


def test_weights_fall_back_to_samples_then_to_uniform() -> None:
    assert aggregation_weights([30, 10, 0], [2, 2, 2], a=1, b=-1e6).tolist() == [0.75, 0.25, 0]
    assert aggregation_weights([0, 0], [2, 1], a=0).tolist() == [0.5, 0.5]
    # An edge without samples still has its homogeneity's share.
    assert aggregation_weights([0, 0], [2, 1], a=6).tolist() == pytest.approx([2 / 3, 1 / 3])


def test_one_edge_takes_all() -> None:
    assert selection_probabilities([([1, 0], 3)], [0, 1], 1, [0.5, 0.5], a=4).tolist() == [1.0]
    assert aggregation_weights([3], [1.5], a=4).tolist() == [1.0]


def test_inputs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"q has 2 values, but target has 4"):
        homogeneity_score([0.5, 0.5], UNIFORM)
    with pytest.raises(ValueError, match=r"q = \[nan, 1.0\] has a value that is not finite"):
        homogeneity_score([math.nan, 1], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"target has shape \(1, 2\)"):
        homogeneity_score([0.5, 0.5], [[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"n_e, n_n = \[-1.0, 2.0\] has a negative"):
        merge([1], -1, [1], 2)
    with pytest.raises(ValueError, match="too large"):
        merge([1], 10**400, [1], 2)
    with pytest.raises(ValueError, match=r"q_n has shape \(0,\)|q_e has shape \(0,\)"):
        merge([], 1, [], 2)
    with pytest.raises(ValueError, match="edges is empty"):
        selection_probabilities([], [1], 1, [1], a=1)
    with pytest.raises(ValueError, match=r"epsilon = \[-1\.0\] has a negative value"):
        selection_probabilities([([1], 1)], [1], 1, [1], a=1, epsilon=-1)
    with pytest.raises(ValueError, match=r"a = \[inf\]"):
        aggregation_weights([1], [1], a=math.inf)
    with pytest.raises(ValueError, match="num_samples has 2 values, but scores has 1"):
        aggregation_weights([1, 2], [1], a=1)
    with pytest.raises(ValueError, match="num_samples has shape"):
        aggregation_weights([], [], a=1)
