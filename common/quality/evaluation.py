"""How good a network's samples are, compared with the reference."""

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from fedphd.common.config.evaluation import EvaluationConfig
from fedphd.common.errors import ConfigError
from fedphd.common.history.evaluation import Anchors, EvaluationRecord, Protocol, Quality
from fedphd.common.quality import metrics
from fedphd.common.quality.extractor import Extractor
from fedphd.common.quality.moments import FeatureStatistics
from fedphd.common.quality.reference import Reference
from fedphd.common.quality.sampling import SAMPLER, sample_images, spread_labels
from fedphd.common.unet.arithmetic import gpu_has_bf16
from fedphd.common.unet.model import UNet2DModel

NO_FEATURES = "none"


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation."""

    samples: Tensor  # by the averaged weights, (num_samples, C, H, W), uint8
    quality: Quality
    raw: Quality | None  # of the raw weights' samples, from the same noise; None if not measured
    protocol: Protocol
    seconds: float  # wall time of sampling and measuring
    anchors: Anchors | None = None  # what real images get; None without single reference images

    def record(self, interval: int | None) -> EvaluationRecord:
        """Everything but the images; ``interval`` is that of the weights."""
        values = {**self.quality.model_dump(), **self.protocol.model_dump()}
        return EvaluationRecord(
            **values,
            interval=interval,
            raw=self.raw,
            seconds=self.seconds,
            anchors=self.anchors,
        )


@dataclass(frozen=True)
class Evaluator:
    """Samples networks and measures the samples; without a reference it gives no numbers.

    ``classes`` is the label distribution of a class-conditional network's samples.
    """

    config: EvaluationConfig
    reference: Reference | None
    device: torch.device
    classes: tuple[float, ...] | None = None

    def evaluate(
        self, unet: UNet2DModel, scheduler: DDPMScheduler, raw: UNet2DModel | None = None
    ) -> Evaluation:
        """Sample ``unet``, which has averaged weights, and measure; also ``raw``, if it is given.

        Raises:
            ConfigError: the images of network and reference differ in shape, or there are more
                sampling steps than diffusion steps.
            FedPhDError: the network returns values that are not finite.
        """
        started = time.monotonic()
        network: Any = unet.config
        size = network["sample_size"]
        # Before the samples, which take minutes.
        self.check_shape((network["in_channels"], size, size))
        labels, samples = self.labels, self._sample(unet, scheduler)
        measured = None if raw is None else self.measure(self._sample(raw, scheduler), labels)
        return Evaluation(
            samples=samples,
            quality=self.measure(samples, labels),
            raw=measured,
            protocol=self.protocol(),
            anchors=self.anchors,
            seconds=time.monotonic() - started,
        )

    def preview(self, unet: UNet2DModel, scheduler: DDPMScheduler) -> Tensor:
        """Samples for one grid, the first of those that ``evaluate`` makes; raises as it does."""
        num = min(self.config.num_samples, self.config.grid_rows**2)
        return self._sample(unet, scheduler, num)

    @property
    def bf16(self) -> bool:
        """Whether samples are drawn in bfloat16."""
        precision = self.config.precision
        return precision == "bf16" or (precision == "auto" and gpu_has_bf16(self.device))

    @cached_property
    def labels(self) -> Tensor | None:
        """Classes of the samples, (num_samples,), int64; None where the network knows none."""
        if self.classes is None:
            return None
        return spread_labels(self.config.num_samples, self.classes)

    @cached_property
    def anchors(self) -> Anchors | None:
        """What real images get; None where single reference images are not known, or all of them
        would be drawn, whose distance to themselves is 0."""
        reference = self.reference
        if reference is None or reference.kept is None or reference.kept_labels is None:
            return None
        kept, labels = reference.kept, reference.kept_labels
        num_classes = len(reference.statistics.label_counts)
        if min(len(kept), self.config.num_samples) >= reference.statistics.count:
            return None

        def distance(chosen: Tensor) -> float | None:
            # In the random order in which they are kept; one image has no covariance.
            features = kept[chosen][: self.config.num_samples]
            if len(features) < 2:
                return None
            return metrics.frechet_distance(reference.statistics, features)

        real = distance(torch.ones_like(labels, dtype=torch.bool))
        if real is None:
            return None
        return Anchors(
            real=real,
            one_class_missing=distance(labels > 0),
            half_of_the_classes=distance(labels < num_classes // 2),
        )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ConfigError unless images of ``shape``, (C, H, W), can be measured."""
        expected = self.reference.image_shape if self.reference else None
        if expected not in (None, shape):
            raise ConfigError(
                f"evaluation.reference has images of shape {expected}, the network's are {shape}; "
                "load the reference with model.image_size and model.channels"
            )

    def protocol(self) -> Protocol:
        """How this evaluator measures."""
        config, reference = self.config, self.reference
        kept = None if reference is None else reference.kept
        manifold = 0 if kept is None else min(len(kept), config.num_samples)
        return Protocol(
            features=reference.extractor.spec.name if reference else NO_FEATURES,
            num_samples=config.num_samples,
            sampler=f"{SAMPLER}, network in bf16" if self.bf16 else SAMPLER,
            sampling_steps=config.sampling_steps,
            seed=config.seed,
            num_reference_images=reference.statistics.count if reference else 0,
            reference_sha256=reference.statistics.sha256() if reference else None,
            neighbours=metrics.NEIGHBOURS if manifold > metrics.NEIGHBOURS else None,
            manifold_images=manifold if manifold > metrics.NEIGHBOURS else None,
            guidance=None if self.classes is None else config.guidance,
        )

    def measure(self, images: Tensor, labels: Tensor | None = None) -> Quality:
        """Quality of ``images``, (N >= 2, C, H, W), uint8; raises as ``check_shape`` does.

        ``labels``, (N,), int64, are the classes that a network was told to draw.
        """
        reference = self.reference
        if reference is None:
            return Quality()
        self.check_shape(tuple(images.shape[1:]))
        features = self._features(reference.extractor, images)
        return Quality(
            frechet_distance=metrics.frechet_distance(reference.statistics, features),
            inception_score=self._inception_score(reference.extractor, features),
            **self._beside_single_images(reference, features),
            **self._class_shares(reference, images, features),
            **_by_class(reference, features, labels),
        )

    def _sample(
        self, unet: UNet2DModel, scheduler: DDPMScheduler, num: int | None = None
    ) -> Tensor:
        config = self.config
        return sample_images(
            unet,
            scheduler,
            num=num or config.num_samples,
            steps=config.sampling_steps,
            batch_size=config.batch_size,
            seed=config.seed,
            device=self.device,
            labels=self.labels,
            guidance=config.guidance,
            bf16=self.bf16,
        )

    def _features(self, extractor: Extractor, images: Tensor) -> Tensor:
        return extractor.features(images, batch_size=self.config.batch_size, device=self.device)

    @torch.no_grad()
    def _inception_score(self, extractor: Extractor, features: Tensor) -> float | None:
        if extractor.spec.kind != "inception":
            return None
        scores = extractor.scores(features.to(self.device)).cpu()
        return metrics.inception_score(scores, seed=self.config.seed)

    def _beside_single_images(self, reference: Reference, features: Tensor) -> dict[str, Any]:
        """The fields of ``Quality`` that need single reference images' features."""
        if reference.kept is None:
            return {}
        mean, deviation = metrics.kernel_distance(reference.kept, features, seed=self.config.seed)
        values = {"kernel_distance": mean, "kernel_distance_std": deviation}
        # As many of either: with more points a manifold is finer, and the two would not compare.
        num = min(len(reference.kept), len(features))
        if num > metrics.NEIGHBOURS:
            precision, recall = metrics.precision_recall(reference.kept[:num], features[:num])
            values |= {"precision": precision, "recall": recall}
        return values

    @torch.no_grad()
    def _class_shares(
        self, reference: Reference, images: Tensor, features: Tensor
    ) -> dict[str, Any]:
        """The fields of ``Quality`` that need a classifier of the reference's classes."""
        classifier, counts = reference.classifier, reference.statistics.label_counts
        # A classifier of other data may know other classes, which say nothing about these.
        if classifier is None or classifier.spec.num_classes != len(counts):
            return {}
        if classifier is not reference.extractor:
            features = self._features(classifier, images)
        predicted = classifier.scores(features.to(self.device)).argmax(1).cpu()
        shares, least, ratio = metrics.class_coverage(predicted, counts)
        return {"class_shares": shares, "least_class": least, "least_class_ratio": ratio}


def _by_class(reference: Reference, features: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """The fields of ``Quality`` that say how good the samples of each class are, if told."""
    if labels is None or reference.kept is None or reference.kept_labels is None:
        return {}
    num_classes = len(reference.statistics.label_counts)
    distances: list[float | None] = []
    coverages: list[float | None] = []
    for label in range(num_classes):
        real = reference.kept[reference.kept_labels == label]
        drawn = features[labels == label]
        enough = min(len(real), len(drawn)) > metrics.NEIGHBOURS
        of_class = torch.full((len(real),), label)
        distances.append(
            metrics.frechet_distance(FeatureStatistics.of(real, of_class, num_classes), drawn)
            if enough
            else None
        )
        coverages.append(metrics.coverage(real, drawn) if enough else None)
    return {"class_distances": tuple(distances), "class_coverages": tuple(coverages)}
