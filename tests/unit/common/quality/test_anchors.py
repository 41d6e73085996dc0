"""The scale that real images give to a distance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedphd.common.config.evaluation import EvaluationConfig
from fedphd.common.history.evaluation import Anchors
from fedphd.common.quality.evaluation import Evaluator
from fedphd.common.quality.extractor import Extractor
from fedphd.common.quality.metrics import frechet_distance
from fedphd.common.quality.moments import FeatureStatistics
from fedphd.common.quality.reference import Reference
from fedphd.common.wire.messages import ExtractorSpec

SPEC = ExtractorSpec(
    kind="classifier", name="pixel", num_features=1, channels=1, image_size=4, num_classes=4,
    layout="[]",
)  # fmt: skip


def anchors(values: list[float], labels: list[int], num_samples: int, classes: int) -> object:
    features, classed = torch.tensor(values, dtype=torch.float)[:, None], torch.tensor(labels)
    statistics = FeatureStatistics.of(features, classed, classes)
    extractor = Extractor(nn.Identity(), nn.Identity(), SPEC)
    reference = Reference(extractor, statistics, features, None, None, kept_labels=classed)
    config = EvaluationConfig(num_samples=num_samples)
    return Evaluator(config, reference, device=torch.device("cpu")).anchors


def test_anchors_are_distances_of_the_reference_to_parts_of_itself() -> None:
    """In one dimension: the squared differences of means and of standard deviations."""
    found = anchors([0, 2, 4, 6, 10, 12, 14, 16], [0, 0, 1, 1, 2, 2, 3, 3], 7, 4)
    assert isinstance(found, Anchors)
    # All: mean 8, squares 2 x (64 + 36 + 16 + 4) = 240 / 7. Without 0 and 2: mean 62 / 6,
    # squares 748 - 62^2 / 6 over 5. The first four: mean 3, squares 9 + 1 + 1 + 9 over 3.
    deviation = (240 / 7) ** 0.5
    fewer = (62 / 6 - 8) ** 2 + (((748 - 62**2 / 6) / 5) ** 0.5 - deviation) ** 2
    # The first seven: mean 48 / 7, squares 496 - 48^2 / 7 over 6.
    real = (48 / 7 - 8) ** 2 + (((496 - 48**2 / 7) / 6) ** 0.5 - deviation) ** 2
    assert found.real == pytest.approx(real, rel=1e-4)
    half = (3 - 8) ** 2 + ((20 / 3) ** 0.5 - deviation) ** 2
    assert found.one_class_missing == pytest.approx(fewer, rel=1e-4)
    assert found.half_of_the_classes == pytest.approx(half, rel=1e-4)


def test_as_many_real_images_are_drawn_as_samples() -> None:
    found = anchors([0, 2, 4, 6], [0, 1, 0, 1], 2, 2)
    assert isinstance(found, Anchors)
    # 0 and 2 have mean 1 and variance 2; all have mean 3 and variance 20 / 3.
    assert found.real == pytest.approx(4 + (2**0.5 - (20 / 3) ** 0.5) ** 2, rel=1e-4)


def test_one_class_has_no_further_anchors() -> None:
    found = anchors([0, 2, 4], [0, 0, 0], 2, 1)
    assert isinstance(found, Anchors)
    assert (found.one_class_missing, found.half_of_the_classes) == (None, None)


def test_a_reference_that_is_drawn_whole_gives_no_scale() -> None:
    """Its distance to itself would be 0, and less by rounding."""
    assert anchors([0, 2, 4, 6], [0, 1, 0, 1], 4, 2) is None
    assert anchors([0, 2, 4, 6], [0, 1, 0, 1], 9, 2) is None
    assert anchors([0, 2, 4, 6], [0, 1, 0, 1], 3, 2) is not None
    features = torch.rand(40, 8, generator=torch.Generator().manual_seed(0))
    whole = FeatureStatistics.of(features, torch.zeros(40, dtype=torch.int64), 1)
    assert frechet_distance(whole, features) >= 0
