"""Samples of a class: what the network is told, guidance, and how good each class is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedphd.common.config.data import DataConfig
from fedphd.common.config.evaluation import EvaluationConfig
from fedphd.common.config.run import DiffusionConfig, FederationConfig
from fedphd.common.data.images import ImageSet
from fedphd.common.quality.evaluation import Evaluator
from fedphd.common.quality.metrics import coverage
from fedphd.common.quality.reference import reference_of_images
from fedphd.common.quality.sampling import sample_images, spread_labels
from fedphd.common.unet.model import PrunedUNet, build_scheduler, build_unet

CPU = torch.device("cpu")
MODEL = FederationConfig.model_validate(
    {
        "num_classes": 3,
        "model": {
            "image_size": 4, "block_out_channels": (8, 8), "norm_num_groups": 4,
            "class_conditional": True,
        },
        "pruning": {"mode": "none"},
    }
).model  # fmt: skip


@pytest.fixture
def unet() -> PrunedUNet:
    return build_unet(MODEL, seed=0)


def sample(unet: torch.nn.Module, labels: list[int] | None, guidance: float = 1.0) -> torch.Tensor:
    return sample_images(
        unet,  # type: ignore[arg-type]
        build_scheduler(DiffusionConfig()),
        num=len(labels or "abc"), steps=2, batch_size=2, seed=7, device=CPU,
        labels=None if labels is None else torch.tensor(labels), guidance=guidance,
    )  # fmt: skip


def test_an_image_depends_on_its_class(unet: PrunedUNet) -> None:
    first, other = sample(unet, [0, 1, 2]), sample(unet, [0, 2, 2])
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    assert torch.equal(first[2], other[2])


def test_no_label_is_the_last_row(unet: PrunedUNet) -> None:
    assert unet.no_label == 3
    assert torch.equal(sample(unet, None), sample(unet, [3, 3, 3]))


class Line(torch.nn.Module):
    """Predicts the label plus one as the noise of every pixel; 0 without one."""

    no_label = 3

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, torch.float32, CPU
        self.seen: list[torch.Tensor] = []

    def forward(self, noisy: torch.Tensor, timestep: object, labels: torch.Tensor) -> object:
        values = torch.where(labels == self.no_label, 0.0, labels + 1.0)
        self.seen.append(labels)
        output = type("Output", (), {})()
        output.sample = values[:, None, None, None].expand_as(noisy)
        return output


def test_guidance_goes_beyond_what_the_network_is_told(unet: PrunedUNet) -> None:
    """Noise without a class is 0, of class 1 it is 2; guidance 3 makes 6 of it, as class 5 does."""
    guided = sample(Line(unet.config), [1, 1], guidance=3.0)
    assert torch.equal(guided, sample(Line(unet.config), [5, 5]))
    assert not torch.equal(guided, sample(Line(unet.config), [1, 1]))


def test_labels_follow_the_distribution_at_every_length() -> None:
    labels = spread_labels(10, [0.5, 0.3, 0.2])
    assert torch.bincount(labels).tolist() == [5, 3, 2]
    for num in range(1, 10):
        assert torch.equal(spread_labels(num, [0.5, 0.3, 0.2]), labels[:num])
    assert spread_labels(4, [0.25] * 4).tolist() == [0, 1, 2, 3]
    assert 1 not in spread_labels(7, [0.5, 0.0, 0.5])


def test_coverage_by_hand() -> None:
    """Points 0, 1, 2 and 10 on a line; radii to the second neighbour 2, 1, 2 and 9."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    assert coverage(reference, torch.tensor([[-1.5]]), neighbours=2) == 0.25
    assert coverage(reference, torch.tensor([[-1.5], [1.5]]), neighbours=2) == 1.0
    assert coverage(reference, torch.tensor([[100.0]]), neighbours=2) == 0.0


def test_each_class_is_measured_by_itself(tmp_path: Path) -> None:
    """Real zeros and ones in their places, and ones where twos are to be."""
    found = load_digits()
    images = torch.from_numpy(np.rint(found.images * (255 / 16))).to(torch.uint8)[:, None]
    labels = torch.from_numpy(found.target)
    chosen = labels < 3
    data = ImageSet(images[chosen], labels[chosen])
    config = EvaluationConfig(
        num_samples=90, classifier_epochs=3, reference=DataConfig(source="digits")
    )
    reference = reference_of_images(config, data, cache_dir=tmp_path, device=CPU)
    evaluator = Evaluator(config, reference, CPU, (1 / 3,) * 3)
    ones = data.images[data.labels == 1]
    drawn = torch.cat([data.images[data.labels == 0][:30], ones[:30], ones[30:60]])
    told = torch.repeat_interleave(torch.arange(3), 30)
    quality = evaluator.measure(drawn, told)
    assert quality.class_distances is not None
    assert quality.class_coverages is not None
    zero, one, two = quality.class_distances
    assert zero is not None
    assert one is not None
    assert two is not None
    assert two > 5 * max(zero, one)
    covered = [share or 0.0 for share in quality.class_coverages]
    assert covered[2] < 0.25
    assert min(covered[:2]) > 0.3
    assert evaluator.protocol().guidance == 1.0
    # Too few of a class for a neighbourhood.
    few = evaluator.measure(drawn[:61], told[:61])
    assert few.class_distances is not None
    assert few.class_distances[2] is None
    assert evaluator.measure(drawn).class_distances is None
