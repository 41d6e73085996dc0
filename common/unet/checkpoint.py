"""A run's checkpoint: a folder that diffusers opens, replaced as a whole or not at all.

The averaged weights, ``PrunedUNet.from_pretrained(folder, subfolder="unet_ema")``, are the better
ones to sample with: ``DDIMPipeline.from_pretrained(folder, unet=...)``. Without ``unet`` the
pipeline has the raw weights of ``unet/``.
"""

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.files import replaced
from fedphd.common.unet.model import PrunedUNet, unet_config, unet_from_config

# In a run's folder.
CHECKPOINT = "checkpoint"
_UNET = "unet"
_UNET_EMA = "unet_ema"
_SCHEDULER = "scheduler"
_STATE = "state.json"
_CUT = "cut.json"
_VARIATE = "variate"
_HELD = "held"
_INDEX = "model_index.json"
_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
# A run that replaces its checkpoint so often while it is read does nothing else.
_TRIES = 5
_PIPELINE = {
    "_class_name": "DDIMPipeline",
    "_diffusers_version": diffusers.__version__,
    "unet": [PrunedUNet.__module__, PrunedUNet.__name__],
    "scheduler": ["diffusers", "DDIMScheduler"],
}


@dataclass(frozen=True)
class Extras:
    """What only a run that goes on needs.

    Attributes:
        cut: how the U-Net was cut, as JSON text of ``Cut.to_json``.
        variate: SCAFFOLD's, (numel,), float32.
        held: the weights that edges hold, (numel,), float32, where they get differences.
    """

    cut: str | None = None
    variate: Tensor | None = None
    held: Tensor | None = None

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {_VARIATE: self.variate, _HELD: self.held}
        return {name: vector for name, vector in named.items() if vector is not None}


