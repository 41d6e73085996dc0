"""Inception's features, by torchmetrics and torch-fidelity.

Only a Frechet distance in these features is a FID (arXiv:1706.08500). torch-fidelity needs a
torchvision that fits torch, and the weights are a download of 100 MB, so both are optional.
"""

import hashlib
import importlib
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from fedphd.common.errors import ConfigError

NUM_FEATURES = 2048
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_INSTALL = 'pip install "fedphd[inception]", with the torchvision that belongs to your torch'


class Inception(nn.Module):
    """Inception v3 as FID uses it: (N, C, H, W), uint8, to features, (N, 2048), float32.

    Grey images are shown in all three colours. ``weights`` is a file with the state dict of
    torch-fidelity's Inception; None lets torch-fidelity download it.

    Raises:
        ConfigError: torch-fidelity is missing, or the weights are missing or unreadable.
    """

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        check_installed()
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            with _weights_only():
                self.network: Any = NoTrainInceptionV3(
                    name="inception-v3-compat",
                    features_list=[str(NUM_FEATURES)],
                    feature_extractor_weights_path=None if weights is None else str(weights),
                )
        except (URLError, OSError, RuntimeError, pickle.UnpicklingError, TypeError) as error:
            raise ConfigError(_why_not(weights, error)) from error

    def forward(self, images: Tensor) -> Tensor:
        """Features of ``images``, (N, 2048)."""
        if images.shape[1] not in (1, 3):
            raise ConfigError(
                f"images have {images.shape[1]} channels, Inception takes 1 or 3; set "
                "evaluation.features to classifier"
            )
        features: Tensor = self.network(images.expand(-1, 3, -1, -1))
        return features

    def scores(self, features: Tensor) -> Tensor:
        """Scores of ImageNet's classes without bias, (N, 1008), as the Inception score takes."""
        scores: Tensor = features @ self.network.fc.weight.T
        return scores


def check_installed() -> None:
    """Raise ConfigError unless torch-fidelity can be imported."""
    try:
        importlib.import_module("torch_fidelity")
    except (ImportError, RuntimeError) as error:
        # RuntimeError comes from a torchvision that was built for another torch.
        raise ConfigError(
            f"evaluation.features asks for Inception, which needs torch-fidelity ({error}): "
            f"{_INSTALL}; or set evaluation.features to classifier"
        ) from error


def check_weights(path: Path | None, sha256: str | None) -> None:
    """Raise ConfigError if the weights file is missing, or has another SHA-256 (hexadecimal).

    A ``path`` of None means that there is nothing to check; a ``sha256`` of None takes any file.
    """
    if path is None:
        return
    if not path.is_file():
        raise ConfigError(
            f"evaluation.inception_weights = {path}: no such file; name torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth"
        )
    if sha256 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise ConfigError(
            f"evaluation.inception_weights = {path} has SHA-256 {found}, but "
            f"evaluation.inception_sha256 = {sha256}; get the file again, or correct the hash"
        )


def inception_of(state: Mapping[str, Tensor]) -> Inception:
    """The network with ``state``, as a peer sent it; raises ConfigError as ``Inception`` does."""
    # torch-fidelity takes weights only from a file. It holds nothing but tensors, so that no peer
    # can have anything unpickled here.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save({name: tensor.clone() for name, tensor in state.items()}, path)
        return Inception(path)


def _why_not(weights: Path | None, error: Exception) -> str:
    if weights is None:
        return (
            f"Inception's weights could not be downloaded ({error}); without network set "
            "evaluation.inception_weights to a local copy of torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth, or evaluation.features to classifier"
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"evaluation.inception_weights = {weights} does not hold Inception's weights ({reason}); "
        "use torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
    )


@contextmanager
def _weights_only() -> Iterator[None]:
    """Have torch.load refuse anything but tensors: a pickle in a weights file could run code.

    torch-fidelity has no argument for it, so the environment variable that torch reads is set.
    """
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before
