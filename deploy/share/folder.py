"""A folder that shares a run's network: diffusers opens it, people read its card."""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors import SafetensorError

from fedphd.common.config.evaluation import usual_steps
from fedphd.common.data.partition import PARTITION_FILE
from fedphd.common.errors import ConfigError
from fedphd.common.history.progress import Progress
from fedphd.common.history.summary import Summary
from fedphd.common.quality.sampling import sample_images, save_grid
from fedphd.common.quality.stored_run import StoredRun
from fedphd.common.unet.checkpoint import checkpoint_of
from fedphd.common.unet.model import PrunedUNet, plain_unet
from fedphd.deploy.launch.client_data import part_of_data
from fedphd.deploy.launch.resuming import holds_run, stored_config, stored_data
from fedphd.deploy.share.card import KNOWN_DATA, Card, Data, WeightsName
from fedphd.deploy.share.onnx_network import check_onnx, write_onnx
from fedphd.deploy.share.places import CARD, INDEX, ONNX, SAMPLES, SCHEDULER, UNET

_ROWS, _SEED, _BATCH_SIZE = 8, 0, 64


@dataclass(frozen=True)
class Choices:
    """What of a run is shared, and what its card says that the run does not know.

    Attributes:
        weights: the moving average, or the raw weights.
        onnx: write the network as an ONNX file too.
        name: of the model on the hub, such as ``user/model``.
        license: of the weights, as the hub names it.
        dataset: the clients' data set, as people may know it.
        device: where the samples are drawn.
    """

    weights: WeightsName = "averaged"
    onnx: bool = False
    name: str | None = None
    license: str | None = None
    dataset: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        own_class: the network needs this package's class: it is pruned, or class-conditional.
        onnx_difference: the largest between ONNX Runtime's output and torch's; None without ONNX.
        done, intervals: cloud rounds of the run, so far and in all.
        is_measured: whether the run has measured these weights.
    """

    folder: Path
    own_class: bool
    onnx_difference: float | None
    done: int
    intervals: int
    is_measured: bool


def export_run(run: Path, out: Path, choices: Choices) -> Exported:
    """Write the network of a run's folder, or of its checkpoint, into a new folder ``out``.

    Everything is written beside it first, so a new ``out`` is whole or not there.

    Raises:
        ConfigError: there is no whole checkpoint, ``out`` has something in it or cannot be
            written, or the extra ``onnx`` is asked for and missing.
        FedPhDError: the samples are not finite, or ONNX Runtime gives other numbers than torch.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out = {out}: is there already; name a new folder, or remove it")
    if choices.onnx:
        check_onnx()
    checkpoint = checkpoint_of(run)
    # First, since it knows best what to say where there is none.
    stored = StoredRun.load(checkpoint, "ema" if choices.weights == "averaged" else "raw")
    # Of the weights' interval, though the run may have done another by now.
    progress = Progress.of(stored.state, checkpoint)
    beside = out.with_name(f".{out.name}.new")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        exported = _write(beside, run, stored, progress, choices)
        if out.exists():
            # It may be where the user is.
            for part in beside.iterdir():
                part.rename(out / part.name)
        else:
            beside.rename(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"--out = {out}: cannot be written: {error}; make room, or name another folder"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return replace(exported, folder=out)


def _write(
    folder: Path, run: Path, stored: StoredRun, progress: Progress, choices: Choices
) -> Exported:
    """Fill ``folder`` with the network of ``run``."""
    unet = plain_unet(stored.unet)
    own_class = isinstance(unet, PrunedUNet)
    # As in evaluation: diffusers clips the image but not the noise, which costs quality.
    scheduler = DDIMScheduler.from_config(stored.scheduler.config, clip_sample=False)
    unet.save_pretrained(folder / UNET)
    # safetensors leaves its files to their owner alone; this folder is for others.
    for weights in (folder / UNET).glob("*.safetensors"):
        shutil.copymode(folder / UNET / "config.json", weights)
    scheduler.save_pretrained(folder / SCHEDULER)
    kind = type(unet)
    index = {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": diffusers.__version__,
        UNET: [kind.__module__ if own_class else "diffusers", kind.__name__],
        SCHEDULER: ["diffusers", "DDIMScheduler"],
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    steps = usual_steps(int(scheduler.config["num_train_timesteps"]))
    images = sample_images(
        unet,
        stored.scheduler,
        num=_ROWS**2,
        steps=steps,
        batch_size=_BATCH_SIZE,
        seed=_SEED,
        device=choices.device,
    )
    save_grid(images, folder / SAMPLES, _ROWS)
    difference = write_onnx(unet, scheduler, folder / ONNX) if choices.onnx else None
    card = Card(
        config=stored.config({}),
        progress=progress,
        data=data_of(run, choices.dataset),
        weights=choices.weights,
        own_class=own_class,
        name=choices.name,
        license=choices.license,
        num_samples=len(images),
        steps=steps,
        seed=_SEED,
        onnx=choices.onnx,
        trained_by=_version_of(run),
    )
    (folder / CARD).write_text(card.text(), "utf-8")
    return Exported(
        folder, own_class, difference, progress.interval, progress.intervals, card.is_measured
    )


def folder_of(run: Path) -> Path:
    """The folder of the run in ``run``, which may be its checkpoint."""
    if checkpoint_of(run) != run:
        return run
    # Checkpoints of former intervals lie one folder deeper.
    return next(filter(holds_run, run.resolve().parents[:2]), run)


def _version_of(run: Path) -> str | None:
    """The version of this package that did the run in ``run``, once that has ended."""
    try:
        return Summary.read(folder_of(run)).fedphd_version
    except (OSError, ValueError):
        return None


def data_of(run: Path, named: str | None) -> Data:
    """What may be said of the images of the run in ``run``: less where each client had its own.

    ``run`` may be its checkpoint; ``named`` is the data set's name that the user gives.
    """
    run = folder_of(run)
    try:
        content = json.loads((run / PARTITION_FILE).read_text("utf-8"))
        part = part_of_data(stored_config(run), 0, stored_data(run))
    except (OSError, ValueError, ConfigError):
        return Data(named)
    assert part.partition is not None
    # The name of a local data set, in front of the split's, may tell whose it is.
    kind = part.partition.kind
    rest = str(content["name"]).rpartition(f"-{kind}-")[2]
    known = part.source if part.source in KNOWN_DATA else None
    return Data(named or known, f"{kind}-{rest}", tuple(content["sizes"]))
