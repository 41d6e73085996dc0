"""Numbers on samples, from features that make them easy to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedphd.common.quality import metrics
from fedphd.common.quality.metrics import (
    class_coverage,
    frechet_distance,
    inception_score,
    inside_manifold,
    kernel_distance,
    neighbour_distances,
    precision_recall,
)
from fedphd.common.quality.moments import FeatureStatistics
from fedphd.common.rng import generator


def line(*places: float) -> torch.Tensor:
    """Points on a line, (N, 1)."""
    return torch.tensor(places).reshape(-1, 1)


def noise(num: int, features: int = 4, *, use: str = "noise") -> torch.Tensor:
    return torch.randn(num, features, generator=generator(use))


def test_a_point_is_not_its_own_neighbour() -> None:
    # 0 is 1 from 1 and 3 from 3; 1 is 1 from 0 and 2 from 3; 3 is 2 from 1 and 3 from 0.
    points = line(0.0, 1.0, 3.0)
    assert neighbour_distances(points, 1).tolist() == [1, 1, 2]
    assert neighbour_distances(points, 2).tolist() == [3, 2, 3]


def test_precision_and_recall_of_points_on_a_line() -> None:
    """k = 1. Balls of the reference 0, 1, 10, 11: [-1, 2] and [9, 12], both closed.

    Of the samples -1, 0.5, 2, 5 three lie there. Their own balls have radii 1.5, 1.5, 1.5 and 3:
    [-2.5, 0.5], [-1, 2], [0.5, 3.5], [2, 8]. Of the reference 0 and 1 lie in them.
    """
    reference, samples = line(0.0, 1.0, 10.0, 11.0), line(-1.0, 0.5, 2.0, 5.0)
    assert precision_recall(reference, samples, neighbours=1) == (0.75, 0.5)


def test_precision_and_recall_are_shares_of_different_sets() -> None:
    """k = 1, with five reference points and three samples.

    Balls of the reference 0, 1, 10, 11, 20: [-1, 1], [0, 2], [9, 11], [10, 12], [11, 29]; of the
    samples 0.5, 5, 6 the first lies there. Their balls: [-4, 5], [4, 6], [5, 7], with 0 and 1.
    """
    reference, samples = line(0.0, 1.0, 10.0, 11.0, 20.0), line(0.5, 5.0, 6.0)
    assert precision_recall(reference, samples, neighbours=1) == (1 / 3, 2 / 5)
    assert precision_recall(samples, reference, neighbours=1) == (2 / 5, 1 / 3)


def test_a_lost_mode_costs_recall_and_a_wrong_one_precision() -> None:
    two_modes = torch.cat([noise(50, use="a"), noise(50, use="b") + 100])
    one_mode = noise(100, use="c")
    precision, recall = precision_recall(two_modes, one_mode)
    assert precision > 0.8
    assert recall <= 0.5
    precision, recall = precision_recall(one_mode, two_modes)
    assert precision <= 0.5
    assert recall > 0.8


def test_pieces_give_the_same_manifold(monkeypatch: pytest.MonkeyPatch) -> None:
    points, queries = noise(37).double(), noise(23, use="queries").double() * 1.5
    whole = inside_manifold(points, 3, queries)
    assert 0 < whole < 1
    monkeypatch.setattr(metrics, "_ROWS", 5)
    assert inside_manifold(points, 3, queries) == whole


def test_the_least_class_is_measured_by_its_share_in_the_reference() -> None:
    """Shares 5/8, 2/8, 1/8 where the reference has 1/2, 1/4, 1/4: ratios 1.25, 1, 0.5."""
    predicted = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    assert class_coverage(predicted, (20, 10, 10)) == ((0.625, 0.25, 0.125), 2, 0.5)


def test_a_lost_minority_shows_and_a_class_that_nobody_has_does_not() -> None:
    predicted = torch.tensor([0, 1, 3, 0])
    assert class_coverage(predicted, (50, 49, 1, 0)) == ((0.5, 0.25, 0.0, 0.25), 2, 0.0)


def test_the_frechet_distance_of_two_points_each() -> None:
    """Means 1 and 4, variances 2 and 8: (1 - 4)^2 + (sqrt 2 - sqrt 8)^2 = 9 + 2."""
    reference = FeatureStatistics.of(line(0.0, 2.0), torch.tensor([0, 0]), 1)
    assert frechet_distance(reference, line(2.0, 6.0)) == pytest.approx(11)


def test_the_kernel_distance_by_hand() -> None:
    """One feature, kernel k(x, y) = (x y + 1)^3, both sets used whole in every subset.

    Reference 0, 1 and samples 1, 2: 2 k(0, 1) / 2 + 2 k(1, 2) / 2 - 2 (k(0, 1) + k(0, 2) +
    k(1, 1) + k(1, 2)) / 4 = 1 + 27 - (1 + 1 + 8 + 27) / 2 = 9.5.
    """
    mean, deviation = kernel_distance(line(0.0, 1.0), line(1.0, 2.0), seed=0)
    assert mean == pytest.approx(9.5)
    assert deviation == pytest.approx(0, abs=1e-6)


def test_subsets_are_never_larger_than_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = metrics.KernelInceptionDistance

    def spy(**arguments: object) -> object:
        asked.append((arguments["subsets"], arguments["subset_size"]))
        return original(**{**arguments, "subsets": 2})

    monkeypatch.setattr(metrics, "KernelInceptionDistance", spy)
    for reference, samples in ((30, 1200), (1200, 7), (1200, 1100)):
        kernel_distance(noise(reference), noise(samples, use="samples"), seed=0)
    assert asked == [(100, 30), (100, 7), (100, 1000)]


def test_random_subsets_follow_the_seed_and_leave_the_global_generator() -> None:
    before = torch.get_rng_state()
    first = kernel_distance(noise(60), noise(20, use="x"), seed=1)
    assert kernel_distance(noise(60), noise(20, use="x"), seed=1) == first
    assert kernel_distance(noise(60), noise(20, use="x"), seed=2) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_the_inception_score_is_1_without_variety_and_the_classes_with_it() -> None:
    same = torch.tensor([[9.0, 0.0]]).repeat(20, 1)
    assert inception_score(same, seed=0) == pytest.approx(1)
    certain = torch.tensor([[50.0, 0.0], [0.0, 50.0]]).repeat(5000, 1)
    assert inception_score(certain, seed=0) == pytest.approx(2, rel=1e-2)
    assert math.isfinite(inception_score(certain[:3], seed=0))
