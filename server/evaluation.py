"""Samples of the global network and their distance from the reference data."""

from __future__ import annotations

import copy
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from fedphd.common.data import ImageSet
from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.rng import generator
from fedphd.common.settings import EvaluationConfig
from fedphd.server.features import ClassifierSettings, load_feature_classifier

logger = logging.getLogger(__name__)

NO_FEATURES = "none"
_READABLE_SIZE = 48
_SEPARATOR = 2
_SEPARATOR_GREY = 128


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation gave.

    Attributes:
        samples: generated images, (num_samples, C, H, W), uint8.
        frechet_distance: to the reference data in the named features; None without a reference.
            It is a FID only in Inception's features, so it is never called that.
        features: which features, such as ``classifier(digits)``; ``none`` without a reference.
        num_samples: generated images.
        sampling_steps: DDIM steps.
        seconds: wall time of sampling and measuring.
    """

    samples: Tensor
    frechet_distance: float | None
    features: str
    num_samples: int
    sampling_steps: int
    seconds: float


class Evaluator:
    """Samples networks and measures them against one reference data set.

    The feature classifier is trained, or read from the cache, when the evaluator is made, and
    the statistics of the reference data are computed then, once.

    Args:
        config: how much is sampled, and how.
        reference: data to compare with; None gives samples without a distance.
        cache_dir: folder of trained feature classifiers.
        device: where sampling and measuring run.

    Raises:
        ConfigError: there are fewer than 2 reference images.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        reference: ImageSet | None,
        *,
        cache_dir: Path,
        device: torch.device,
    ) -> None:
        self._config = config
        self._device = device
        self._metric: FrechetInceptionDistance | None = None
        self._image_shape: torch.Size | None = None
        self.features = NO_FEATURES
        if reference is not None:
            self._image_shape = reference.images.shape[1:]
            self._metric = self._measure(reference, cache_dir)
            # The last part only: a folder's full path is nobody else's business.
            source = config.reference.source if config.reference else "reference"
            self.features = f"classifier({Path(source).name})"

    def evaluate(self, unet: UNet2DModel, scheduler: DDPMScheduler) -> Evaluation:
        """Sample ``unet`` and measure the samples.

        Returns:
            The samples and, with a reference, their distance from it.

        Raises:
            ConfigError: the images of network and reference differ in shape, or there are more
                sampling steps than diffusion steps.
            FedPhDError: the network gives values that are not finite.
        """
        started = time.monotonic()
        config = self._config
        samples = sample_images(
            unet,
            scheduler,
            num=config.num_samples,
            steps=config.sampling_steps,
            batch_size=config.batch_size,
            seed=config.seed,
            device=self._device,
        )
        return Evaluation(
            samples=samples,
            frechet_distance=self.frechet_distance(samples),
            features=self.features,
            num_samples=config.num_samples,
            sampling_steps=config.sampling_steps,
            seconds=time.monotonic() - started,
        )

    def frechet_distance(self, images: Tensor) -> float | None:
        """Frechet distance of ``images``, (N >= 2, C, H, W), uint8, from the reference.

        Returns:
            The distance, or None without a reference.

        Raises:
            ConfigError: ``images`` are not shaped as the reference's.
        """
        if self._metric is None:
            return None
        if images.shape[1:] != self._image_shape:
            raise ConfigError(
                f"evaluation.reference has images of shape {tuple(self._image_shape or ())}, the "
                f"network's are {tuple(images.shape[1:])}; load the reference with "
                "model.image_size and model.channels"
            )
        try:
            self._update(self._metric, images, real=False)
            return float(self._metric.compute())
        finally:
            self._metric.reset()

    def _measure(self, reference: ImageSet, cache_dir: Path) -> FrechetInceptionDistance:
        """The metric, holding the statistics of the reference data."""
        extractor = load_feature_classifier(
            reference,
            ClassifierSettings(epochs=self._config.classifier_epochs),
            cache_dir=cache_dir,
            device=self._device,
        )
        metric = FrechetInceptionDistance(
            feature=extractor, reset_real_features=False, normalize=False
        ).to(self._device)
        self._update(metric, reference.images, real=True)
        return metric

    @torch.no_grad()
    def _update(self, metric: FrechetInceptionDistance, images: Tensor, *, real: bool) -> None:
        for batch in torch.split(images, self._config.batch_size):
            metric.update(batch.to(self._device), real=real)


