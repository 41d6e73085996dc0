"""Images that a network generates, and the files that they are written to."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.files import replaced
from fedphd.common.rng import generator
from fedphd.common.unet.arithmetic import Arithmetic
from fedphd.common.unet.model import PrunedUNet, UNet2DModel, UNet2DOutput
from fedphd.common.working import Steps

SAMPLER = "DDIM, eta 0, no clipping"
_READABLE_SIZE = 48
_LEAST_GAP = 2
# Of an image: less of it, and neighbours run into one another where a page makes them small.
_GAP_SHARE = 8
_GAP_GREY = 128
_MOST_ROWS = 32


class _Pipeline(DDIMPipeline):
    """One that counts its ``steps`` for whoever listens, and draws no bar of its own."""

    steps: Steps

    def progress_bar(self, iterable: Iterable[Any], total: int | None = None) -> Iterator[Any]:
        """Yield the items; each counts as done when the next is asked."""
        for item in iterable:
            yield item
            self.steps.advance()


def sample_images(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    *,
    num: int,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    labels: Tensor | None = None,
    guidance: float = 1.0,
    bf16: bool = False,
) -> Tensor:
    """Generate images by deterministic DDIM (eta = 0; Eq. 12 of arXiv:2010.02502).

    They are (num, C, H, W), uint8, on the CPU. Image i starts from noise drawn for (seed, i), so
    neither the batch size nor the number of images changes it, and networks are compared on the
    same noise.

    Args:
        unet: predicts the noise; left as it was, on its own device and in its own mode.
        scheduler: the forward process that it was trained with.
        steps: DDIM steps, at most the scheduler's.
        labels: classes of the images, (num,), int64, that a class-conditional network is told.
        guidance: how far away from what it predicts without them; 1: it is told, and no more.
        bf16: the network predicts in bfloat16; all else is float32.

    Raises:
        ConfigError: ``steps`` exceeds the diffusion steps.
        FedPhDError: the network returns values that are not finite.
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
    # A copy, since moving a module happens in place and would take the caller's weights along.
    local = network if network.device == device else copy.deepcopy(network).to(device)
    # diffusers clips the predicted image but continues with the unclipped noise, which costs
    # quality on images with many black or white pixels; the published sampler does not clip.
    sampler = DDIMScheduler.from_config(forward_process, clip_sample=False)
    local.eval()
    counted = Steps("sampling", steps * math.ceil(num / batch_size))
    try:
        batches = []
        for start in range(0, num, batch_size):
            indices = range(start, min(start + batch_size, num))
            told: Any = _InBf16(local) if bf16 else local
            if labels is not None:
                told = _Told(told, labels[indices.start : indices.stop].to(device), guidance)
            pipeline: Any = _Pipeline(told, sampler)
            pipeline.steps = counted
            batches.append(_sample_batch(pipeline, indices, steps, seed))
    finally:
        network.train(was_training)
    return torch.cat(batches)


class _Told(nn.Module):
    """A class-conditional network as a pipeline calls it, which says nothing of classes.

    ``labels`` are those of the images in the pipeline's batch, (B,), int64.
    """

    def __init__(self, unet: "PrunedUNet | _InBf16", labels: Tensor, guidance: float) -> None:
        super().__init__()
        self._unet, self._labels, self._guidance = unet, labels, guidance
        # What pipelines ask a network for.
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        """The predicted noise, (B, C, H, W)."""
        if self._guidance == 1:
            output: UNet2DOutput = self._unet(sample, timestep, self._labels)
            return output
        nothing = torch.full_like(self._labels, self._unet.no_label or 0)
        both = self._unet(
            torch.cat([sample, sample]), timestep, torch.cat([nothing, self._labels])
        ).sample
        without, told = both.chunk(2)
        # Eq. 6 of arXiv:2207.12598 with 1 + w = guidance, as diffusers' pipelines have it.
        return UNet2DOutput(sample=without + self._guidance * (told - without))


