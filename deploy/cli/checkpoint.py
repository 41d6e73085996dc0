"""``fedphd evaluate`` and ``fedphd sample``: measure a run's checkpoint, or draw images from it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from fedphd.common.config.evaluation import check_steps, usual_steps
from fedphd.common.config.roles import CloudConfig, DeviceName
from fedphd.common.errors import ConfigError
from fedphd.common.history.events import Evaluated
from fedphd.deploy.cli.bars import bar
from fedphd.deploy.cli.flags import Set, overrides, say
from fedphd.deploy.launch.render import render

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES, SEED, BATCH_SIZE = 64, 0, 256
Folder = Annotated[Path, Argument(metavar="CHECKPOINT", help="a run's folder, or its checkpoint/")]
# Image formats that people may expect, but that samples are not written in.
_OTHER_IMAGES = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
Weights = Annotated[
    Literal["ema", "raw"], Option(help="averaged (ema) or raw weights", show_default=True)
]
Device = Annotated[DeviceName, Option(help="where networks run; auto is CUDA where there is one")]


def evaluate(
    checkpoint: Folder,
    reference: Annotated[
        str | None,
        Option(
            help="what to compare with: a statistics file (.safetensors), digits, a Hugging Face "
            "name or a local data set",
            show_default="the run's own",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        Option(metavar="N", min=2, help="generated images", show_default="the run's own"),
    ] = None,
    steps: Annotated[
        int | None, Option(metavar="N", min=1, help="DDIM steps", show_default="the run's own")
    ] = None,
    seed: Annotated[
        int | None,
        Option(metavar="N", min=0, help="seed of the sampling noise", show_default="the run's own"),
    ] = None,
    weights: Weights = "ema",
    device: Device = "auto",
    settings: Set = None,
    as_json: Annotated[
        bool, Option("--json", help="print all numbers as JSON", show_default=False)
    ] = False,
) -> None:
    """Sample a checkpoint's network and measure the samples against a reference.

    It measures as the run did, unless flags or --set evaluation.KEY=VALUE change that.
    """
    from fedphd.common.quality.stored_run import StoredRun
    from fedphd.common.unet.checkpoint import checkpoint_of
    from fedphd.common.unet.model import resolve_device

    checkpoint = checkpoint_of(checkpoint)
    run = StoredRun.load(checkpoint, weights)
    given = {"num_samples": samples, "sampling_steps": steps, "seed": seed}
    flags = {f"evaluation.{key}": value for key, value in given.items()}
    config = run.config(run.reference_changes(reference) | overrides(flags, settings))
    taken = config.evaluation.sampling_steps
    # As the run did is right, whatever that was.
    if taken != run.config({}).evaluation.sampling_steps:
        check_steps(taken, config.diffusion.num_train_timesteps, "--steps (sampling_steps)")
    cache = CloudConfig().out_dir / ".cache"
    with bar("evaluating"):
        result = run.evaluate(config, cache_dir=cache, device=resolve_device(device))
    record = result.record(run.state.get("interval"))
    if as_json:
        of = {"checkpoint": str(checkpoint), "weights": weights}
        say(json.dumps(of | record.model_dump(mode="json"), indent=2))
        return
    named = {"node": weights, "what": str(checkpoint), "weights": weights}
    say(str(render(Evaluated(**named, **record.model_dump()))))
    say(
        f"          sampler {record.sampler}, seed {record.seed}; reference of "
        f"{record.num_reference_images} images, SHA-256 {record.reference_sha256}"
    )


def sample(
    checkpoint: Folder,
    num: Annotated[int, Option(metavar="N", min=1, help="images")] = SAMPLES,
    out: Annotated[
        Path,
        Option(
            help="FILE.png for one grid; a folder for single PNGs and a grid",
            show_default="samples.png",
        ),
    ] = Path("samples.png"),
    steps: Annotated[
        int | None,
        Option(
            metavar="N",
            min=1,
            help="DDIM steps",
            show_default="50, or what a shorter diffusion has",
        ),
    ] = None,
    seed: Annotated[
        int,
        Option(metavar="N", min=0, help="seed of the noise; image i depends only on it and on i"),
    ] = SEED,
    label: Annotated[
        int | None,
        Option(
            "--class",
            metavar="N",
            min=0,
            help="draw this class; of a class-conditional network",
            show_default="all in turn",
        ),
    ] = None,
    guidance: Annotated[
        float,
        Option(
            metavar="X",
            min=0,
            max=100,
            help="classifier-free guidance towards the class; 1: none, more: clearer, less varied",
        ),
    ] = 1.0,
    weights: Weights = "ema",
    device: Device = "auto",
) -> None:
    """Generate images with a checkpoint's network."""
    from fedphd.common.quality.sampling import sample_images, save_samples
    from fedphd.common.quality.stored_run import StoredRun
    from fedphd.common.unet.checkpoint import checkpoint_of
    from fedphd.common.unet.model import resolve_device

    if out.suffix.lower() in _OTHER_IMAGES and not out.is_dir():
        raise ConfigError(f"--out = {out}: images are written as PNG; name a .png file or a folder")
    run = StoredRun.load(checkpoint_of(checkpoint), weights)
    on, told = resolve_device(device), _told(run.unet.no_label, num, label, guidance)
    num_timesteps = int(run.scheduler.config["num_train_timesteps"])
    if steps is None:
        steps = usual_steps(num_timesteps)
    check_steps(steps, num_timesteps, "--steps")
    with bar("sampling"):
        images = sample_images(
            run.unet, run.scheduler, num=num, steps=steps, batch_size=BATCH_SIZE, seed=seed,
            device=on, labels=told, guidance=guidance,
        )  # fmt: skip
    written = save_samples(images, out)
    single = f" and {len(written) - 1} single images" if len(written) > 1 else ""
    say(f"wrote {written[0]}{single}: {num} images, {steps} DDIM steps, {weights} weights")


def _told(no_label: int | None, num: int, label: int | None, guidance: float) -> "Tensor | None":
    """The classes of ``num`` images, (num,), int64; None where the network knows no classes."""
    import torch

    from fedphd.common.quality.sampling import spread_labels

    if no_label is None:
        given = f"--class = {label}" if label is not None else f"--guidance = {guidance:g}"
        if label is not None or guidance != 1:
            raise ConfigError(
                f"{given}: this network was trained without classes; train one with "
                "--set model.class_conditional=true"
            )
        return None
    if label is None:
        return spread_labels(num, [1 / no_label] * no_label)
    if label >= no_label:
        raise ConfigError(
            f"--class = {label}: this network knows {no_label} classes; use 0 to {no_label - 1}"
        )
    return torch.full((num,), label)