def sample_images(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    *,
    num: int,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Tensor:
    """Generate images by deterministic DDIM (eta = 0; arXiv:2010.02502).

    Image i starts from noise drawn for (seed, i), so neither the batch size nor the number of
    images changes it, and networks are compared on the same noise.

    Args:
        unet: predicts the noise; left as it was, on its own device and in its own mode.
        scheduler: the forward process that it was trained with.
        num: images to generate.
        steps: DDIM steps, at most the scheduler's.
        batch_size: images generated at a time.
        seed: of the noise.
        device: where it runs.

    Returns:
        (num, C, H, W), uint8, on the CPU.

    Raises:
        ConfigError: ``steps`` exceeds the diffusion steps.
        FedPhDError: the network gives values that are not finite.
    """
    # Any: the base classes of diffusers' models and pipelines carry no types.
    network: Any = unet
    forward_process: Any = scheduler.config
    num_timesteps = forward_process["num_train_timesteps"]
    if steps > num_timesteps:
        raise ConfigError(
            f"evaluation.sampling_steps = {steps} exceeds diffusion.num_train_timesteps = "
            f"{num_timesteps}; use at most that many"
        )
    was_training = network.training
    local = network if network.device == device else copy.deepcopy(network).to(device)
    # diffusers clips the predicted image but goes on with the unclipped noise, which costs
    # quality on images with many black or white pixels; the published sampler does not clip.
    sampler = DDIMScheduler.from_config(forward_process, clip_sample=False)
    pipeline: Any = DDIMPipeline(local.eval(), sampler)
    pipeline.set_progress_bar_config(disable=True)
    try:
        batches = [
            _sample_batch(pipeline, range(start, min(start + batch_size, num)), steps, seed)
            for start in range(0, num, batch_size)
        ]
    finally:
        network.train(was_training)
    return torch.cat(batches)


def _sample_batch(pipeline: Any, indices: range, steps: int, seed: int) -> Tensor:
    images: Tensor
    (images,) = pipeline(
        batch_size=len(indices),
        generator=[generator("sample", seed, index) for index in indices],
        eta=0.0,
        num_inference_steps=steps,
        output_type="pt",
        return_dict=False,
    )
    if not bool(images.isfinite().all()):
        raise FedPhDError(
            "the network's samples are not finite: training diverged; lower "
            "training.learning_rate and start again from an earlier checkpoint"
        )
    # The pipeline's images are in [0, 1].
    return (images * 255).round().to(torch.uint8).cpu()


def save_grid(images: Tensor, path: Path, rows: int) -> None:
    """Write the first ``rows`` x ``rows`` images as one PNG, small images enlarged.

    Every pixel of an image smaller than 48 pixels becomes a square block, so that the image is
    at least 48 wide. The file is written beside and renamed: nobody sees half of it.

    Args:
        images: (N, C, H, W), uint8, C of 1 (grey), 3 (RGB) or 4 (RGBA).
        path: the PNG; its folder exists or is made.
        rows: rows and columns; fewer images leave the rest grey.

    Raises:
        OSError: the file cannot be written.
    """
    canvas = _grid(images[: rows * rows], rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        Image.fromarray(canvas.squeeze(2) if canvas.shape[2] == 1 else canvas).save(beside, "PNG")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _grid(images: Tensor, columns: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Images in rows of ``columns`` with separators, (height, width, C), uint8."""
    num, channels, size = images.shape[0], images.shape[1], images.shape[2]
    scale = -(-_READABLE_SIZE // size)
    tiles = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    pitch = size * scale + _SEPARATOR
    side = columns * pitch + _SEPARATOR
    canvas = np.full((side, side, channels), _SEPARATOR_GREY, dtype=np.uint8)
    for index in range(num):
        top = _SEPARATOR + index // columns * pitch
        left = _SEPARATOR + index % columns * pitch
        tile = tiles[index].permute(1, 2, 0).cpu().numpy()
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvas
