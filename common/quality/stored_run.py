"""A finished run's network, sampled and evaluated again from its checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from fedphd.common.config.roles import validate
from fedphd.common.config.run import FederationConfig
from fedphd.common.config.text import with_overrides
from fedphd.common.errors import ConfigError
from fedphd.common.quality.evaluation import Evaluation, Evaluator
from fedphd.common.quality.moments import STATISTICS_FILE
from fedphd.common.quality.reference import load_reference
from fedphd.common.unet.checkpoint import load_checkpoint
from fedphd.common.unet.model import PrunedUNet, unet_config


@dataclass(frozen=True)
class StoredRun:
    """One network of a run's checkpoint, and how the run was configured.

    ``scheduler`` is the forward process that it was trained with, ``state`` the content of
    ``state.json``.
    """

    checkpoint: Path
    unet: PrunedUNet
    scheduler: DDPMScheduler
    state: dict[str, Any]

    @classmethod
    def load(cls, checkpoint: Path, weights: Literal["ema", "raw"]) -> Self:
        """Read a checkpoint; raises ConfigError if it is missing or not whole."""
        raw, averaged, scheduler, state = load_checkpoint(checkpoint)
        return cls(checkpoint, averaged if weights == "ema" else raw, scheduler, state)

    def config(self, changes: dict[str, Any]) -> FederationConfig:
        """The run's configuration with ``changes`` (dotted keys); raises ConfigError."""
        values = self.state.get("config")
        source = f"checkpoint {self.checkpoint}"
        if not isinstance(values, dict):
            raise ConfigError(
                f"{source}: state.json holds no configuration of its run; use a checkpoint that "
                "fedphd wrote"
            )
        return validate(FederationConfig, with_overrides(values, changes), source=source)

    def reference_changes(self, reference: str | None) -> dict[str, Any]:
        """The settings that make ``reference`` the reference: a statistics file, or a data set.

        None is the run's own; where the clients computed that, the run's folder has it.
        """
        if reference is None:
            if not self.config({}).evaluation.reference_clients:
                return {}
            # Checkpoints of former intervals lie one folder deeper.
            beside, above = (self.checkpoint.resolve().parents[n] / STATISTICS_FILE for n in (0, 1))
            reference = str(above if above.exists() and not beside.exists() else beside)
        is_file = reference.endswith(".safetensors")
        return {
            "evaluation.reference": None if is_file else {"source": reference},
            "evaluation.reference_file": reference if is_file else None,
            "evaluation.reference_clients": False,
        }

    def evaluate(
        self, config: FederationConfig, *, cache_dir: Path, device: torch.device
    ) -> Evaluation:
        """Sample the network and measure the samples as ``config`` says.

        Raises:
            ConfigError: there is no reference, it cannot be read, or its images have other classes
                or another shape than the network's.
        """
        shape = unet_config(self.unet)
        reference = load_reference(
            config.evaluation,
            image_size=shape["image_size"],
            channels=shape["channels"],
            num_classes=config.num_classes,
            cache_dir=cache_dir,
            device=device,
        )
        if reference is None:
            raise ConfigError(
                f"checkpoint {self.checkpoint}: its run had no reference to compare with; name a "
                "data set or a statistics file by --reference"
            )
        classes = config.told_classes
        evaluator = Evaluator(config.measuring, reference, device, classes)
        return evaluator.evaluate(self.unet, self.scheduler)