class _InBf16(nn.Module):
    """A network that predicts in bfloat16 and answers in float32."""

    def __init__(self, unet: PrunedUNet) -> None:
        super().__init__()
        self._unet, self._arithmetic = unet, Arithmetic(unet.device, bf16=True)
        self.no_label = unet.no_label
        # What pipelines ask a network for.
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, sample: Tensor, timestep: Tensor, *labels: Tensor) -> UNet2DOutput:
        """The predicted noise, (B, C, H, W)."""
        with self._arithmetic():
            predicted = self._unet(self._arithmetic.arranged(sample), timestep, *labels).sample
        return UNet2DOutput(sample=predicted.float())


def spread_labels(num: int, distribution: Sequence[float]) -> Tensor:
    """Labels of ``num`` images that follow ``distribution``, (num_classes,), as near as possible.

    They are (num,), int64. Label i is the same for every ``num``: that of the class which falls
    shortest of its share in the first i + 1 images.
    """
    shares = torch.tensor(distribution, dtype=torch.float64)
    labels, counts = torch.empty(num, dtype=torch.int64), torch.zeros_like(shares)
    for index in range(num):
        labels[index] = chosen = int((shares * (index + 1) - counts).argmax())
        counts[chosen] += 1
    return labels


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
    # A cast to uint8 would turn NaN into plausible pixels.
    if not bool(images.isfinite().all()):
        raise FedPhDError(
            "the network's samples are not finite: training diverged; lower "
            "training.learning_rate and start again from an earlier checkpoint"
        )
    # The pipeline's images are in [0, 1].
    return (images * 255).round().to(torch.uint8).cpu()


def save_grid(images: Tensor, path: Path, rows: int) -> None:
    """Write the first ``rows`` x ``rows`` images as one PNG; its folder is made if it is missing.

    They are (N, C, H, W), uint8, C of 1 (grey), 3 (RGB) or 4 (RGBA). Every pixel of an image
    smaller than 48 pixels becomes a square block, so that the image is at least 48 wide. Gaps of
    an eighth of an image, and places without one, are grey. A reader sees the old file or the new
    one, never a part.

    Raises:
        OSError: the file cannot be written.
    """
    canvas = _grid(images[: rows * rows], rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as beside:
        _picture(canvas).save(beside, "PNG")


def save_samples(images: Tensor, out: Path) -> list[Path]:
    """Write one grid to ``out`` if that ends in .png, else a grid and single PNGs into it.

    A folder is made if it is missing. A grid shows at most 32 x 32 of ``images``, (N, C, H, W),
    uint8.

    Returns:
        Paths of the grid and then of the single images.

    Raises:
        ConfigError: it cannot be written there.
    """
    single = out.suffix.lower() != ".png"
    grid = out / "grid.png" if single else out
    written = [grid]
    try:
        save_grid(images, grid, min(_MOST_ROWS, math.ceil(math.sqrt(len(images)))))
        for index, image in enumerate(images if single else ()):
            written.append(out / f"{index:05d}.png")
            _picture(image.permute(1, 2, 0).numpy()).save(written[-1])
    except OSError as error:
        raise ConfigError(f"--out = {out}: cannot be written: {error.strerror}") from error
    return written


def _grid(images: Tensor, columns: int) -> NDArray[np.uint8]:
    """Images in rows of ``columns`` with grey gaps, (height, width, C), uint8."""
    _, channels, size, _ = images.shape
    scale = -(-_READABLE_SIZE // size)
    tiles = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).cpu()
    tile = size * scale
    gap = max(_LEAST_GAP, tile // _GAP_SHARE)
    pitch = tile + gap
    side = columns * pitch + gap
    canvas = np.full((side, side, channels), _GAP_GREY, dtype=np.uint8)
    for index, pixels in enumerate(tiles.numpy()):
        top = gap + index // columns * pitch
        left = gap + index % columns * pitch
        canvas[top : top + tile, left : left + tile] = pixels
    return canvas


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """Pixels, (height, width, C), as a picture; Pillow knows grey only without the third axis."""
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