def save_checkpoint(
    folder: Path,
    *,
    unet: PrunedUNet,
    ema_state: Mapping[str, Tensor],
    scheduler: DDPMScheduler,
    state: Mapping[str, Any],
    extras: Extras = Extras(),
    keep: int = 1,
) -> None:
    """Write ``folder``, or replace what is there.

    Everything is written and flushed beside it first. Then the old one is renamed away and the new
    one takes its place; whenever the process dies, ``load_checkpoint`` finds a whole one.

    The parent of ``folder`` is made if it is missing. ``ema_state`` is the averaged weights, with
    the names and shapes of ``unet``'s; ``state``, JSON values, goes into ``state.json``. With
    ``keep`` above 1 the former ones stay as ``<folder>s/interval-0004``, the last ``keep - 1``.

    Raises:
        FedPhDError: it could not be written, such as to a full disk; the old one is still there.
    """
    new, old = _beside(folder)
    averaged = unet_from_config(unet_config(unet))
    averaged.load_state_dict(dict(ema_state), assign=True)
    texts = {_STATE: json.dumps(state, indent=2), _INDEX: json.dumps(_PIPELINE, indent=2)}
    try:
        _finish_swap(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with ThreadPoolExecutor(max_workers=1) as pool:
            # At the same time, since nobody trains meanwhile.
            saved = pool.submit(_save_flushed, unet, new / _UNET)
            _save_flushed(averaged, new / _UNET_EMA)
            saved.result()
        scheduler.save_pretrained(new / _SCHEDULER)
        for name, text in texts.items():
            (new / name).write_text(text + "\n", "utf-8")
        if extras.cut is not None:
            (new / _CUT).write_text(extras.cut, "utf-8")
        for name, vector in extras.vectors.items():
            save_file({name: vector}, new / f"{name}.safetensors")
        _flush(*new.rglob("*"), new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise FedPhDError(
            f"checkpoint {folder} could not be written ({error}); the one before it, if any, is "
            "still there: make room, or make the folder writable"
        ) from error
    _put_away(old, folder, keep)


def _save_flushed(unet: PrunedUNet, folder: Path) -> None:
    unet.save_pretrained(folder)
    _flush(*folder.iterdir())


def _put_away(old: Path, folder: Path, keep: int) -> None:
    """Keep the former checkpoint among the last ones, or remove it."""
    former = _former(folder)
    if keep > 1 and old.is_dir():
        interval = int(_read_json(old / _STATE).get("interval", 0))
        # Later ones are of work that was given up when an earlier one was put back.
        for number, past in _numbered(folder):
            if number >= interval:
                shutil.rmtree(past, ignore_errors=True)
        former.mkdir(exist_ok=True)
        old.rename(former / f"interval-{interval:04d}")
    shutil.rmtree(old, ignore_errors=True)
    for past in kept_checkpoints(folder)[: -(keep - 1) or None]:
        shutil.rmtree(past, ignore_errors=True)


def update_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace ``state.json`` of a checkpoint; raises FedPhDError if it cannot be written."""
    try:
        with replaced(_whole(folder) / _STATE) as beside:
            beside.write_text(json.dumps(state, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise FedPhDError(
            f"checkpoint {folder}: {_STATE} could not be written ({error}); make room"
        ) from error


def read_state(folder: Path) -> dict[str, Any]:
    """The content of ``state.json``; raises ConfigError as ``load_checkpoint``."""
    return _read_json(_whole(folder) / _STATE)


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one, also after an interrupted swap."""
    return folder.is_dir() or _beside(folder)[1].is_dir()


def load_extras(folder: Path) -> Extras:
    """What ``save_checkpoint`` wrote beside the networks; raises ConfigError if it is damaged."""
    whole = _whole(folder)
    cut = whole / _CUT
    files = {name: whole / f"{name}.safetensors" for name in (_VARIATE, _HELD)}
    try:
        vectors = {name: load_file(path)[name] for name, path in files.items() if path.exists()}
        text = cut.read_text("utf-8") if cut.exists() else None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        names = ", ".join([_CUT, *(path.name for path in files.values())])
        raise ConfigError(
            f"checkpoint {folder}: one of {names} is damaged ({error}); {_way_out(folder)}"
        ) from error
    return Extras(text, vectors.get(_VARIATE), vectors.get(_HELD))


def load_checkpoint(
    folder: Path,
) -> tuple[PrunedUNet, PrunedUNet, DDPMScheduler, dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote, every bit of the weights as it was.

    Returns:
        The U-Net, the U-Net with averaged weights, the scheduler, and the content of
        ``state.json``. The weights lie in fresh memory: mapped from the file, as
        ``from_pretrained`` leaves them, they may be aligned so that sums round differently.

    All is of one interval, also where a run replaces the checkpoint meanwhile.

    Raises:
        ConfigError: there is no checkpoint, or a part is missing or damaged; names it.
    """
    for _ in range(_TRIES):
        before = _written(folder)
        try:
            loaded = _load(_checked(folder))
        except ConfigError:
            if _written(folder) == before:
                raise
        else:
            if _written(folder) == before:
                return loaded
    raise ConfigError(
        f"checkpoint {folder}: is replaced faster than it can be read; copy it, or wait for the "
        "run's end"
    )


def _load(whole: Path) -> tuple[PrunedUNet, PrunedUNet, DDPMScheduler, dict[str, Any]]:
    unet, averaged = _load_unet(whole / _UNET), _load_unet(whole / _UNET_EMA)
    config = _read_json(whole / _SCHEDULER / "scheduler_config.json")
    scheduler: DDPMScheduler = DDPMScheduler.from_config(config)
    return unet, averaged, scheduler, _read_json(whole / _STATE)


def _written(folder: Path) -> tuple[Path, Any, Any] | None:
    """Where a checkpoint lies, its interval and run; None where nobody can say."""
    try:
        whole = _whole(folder)
        state = _read_json(whole / _STATE)
    except ConfigError:
        return None
    return whole, state.get("interval"), state.get("run")


def check_holds_checkpoint(folder: Path) -> None:
    """Raise ConfigError where a run's folder, or a checkpoint's, has no checkpoint."""
    _checked(checkpoint_of(folder))


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint of a run's folder; any other folder is taken for a checkpoint itself."""
    inner = folder / CHECKPOINT
    # The old one lies alone where a process was killed between two renames.
    return inner if has_checkpoint(inner) else folder


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where the next checkpoint is written, and where the last one waits to be removed."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def _whole(folder: Path) -> Path:
    """Where a whole checkpoint lies, also after an interrupted swap; ConfigError if nowhere."""
    new, old = _beside(folder)
    if folder.is_dir():
        return folder
    # The old one is renamed away only once the new one is whole and on the disk.
    if old.is_dir():
        return new if new.is_dir() else old
    raise ConfigError(f"checkpoint {folder}: there is no such folder; name a run's folder")


def _checked(folder: Path) -> Path:
    """As ``_whole``, of a folder that is a checkpoint."""
    whole = _whole(folder)
    if not (whole / _STATE).exists() and not (whole / _UNET).exists():
        raise ConfigError(
            f"checkpoint {folder}: that folder holds none; name the folder of a run that has done "
            "an interval"
        )
    return whole


def _former(folder: Path) -> Path:
    """Where the checkpoints of the intervals before are."""
    return folder.with_name(f"{folder.name}s")


def kept_checkpoints(folder: Path) -> list[Path]:
    """Those of the intervals before that of ``folder``, in their order (``keep`` above 1)."""
    return [kept for _, kept in _numbered(folder)]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """``kept_checkpoints`` with the numbers of their intervals."""
    found = _former(folder).glob("interval-*")
    named = ((kept.name.removeprefix("interval-"), kept) for kept in found)
    # Somebody's copy, such as interval-0004.bak, is not ours to count or to remove.
    return sorted((int(number), kept) for number, kept in named if number.isdecimal())


def _way_out(part: Path) -> str:
    """What to do about a damaged part of a checkpoint."""
    for folder in (part, *part.parents):
        if folder.name == CHECKPOINT and (past := kept_checkpoints(folder)):
            return f"remove {folder} and put {past[-1]} in its place"
    return "use another checkpoint"


def _finish_swap(folder: Path) -> None:
    _, old = _beside(folder)
    if old.exists():
        if (whole := _whole(folder)) != folder:
            whole.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _load_unet(folder: Path) -> PrunedUNet:
    config = _read_json(folder / _CONFIG)
    try:
        # Building draws first weights, and the caller's random state must not move.
        with torch.random.fork_rng(devices=[]):
            unet = PrunedUNet(**{k: v for k, v in config.items() if not k.startswith("_")})
        unet.load_state_dict(load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"checkpoint {folder}: {_WEIGHTS} or {_CONFIG} is missing or damaged ({error}); "
            f"{_way_out(folder)}"
        ) from error
    return unet.eval()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"checkpoint file {path} is missing or damaged ({error}); {_way_out(path)}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"checkpoint file {path} holds no JSON object; {_way_out(path)}")
    return content


def _flush(*paths: Path) -> None:
    """Wait until files and folders are on the disk, and not only in the system's memory."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
