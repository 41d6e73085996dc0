"""What ``fedphd evaluate`` and ``fedphd sample`` do with a run's checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor

from fedphd.common.config.roles import validate
from fedphd.common.config.run import FederationConfig
from fedphd.common.config.text import with_overrides
from fedphd.common.data.images import LabelledImages
from fedphd.common.errors import ConfigError
from fedphd.common.quality.evaluation import Evaluation, Evaluator, sample_images, save_grid
from fedphd.common.quality.moments import STATISTICS_FILE
from fedphd.common.quality.reference import Reference, reference_of_file, reference_of_images
from fedphd.common.unet.checkpoint import load_checkpoint
from fedphd.common.unet.model import PrunedUNet, unet_config

Weights = Literal["ema", "raw"]
_BATCH_SIZE = 256
_MOST_ROWS = 32


@dataclass(frozen=True)
class Checkpoint:
    """One network of a checkpoint, and what is known about its run.

    Attributes:
        folder: where it lies.
        unet: the network with the chosen weights.
        scheduler: the forward process that it was trained with.
        state: the content of ``state.json``.
    """

    folder: Path
    unet: PrunedUNet
    scheduler: DDPMScheduler
    state: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, weights: Weights) -> Checkpoint:
        """Read a checkpoint; raises ConfigError if it is not there, or not whole."""
        raw, averaged, scheduler, state = load_checkpoint(folder)
        return cls(folder, averaged if weights == "ema" else raw, scheduler, state)

    def config(self, changes: dict[str, Any]) -> FederationConfig:
        """The run's configuration with ``changes`` (dotted keys); raises ConfigError."""
        values = self.state.get("config")
        if not isinstance(values, dict):
            raise ConfigError(
                f"checkpoint {self.folder}: state.json holds no configuration of its run; use a "
                "checkpoint that fedphd wrote"
            )
        source = f"checkpoint {self.folder}"
        return validate(FederationConfig, with_overrides(values, changes), source=source)


def reference_changes(checkpoint: Checkpoint, reference: str | None) -> dict[str, Any]:
    """The settings that make ``reference`` the reference: a statistics file, or a data set.

    Without one it is the run's own; where the clients made that, the run's folder has it.
    """
    if reference is None:
        own = checkpoint.folder.resolve().parent / STATISTICS_FILE
        if checkpoint.config({}).evaluation.reference_clients:
            return _only(reference_file=str(own))
        return {}
    if reference.endswith(".safetensors"):
        return _only(reference_file=reference)
    return _only(reference={"source": reference})


def _only(**given: Any) -> dict[str, Any]:
    unset = {"reference": None, "reference_file": None, "reference_clients": False}
    return {f"evaluation.{name}": value for name, value in (unset | given).items()}


def evaluate_checkpoint(
    checkpoint: Checkpoint, config: FederationConfig, *, cache_dir: Path, device: torch.device
) -> Evaluation:
    """Sample the checkpoint's network and measure the samples as ``config`` says.

    Raises:
        ConfigError: there is no reference, it cannot be read, or its images have other classes or
            another shape than the network's.
    """
    reference = _reference(checkpoint, config, cache_dir=cache_dir, device=device)
    evaluator = Evaluator(config.evaluation, reference, device=device)
    return evaluator.evaluate(checkpoint.unet, checkpoint.scheduler)


def _reference(
    checkpoint: Checkpoint, config: FederationConfig, *, cache_dir: Path, device: torch.device
) -> Reference:
    evaluation = config.evaluation
    if evaluation.reference_file is not None:
        return reference_of_file(evaluation, evaluation.reference_file, device=device)
    if evaluation.reference is None:
        raise ConfigError(
            f"checkpoint {checkpoint.folder}: its run had no reference to compare with; name a "
            "data set or a statistics file by --reference"
        )
    data = LabelledImages(evaluation.reference)
    data.check_covers(config.num_classes)
    shape = unet_config(checkpoint.unet)
    images = data.decode(image_size=shape["image_size"], channels=shape["channels"])
    return reference_of_images(evaluation, images, cache_dir=cache_dir, device=device)


def sample_checkpoint(
    checkpoint: Checkpoint, *, num: int, steps: int, seed: int, device: torch.device
) -> Tensor:
    """Images (num, C, H, W), uint8, that the checkpoint's network generates."""
    return sample_images(
        checkpoint.unet,
        checkpoint.scheduler,
        num=num,
        steps=steps,
        batch_size=_BATCH_SIZE,
        seed=seed,
        device=device,
    )


def save_samples(images: Tensor, out: Path) -> list[Path]:
    """Write a grid to ``out`` if that ends in .png, or else single PNGs and a grid into it.

    Args:
        images: (N, C, H, W), uint8.
        out: a file or a folder, which is made; a grid shows at most 32 x 32 images.

    Returns:
        The grid, and then the single images.

    Raises:
        ConfigError: it cannot be written there.
    """
    single = out.suffix.lower() != ".png"
    grid = out / "grid.png" if single else out
    rows = min(_MOST_ROWS, math.ceil(math.sqrt(len(images))))
    written = [grid]
    try:
        save_grid(images, grid, rows)
        for index, image in enumerate(images if single else ()):
            path = out / f"{index:05d}.png"
            pixels = image.permute(1, 2, 0).numpy()
            Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path)
            written.append(path)
    except OSError as error:
        raise ConfigError(f"--out = {out}: cannot be written: {error.strerror}") from error
    return written
