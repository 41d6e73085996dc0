"""What samples are compared with, and in which features.

Reference statistics come from a data set at the cloud, from a file, or from the clients, who sum up
their images' features once. Only a data set provides the features of single images, which the
kernel distance and precision and recall need.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedphd.common.config.evaluation import EvaluationConfig
from fedphd.common.data.images import ImageSet, LabelledImages
from fedphd.common.errors import ConfigError
from fedphd.common.quality.classifier import ClassifierSettings, load_feature_classifier
from fedphd.common.quality.extractor import (
    Extractor,
    classifier_extractor,
    inception_extractor,
    load_extractor,
)
from fedphd.common.quality.inception import Inception, check_installed, check_weights
from fedphd.common.quality.moments import WRITE_STATISTICS, FeatureStatistics, StatisticsFile
from fedphd.common.rng import generator

# Bounds time and memory of what compares single images.
MOST_KEPT = 10_000


@dataclass(frozen=True)
class Reference:
    """Reference statistics and the features that they are in.

    Raises:
        ConfigError: there are fewer than 2 reference images.
    """

    extractor: Extractor
    statistics: FeatureStatistics
    # Features of single reference images, (M <= 10,000, d), float32; None for statistics alone.
    kept: Tensor | None
    classifier: Extractor | None  # tells the reference's classes apart
    image_shape: tuple[int, ...] | None  # (C, H, W) that samples must have; None for any
    kept_labels: Tensor | None = None  # classes of ``kept``, (M,), int64

    def __post_init__(self) -> None:
        # One image has no covariance.
        if self.statistics.count < 2:
            raise ConfigError(
                f"the reference has {self.statistics.count} image(s); a distance needs at least 2"
            )


def load_reference(
    config: EvaluationConfig,
    *,
    image_size: int,
    channels: int,
    num_classes: int,
    cache_dir: Path,
    device: torch.device,
) -> Reference | None:
    """The reference on this machine; None without one, or where the clients compute it later.

    A data set must have all of ``num_classes`` classes and no more; it is brought to ``image_size``
    pixels and to ``channels``. ``cache_dir`` is the folder of trained classifiers.

    Raises:
        ConfigError: a file or the data set cannot be used, has other classes or fewer than 2
            images, or a file was made in other features than the configured ones.
    """
    if config.reference_file is not None:
        return _configured_file(config, config.reference_file)
    if config.reference is None:
        return None
    data = LabelledImages(config.reference)
    data.check_covers(num_classes)
    images = data.decode(image_size=image_size, channels=channels)
    return reference_of_images(config, images, cache_dir=cache_dir, device=device)


def check_features(config: EvaluationConfig) -> None:
    """Raise ConfigError if a file or package that the features need is missing on this machine.

    No network is loaded: a launcher calls this before it starts anything.
    """
    if config.wants_inception:
        check_weights(config.inception_weights, config.inception_sha256)
        check_installed()
    for name in ("features_file", "reference_file"):
        path: Path | None = getattr(config, name)
        if path is not None and not path.is_file():
            raise ConfigError(f"evaluation.{name} = {path}: no such file; correct the path")


def fixed_extractor(config: EvaluationConfig) -> Extractor | None:
    """The extractor that the configuration names; None where one must be trained on data.

    Raises:
        ConfigError: a file is missing or unusable, or torch-fidelity is missing.
    """
    check_features(config)
    if config.wants_inception:
        return inception_extractor(Inception(config.inception_weights))
    return _file_classifier(config)


def trained_classifier(
    config: EvaluationConfig, images: ImageSet, *, cache_dir: Path, device: torch.device
) -> Extractor:
    """The classifier of ``config.reference``; raises as ``load_feature_classifier`` does."""
    settings = ClassifierSettings(epochs=config.classifier_epochs)
    model = load_feature_classifier(images, settings, cache_dir=cache_dir, device=device)
    source = config.reference.source if config.reference else "reference"
    # Only the last part, since reports travel and a full path shows more than they need.
    return classifier_extractor(model, name=Path(source).name)


def reference_of_images(
    config: EvaluationConfig, images: ImageSet, *, cache_dir: Path, device: torch.device
) -> Reference:
    """The reference that the data set ``config.reference`` makes.

    A classifier is trained on ``images`` unless a file or the cache holds it.

    Raises:
        ConfigError: there are fewer than 2 images, or the features' files are unusable.
    """
    shape = tuple(images.images.shape[1:])
    classifier = _file_classifier(config)
    if classifier is None:
        classifier = trained_classifier(config, images, cache_dir=cache_dir, device=device)
    classifier.check_shape(shape)
    extractor = (fixed_extractor(config) if config.wants_inception else None) or classifier
    features = extractor.features(images.images, batch_size=config.batch_size, device=device)
    # In batches, since they are summed in float64, which all at once would take twice the room.
    batches = torch.split(features, config.batch_size)
    num_classes = int(images.labels.max()) + 1
    statistics = FeatureStatistics.summed(batches, images.labels, features.shape[1], num_classes)
    order = torch.randperm(len(features), generator=generator("reference", config.seed))
    kept = order[:MOST_KEPT]
    return Reference(
        extractor, statistics, features[kept], classifier, shape, kept_labels=images.labels[kept]
    )


def reference_of_statistics(
    config: EvaluationConfig, extractor: Extractor, statistics: FeatureStatistics
) -> Reference:
    """The reference of statistics in the features of ``extractor``, wherever they came from.

    Raises:
        ConfigError: they are of fewer than 2 images, or ``evaluation.features_file`` is unusable.
    """
    classifier = _file_classifier(config) if extractor.spec.kind == "inception" else extractor
    return Reference(extractor, statistics, None, classifier, extractor.image_shape)


def reference_of_file(
    config: EvaluationConfig,
    extractor: Extractor,
    path: Path,
    *,
    name: str,
    other: str,
    damaged: str = WRITE_STATISTICS,
) -> Reference:
    """The reference of a file's statistics.

    Errors ``name`` it, and say what to do where it is ``damaged``, or of ``other`` features.

    Raises:
        ConfigError: it cannot be read, or was made in other features than those of ``extractor``.
    """
    stored = StatisticsFile.load(path, otherwise=damaged)
    # Distances in two networks' features are plausible numbers that mean nothing together.
    if stored.fingerprint != extractor.fingerprint():
        raise ConfigError(
            f"{name} = {path} was made in the features {stored.features} with "
            f"other weights than those of {extractor.spec.name}, which is configured; {other}, or "
            "name the features that it was made in"
        )
    return reference_of_statistics(config, extractor, stored.statistics)


def _configured_file(config: EvaluationConfig, path: Path) -> Reference:
    extractor = fixed_extractor(config)
    if extractor is None:
        raise ConfigError(
            f"evaluation.reference_file = {path} needs evaluation.features_file or "
            "evaluation.inception_weights, the features that it was made in"
        )
    other = "write it again with fedphd statistics"
    return reference_of_file(config, extractor, path, name="evaluation.reference_file", other=other)


def _file_classifier(config: EvaluationConfig) -> Extractor | None:
    path = config.features_file
    return None if path is None else load_extractor(path)
