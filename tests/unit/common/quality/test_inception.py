"""Inception: what is missing is said before anything starts; with it, features and scores.

Its real weights are 100 MB from elsewhere. Where torch-fidelity is installed, a network with
random weights stands in for it: the same code, shapes and file format.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from fedphd.common.config.data import DataConfig
from fedphd.common.config.evaluation import EvaluationConfig
from fedphd.common.data.images import LabelledImages
from fedphd.common.errors import ConfigError
from fedphd.common.quality.evaluation import Evaluator
from fedphd.common.quality.extractor import inception_extractor, restore_extractor
from fedphd.common.quality.inception import Inception, check_installed, check_weights
from fedphd.common.quality.moments import FeatureStatistics
from fedphd.common.quality.reference import Reference, check_features
from fedphd.common.rng import generator
from fedphd.common.wire.messages import ExtractorSpec

CPU = torch.device("cpu")
HUB = "torch_fidelity.feature_extractor_inceptionv3"


def test_without_torch_fidelity_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for ask in (
        check_installed,
        lambda: Inception(None),
        lambda: check_features(EvaluationConfig(features="inception")),
    ):
        with pytest.raises(ConfigError, match=r'pip install "fedphd\[inception\]"'):
            ask()


def test_weights_must_be_there_and_be_the_ones_that_are_meant(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(ConfigError, match=r"inception_weights = .*weights.pth: no such file"):
        check_weights(path, None)
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    check_weights(path, None)
    check_weights(path, digest.upper())
    check_weights(None, None)
    with pytest.raises(ConfigError, match=rf"has SHA-256 {digest}, but .*inception_sha256 = 00"):
        check_weights(path, "00" * 32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity's, with random weights."""
    try:
        hub: Any = importlib.import_module(HUB)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported here: {error}")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    kind = hub.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "load_state_dict_from_url", lambda *args, **more: {})
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network = kind("random", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def images(num: int = 3, channels: int = 3) -> torch.Tensor:
    shape = (num, channels, 16, 16)
    return torch.randint(0, 256, shape, generator=generator("inception-test")).to(torch.uint8)


def test_features_and_scores_of_colour_and_grey_images(weights: Path) -> None:
    network = Inception(weights)
    features = network(images())
    assert features.shape == (3, 2048)
    assert network.scores(features).shape == (3, 1008)
    grey = images(channels=1)
    assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ConfigError, match="images have 2 channels, Inception takes 1 or 3"):
        network(images(channels=2))


def test_an_extractor_sent_to_a_peer_gives_the_same_features(weights: Path) -> None:
    sent = inception_extractor(Inception(weights))
    spec = ExtractorSpec.model_validate_json(sent.spec.model_dump_json())
    got = restore_extractor(spec, sent.weights())
    assert got.fingerprint() == sent.fingerprint()
    assert torch.equal(got.network(images()), sent.network(images()))
    assert (got.spec.name, got.image_shape) == ("inception-v3", None)


class Unwelcome:
    """What a file must not get to do when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unwelcome",)


def test_a_weights_file_is_never_executed(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Unwelcome()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match=r"evil.pth does not hold Inception's weights"):
        Inception(tmp_path / "evil.pth")
    assert not (tmp_path / "unwelcome").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other.pth does not hold Inception's weights"):
        Inception(tmp_path / "other.pth")


def test_without_network_the_download_ends_in_a_fix(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: object, **more: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(f"{HUB}.load_state_dict_from_url", offline)
    with pytest.raises(ConfigError, match=r"not be downloaded .*set evaluation.inception_weights"):
        Inception(None)


def test_an_evaluation_in_inceptions_features_has_a_score(weights: Path) -> None:
    extractor = inception_extractor(Inception(weights))
    data = LabelledImages(DataConfig()).decode(image_size=8, channels=1).subset(torch.arange(6))
    features = extractor.features(data.images, batch_size=6, device=CPU)
    statistics = FeatureStatistics.of(features, data.labels, 10)
    reference = Reference(extractor, statistics, features, None, (1, 8, 8))
    config = EvaluationConfig(inception_weights=weights)
    quality = Evaluator(config, reference, device=CPU).measure(data.images)
    assert quality.frechet_distance == pytest.approx(0, abs=1e-3)
    assert quality.inception_score is not None
    assert quality.inception_score >= 1
    assert (quality.precision, quality.recall) == (1, 1)
    assert quality.class_shares is None
