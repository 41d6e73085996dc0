"""What samples are compared with, and in which features.

There are three sources of reference statistics: a data set at the cloud, a file, or the clients,
who sum up their images' features once. Only a data set gives single images' features, which the
kernel distance and precision and recall need.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedphd.common.config.run import EvaluationConfig
from fedphd.common.data.images import ImageSet
from fedphd.common.errors import ConfigError
from fedphd.common.quality.classifier import ClassifierSettings, load_feature_classifier
from fedphd.common.quality.extractor import (
    Extractor,
    classifier_extractor,
    inception_extractor,
    load_extractor,
)
from fedphd.common.quality.inception import Inception, check_installed, check_weights
from fedphd.common.quality.moments import FeatureStatistics, StatisticsFile, feature_moments
from fedphd.common.rng import generator

logger = logging.getLogger(__name__)

# Bounds time and memory of what compares single images.
MOST_KEPT = 10_000


@dataclass(frozen=True)
class Reference:
    """Reference statistics and the features that they are in.

    Attributes:
        extractor: gives the features.
        statistics: of all reference images.
        kept: features of single reference images, (M, d), float32, M at most 10,000; None where
            there are only statistics.
        classifier: tells the reference's classes apart; None without one.
        image_shape: (C, H, W) that samples must have; None for any.
    """

    extractor: Extractor
    statistics: FeatureStatistics
    kept: Tensor | None
    classifier: Extractor | None
    image_shape: tuple[int, ...] | None


def check_features(config: EvaluationConfig) -> None:
    """Raise ConfigError if what the features need is not on this machine; loads no network."""
    if config.wants_inception:
        check_weights(config.inception_weights, config.inception_sha256)
        check_installed()
    for name in ("features_file", "reference_file"):
        path: Path | None = getattr(config, name)
        if path is not None and not path.is_file():
            raise ConfigError(f"evaluation.{name} = {path}: no such file; correct the path")


def fixed_extractor(config: EvaluationConfig) -> Extractor | None:
    """The extractor that follows from the configuration alone; None where data must train it.

    Raises:
        ConfigError: a file is missing or is something else, or torch-fidelity is missing.
    """
    check_features(config)
    if config.wants_inception:
        return inception_extractor(Inception(config.inception_weights))
    return None if config.features_file is None else load_extractor(config.features_file)


def reference_of_images(
    config: EvaluationConfig, images: ImageSet, *, cache_dir: Path, device: torch.device
) -> Reference:
    """The reference that the data set ``config.reference`` makes.

    Args:
        config: which features; a classifier that no file holds is trained on ``images``.
        images: the reference images with their labels.
        cache_dir: folder of trained classifiers.
        device: where networks run.

    Raises:
        ConfigError: there are fewer than 2 images, or the features' files are unusable.
    """
    if len(images) < 2:
        raise ConfigError(
            f"evaluation.reference has {len(images)} image(s); a distance needs at least 2"
        )
    classifier = _classifier(config, images, cache_dir=cache_dir, device=device)
    extractor = classifier
    if config.wants_inception:
        extractor = fixed_extractor(config) or classifier
    extractor.network.to(device)
    extractor.check_shape(tuple(images.images.shape[1:]))
    features = extractor.features(images.images, batch_size=config.batch_size, device=device)
    statistics = feature_moments(
        lambda part: part,
        features,
        images.labels,
        num_features=extractor.num_features,
        num_classes=int(images.labels.max()) + 1,
        batch_size=config.batch_size,
        device=torch.device("cpu"),
    )
    order = torch.randperm(len(features), generator=generator("reference", config.seed))
    kept = features[order[:MOST_KEPT]]
    return Reference(extractor, statistics, kept, classifier, tuple(images.images.shape[1:]))


def reference_of_statistics(
    config: EvaluationConfig,
    extractor: Extractor,
    statistics: FeatureStatistics,
    *,
    device: torch.device,
) -> Reference:
    """The reference that statistics make, from wherever they came."""
    if statistics.count < 2:
        raise ConfigError(
            f"the reference statistics are of {statistics.count} image(s); a distance needs at "
            "least 2"
        )
    extractor.network.to(device)
    if extractor.spec.kind == "inception":
        path = config.features_file
        other = load_extractor(path) if path is not None else None
        return Reference(extractor, statistics, None, _on(other, device), None)
    return Reference(extractor, statistics, None, extractor, extractor.image_shape)


def reference_of_file(config: EvaluationConfig, path: Path, *, device: torch.device) -> Reference:
    """The reference in a statistics file.

    Raises:
        ConfigError: the file is unusable, or was made in other features than the configured.
    """
    extractor = fixed_extractor(config)
    if extractor is None:
        raise ConfigError(
            f"evaluation.reference_file = {path} needs evaluation.features_file or "
            "evaluation.inception_weights, the features that it was made in"
        )
    stored = StatisticsFile.load(path)
    if stored.fingerprint != extractor.fingerprint():
        raise ConfigError(
            f"evaluation.reference_file = {path} was made in the features {stored.features} with "
            f"other weights than those of {extractor.name}, which is configured; write it anew by "
            "fedphd statistics, or name the features that it was made in"
        )
    return reference_of_statistics(config, extractor, stored.statistics, device=device)


def _classifier(
    config: EvaluationConfig, images: ImageSet, *, cache_dir: Path, device: torch.device
) -> Extractor:
    if config.features_file is not None:
        extractor = load_extractor(config.features_file)
        extractor.check_shape(tuple(images.images.shape[1:]))
        extractor.network.to(device)
        return extractor
    settings = ClassifierSettings(epochs=config.classifier_epochs)
    model = load_feature_classifier(images, settings, cache_dir=cache_dir, device=device)
    source = config.reference.source if config.reference else "reference"
    # The last part only: a folder's full path is nobody else's business.
    return classifier_extractor(model, name=Path(source).name)


def _on(extractor: Extractor | None, device: torch.device) -> Extractor | None:
    if extractor is not None:
        extractor.network.to(device)
    return extractor
