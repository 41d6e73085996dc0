"""Feature statistics: exact sums, their form on the wire and on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedphd.common.errors import ConfigError, ReplyError
from fedphd.common.quality.moments import FeatureStatistics, StatisticsFile
from fedphd.common.rng import generator

POINTS = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
LABELS = torch.tensor([0, 2, 2])
THREE = FeatureStatistics.of(POINTS, LABELS, 3)


def unpacked(
    flat: torch.Tensor, *, count: int = 3, label_counts: tuple[int, ...] = (1, 0, 2)
) -> FeatureStatistics:
    return FeatureStatistics.unpack(flat, num_features=2, count=count, label_counts=label_counts)


def test_sums_mean_and_covariance_of_three_points() -> None:
    assert (THREE.count, THREE.sums.tolist()) == (3, [6, 6])
    assert THREE.outer.tolist() == [[20, 18], [18, 18]]
    assert THREE.label_counts == (1, 0, 2)
    assert THREE.mean.tolist() == [2, 2]
    # Deviations (-2, -1), (0, -1), (2, 2); 8 / 2, 6 / 2 and 6 / 2.
    assert THREE.covariance.tolist() == [[4, 3], [3, 3]]
    assert THREE.sums.dtype == THREE.outer.dtype == torch.float64


def test_parts_add_up_to_the_whole() -> None:
    added = FeatureStatistics.of(POINTS[:1], LABELS[:1], 3) + FeatureStatistics.of(
        POINTS[1:], LABELS[1:], 3
    )
    assert torch.equal(added.outer, THREE.outer)
    assert added.sha256() == THREE.sha256()
    assert (FeatureStatistics.zeros(2, 3) + THREE).label_counts == (1, 0, 2)


def test_batches_do_not_matter() -> None:
    features = torch.rand(50, 4, generator=generator("statistics-test"))
    labels = torch.arange(50) % 3
    at_once, in_parts = (
        FeatureStatistics.summed(torch.split(features, size), labels, num_features=4, num_classes=3)
        for size in (50, 7)
    )
    assert torch.allclose(at_once.outer, in_parts.outer, rtol=1e-12)
    assert at_once.count == in_parts.count == 50
    assert at_once.label_counts == in_parts.label_counts == (17, 17, 16)


def test_the_hash_names_count_mean_and_covariance() -> None:
    more = FeatureStatistics.of(POINTS.repeat(2, 1), LABELS.repeat(2), 3)
    moved = FeatureStatistics.of(POINTS + 1, LABELS, 3)
    hashes = {THREE.sha256(), more.sha256(), moved.sha256()}
    assert len(hashes) == 3
    other_labels = FeatureStatistics.of(POINTS, torch.tensor([0, 0, 0]), 3)
    assert other_labels.sha256() == THREE.sha256()


def test_the_packed_form_is_the_upper_half() -> None:
    assert THREE.pack().tolist() == [6, 6, 20, 18, 18]
    back = unpacked(THREE.pack())
    assert torch.equal(back.outer, THREE.outer)
    assert back.sha256() == THREE.sha256()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda: unpacked(THREE.pack()[:-1]), "hold 4 values; 2 features take 5"),
        (lambda: unpacked(THREE.pack() * torch.nan), "not finite"),
        (lambda: unpacked(THREE.pack(), label_counts=(1, 1, 2)), "not those of 3 images"),
        (lambda: unpacked(THREE.pack(), label_counts=(4, -3, 2)), "not those of 3 images"),
        # A sum of 6 over one image has a square of 36.
        (lambda: unpacked(THREE.pack(), count=1, label_counts=(1, 0, 0)), "impossible for 1"),
    ],
)
def test_what_cannot_be_statistics_is_refused(
    change: Callable[[], FeatureStatistics], problem: str
) -> None:
    with pytest.raises(ReplyError, match=problem):
        change()


def test_a_file_brings_everything_back(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    StatisticsFile(THREE, "classifier(digits)", "abc").save(path)
    back = StatisticsFile.load(path)
    assert (back.features, back.fingerprint) == ("classifier(digits)", "abc")
    assert back.statistics.sha256() == THREE.sha256()
    assert back.statistics.label_counts == (1, 0, 2)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    text, tensors = tmp_path / "text", tmp_path / "other.safetensors"
    text.write_text("no tensors")
    save_file({"a": torch.zeros(1)}, tensors)
    for path in (text, tensors, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=f"{path.name}: cannot be read as reference stat"):
            StatisticsFile.load(path)
