from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from fedphd.common.config.data import DataConfig
from fedphd.common.config.evaluation import EvaluationConfig
from fedphd.common.config.run import DiffusionConfig, ModelConfig
from fedphd.common.data.images import ImageSet, LabelledImages
from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.history.evaluation import Protocol, Quality
from fedphd.common.quality.classifier import (
    ClassifierSettings,
    FeatureClassifier,
    load_feature_classifier,
    train_classifier,
)
from fedphd.common.quality.evaluation import Evaluator
from fedphd.common.quality.extractor import Extractor
from fedphd.common.quality.moments import FeatureStatistics
from fedphd.common.quality.reference import Reference, reference_of_images
from fedphd.common.quality.sampling import sample_images, save_grid
from fedphd.common.rng import generator
from fedphd.common.unet.model import PrunedUNet, build_scheduler, build_unet
from fedphd.common.wire.messages import ExtractorSpec

CPU = torch.device("cpu")
SMALL = ModelConfig(block_out_channels=(8, 8), attention_head_dim=8, norm_num_groups=4)
DIGITS = LabelledImages(DataConfig()).decode(image_size=8, channels=1)
FEW = DIGITS.subset(torch.arange(60))
QUICK = ClassifierSettings(epochs=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, and no waiting for cores that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def global_generator_stays_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that already holds the classifier that all 1797 digits give."""
    folder = tmp_path_factory.mktemp("classifiers")
    settings = ClassifierSettings(epochs=EvaluationConfig().classifier_epochs)
    load_feature_classifier(DIGITS, settings, cache_dir=folder, device=CPU)
    return folder


@pytest.fixture
def unet() -> PrunedUNet:
    return build_unet(SMALL, seed=0)


def sample(unet: nn.Module, num: int = 5, batch_size: int = 5, **changes: int) -> torch.Tensor:
    settings = {"steps": 3, "seed": 7} | changes
    return sample_images(
        unet,
        build_scheduler(DiffusionConfig()),
        num=num,
        batch_size=batch_size,
        device=CPU,
        **settings,
    )


def evaluator_of(
    config: EvaluationConfig, reference: ImageSet | None, cache_dir: Path
) -> Evaluator:
    if reference is None:
        return Evaluator(config, None, device=CPU)
    made = reference_of_images(config, reference, cache_dir=cache_dir, device=CPU)
    return Evaluator(config, made, device=CPU)


def noise_images(num: int, *shape: int) -> torch.Tensor:
    numbers = torch.randint(0, 256, (num, *shape), generator=generator("noise-images"))
    return numbers.to(torch.uint8)


def test_an_image_depends_on_its_index_only(unet: PrunedUNet) -> None:
    at_once = sample(unet)
    assert at_once.shape == (5, 1, 8, 8)
    assert at_once.dtype == torch.uint8
    for batch_size, num in ((1, 5), (2, 5), (5, 3)):
        apart = sample(unet, num=num, batch_size=batch_size)
        # Sums of another batch size may round the other way.
        assert (apart.int() - at_once[:num].int()).abs().max() <= 1
    assert not torch.equal(at_once[0], at_once[1])
    assert torch.equal(sample(unet), at_once)
    assert not torch.equal(sample(unet, seed=8), at_once)


class PerfectNoise:
    """Predicts the noise of a data set that holds one grey image of value ``level``."""

    def __init__(self, level: float) -> None:
        self.level = level
        self.alphas = build_scheduler(DiffusionConfig()).alphas_cumprod

    def predict(self, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha = self.alphas[int(timestep)]
        return (noisy - alpha.sqrt() * self.level) / (1 - alpha).sqrt()


@pytest.mark.parametrize(("level", "pixel"), [(-1.0, 0), (0.0, 128), (0.6, 204), (1.0, 255)])
def test_sampling_finds_the_image_that_the_network_knows(
    unet: PrunedUNet, monkeypatch: pytest.MonkeyPatch, level: float, pixel: int
) -> None:
    """A perfect denoiser brings every start to the image: (level + 1) / 2 * 255."""
    perfect = PerfectNoise(level)

    def forward(noisy: torch.Tensor, timestep: torch.Tensor) -> object:
        return type("Output", (), {"sample": perfect.predict(noisy, timestep)})()

    monkeypatch.setattr(unet, "forward", forward)
    assert torch.all(sample(unet, steps=10) == pixel)


def test_sampling_is_ddim_without_noise_and_without_clipping(unet: PrunedUNet) -> None:
    """Eq. 12 of arXiv:2010.02502 with sigma = 0, from step 750 over 500 and 250 to 0."""
    alphas = build_scheduler(DiffusionConfig()).alphas_cumprod
    image = torch.randn(1, 1, 8, 8, generator=generator("sample", 7, 0))
    with torch.no_grad():
        for step, following in ((750, 500), (500, 250), (250, 0), (0, None)):
            now = alphas[step]
            then = torch.tensor(1.0) if following is None else alphas[following]
            noise = unet.eval()(image, step).sample
            clean = (image - (1 - now).sqrt() * noise) / now.sqrt()
            assert clean.abs().max() > 1  # so clipping would be seen
            image = then.sqrt() * clean + (1 - then).sqrt() * noise
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (sample(unet, num=1, steps=4).float() - expected).abs().max() <= 1


def test_the_network_is_left_in_its_mode_and_with_its_weights(unet: PrunedUNet) -> None:
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for training in (True, False):
        unet.train(training)
        sample(unet)
        assert unet.training is training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())


def test_dropout_is_off_while_sampling() -> None:
    noisy = build_unet(SMALL.model_copy(update={"dropout": 0.9}), seed=0).train()
    assert torch.equal(sample(noisy), sample(noisy))


def test_too_many_steps_and_diverged_networks_are_refused(unet: PrunedUNet) -> None:
    with pytest.raises(ConfigError, match=r"sampling_steps = 1001 .*num_train_timesteps = 1000"):
        sample(unet, steps=1001)
    with torch.no_grad():
        unet.conv_out.bias.fill_(math.nan)
    with pytest.raises(FedPhDError, match=r"not finite.*training\.learning_rate"):
        sample(unet)


def test_grid_enlarges_digits_six_times_with_gaps_of_a_pixel(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "samples.png"
    save_grid(
        torch.stack([torch.full((1, 8, 8), 40 * index) for index in range(5)]).byte(), path, 2
    )
    with Image.open(path) as image:
        assert image.mode == "L"
        pixels = np.asarray(image)
    # Two tiles of 48 pixels and three gaps of 6.
    assert pixels.shape == (114, 114)
    assert pixels[6, 6] == 0
    assert pixels[53, 53] == 0
    assert [*pixels[54:60, 20]] == [128] * 6
    assert pixels[60, 6] == 80
    assert pixels[6, 60] == 40
    assert pixels[107, 107] == 120
    assert pixels[108, 108] == 128
    assert [entry.name for entry in path.parent.iterdir()] == ["samples.png"]


def test_grid_keeps_colours_and_leaves_missing_images_grey(tmp_path: Path) -> None:
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    save_grid(red, tmp_path / "samples.png", 2)
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (152, 152)
        assert image.getpixel((8, 8)) == (200, 0, 0)
        assert image.getpixel((100, 100)) == (128, 128, 128)


def test_grid_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "samples.png"
    save_grid(FEW.images, path, 2)
    old = path.read_bytes()

    def full_disk(image: Image.Image, target: Path, kind: str) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_grid(FEW.images[4:], path, 2)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_features_are_the_same_for_bytes_and_floats_of_any_size() -> None:
    model = FeatureClassifier(channels=1, image_size=8, num_classes=10, seed=0)
    features = model(FEW.images)
    assert features.shape == (60, model.num_features)
    assert features.dtype == torch.float32
    assert torch.allclose(features, model(FEW.images / 255), atol=1e-6)
    assert features.min() >= 0
    assert model.logits(FEW.images).shape == (60, 10)
    for size in (4, 5, 32, 64):
        colour = FeatureClassifier(channels=3, image_size=size, num_classes=4, seed=0)
        assert colour(noise_images(2, 3, size, size)).shape == (2, 64)


def test_training_repeats_bit_by_bit_and_depends_on_its_seed() -> None:
    def trained(seed: int) -> FeatureClassifier:
        model = FeatureClassifier(channels=1, image_size=8, num_classes=10, seed=seed)
        train_classifier(model, FEW, ClassifierSettings(epochs=2, seed=seed), device=CPU)
        return model

    first, again, other = trained(0), trained(0), trained(1)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_digits_are_told_apart_after_training(digits_cache: Path) -> None:
    """Cross-check on images that training never saw: the classifier of the other 1617."""
    order = torch.randperm(len(DIGITS), generator=generator("accuracy-test"))
    unseen, seen = DIGITS.subset(order[:180]), DIGITS.subset(order[180:])
    model = FeatureClassifier(channels=1, image_size=8, num_classes=10, seed=0)
    train_classifier(model, seen, ClassifierSettings(epochs=20), device=CPU)
    right = model.logits(unseen.images).argmax(1) == unseen.labels
    assert right.float().mean() >= 0.97


def test_the_cache_is_used_and_renewed_with_data_or_settings(tmp_path: Path) -> None:
    def load(
        data: ImageSet = FEW, settings: ClassifierSettings = QUICK
    ) -> tuple[FeatureClassifier, int]:
        model = load_feature_classifier(data, settings, cache_dir=tmp_path, device=CPU)
        return model, len(list(tmp_path.iterdir()))

    first, files = load()
    assert files == 1
    (path,) = tmp_path.iterdir()
    marked = load_file(path) | {"head.bias": torch.full((10,), 3.0)}
    save_file(marked, path)
    cached, files = load()
    assert files == 1
    assert cached.head.bias.tolist() == [3.0] * 10
    assert not cached.training
    assert not any(parameter.requires_grad for parameter in cached.parameters())
    pixel = FEW.images.clone()
    pixel[0, 0, 0, 0] += 1
    assert load(ImageSet(pixel, FEW.labels))[1] == 2
    assert load(ImageSet(FEW.images, FEW.labels.flip(0)))[1] == 3
    assert load(settings=ClassifierSettings(epochs=2))[1] == 4
    assert torch.equal(first.head.weight, cached.head.weight)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garbage(path: Path) -> None:
    path.write_bytes(b"\x80\x04no tensors here")


def wrong_shape(path: Path) -> None:
    save_file(load_file(path) | {"head.bias": torch.zeros(3)}, path)


def not_finite(path: Path) -> None:
    bias = torch.tensor([math.nan] + [0.0] * 9)
    save_file(load_file(path) | {"head.bias": bias}, path)


@pytest.mark.parametrize("damage", [truncated, garbage, wrong_shape, not_finite])
def test_a_broken_cache_file_is_trained_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    def load() -> dict[str, torch.Tensor]:
        model = load_feature_classifier(FEW, QUICK, cache_dir=tmp_path, device=CPU)
        return model.state_dict()

    good = load()
    (path,) = tmp_path.iterdir()
    bytes_before = path.read_bytes()
    damage(path)
    caplog.clear()
    renewed = load()
    assert "is unusable and is trained again" in caplog.text
    assert all(torch.equal(good[name], renewed[name]) for name in good)
    assert path.read_bytes() == bytes_before


def test_a_cache_folder_that_cannot_be_written_only_costs_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        load_feature_classifier(FEW, QUICK, cache_dir=blocked, device=CPU)
    assert "could not be stored" in caplog.text


def test_the_distance_is_small_for_real_digits_and_large_for_noise(digits_cache: Path) -> None:
    order = torch.randperm(len(DIGITS), generator=generator("halves"))
    evaluator = evaluator_of(EvaluationConfig(), DIGITS, digits_cache)
    noise = evaluator.measure(noise_images(512, 1, 8, 8)).frechet_distance
    half = evaluator.measure(DIGITS.images[order[:898]]).frechet_distance
    same = evaluator.measure(DIGITS.images).frechet_distance
    assert noise is not None
    assert half is not None
    assert 150 < noise < 1500
    assert 0.01 < half < 3
    assert same == pytest.approx(0, abs=1e-2)
    # The reference's statistics survive each measurement.
    assert evaluator.measure(noise_images(512, 1, 8, 8)).frechet_distance == noise


def test_the_distance_is_that_of_two_normal_distributions(digits_cache: Path) -> None:
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)), from the classifier's own features."""
    settings = ClassifierSettings(epochs=EvaluationConfig().classifier_epochs)
    extractor = load_feature_classifier(DIGITS, settings, cache_dir=digits_cache, device=CPU)
    other = noise_images(300, 1, 8, 8)
    real, fake = (extractor(images).double() for images in (DIGITS.images, other))
    product = torch.cov(real.T) @ torch.cov(fake.T)
    by_hand = (
        (real.mean(0) - fake.mean(0)).square().sum()
        + torch.cov(real.T).trace()
        + torch.cov(fake.T).trace()
        - 2 * torch.linalg.eigvals(product).sqrt().real.sum()
    )
    evaluator = evaluator_of(EvaluationConfig(batch_size=64), DIGITS, digits_cache)
    assert evaluator.measure(other).frechet_distance == pytest.approx(float(by_hand), rel=1e-3)


def test_an_evaluation_says_what_it_measured(unet: PrunedUNet, digits_cache: Path) -> None:
    config = EvaluationConfig(
        num_samples=20, sampling_steps=2, batch_size=8, reference=DataConfig(source="digits")
    )
    evaluator = evaluator_of(config, DIGITS, digits_cache)
    result = evaluator.evaluate(unet, build_scheduler(DiffusionConfig()))
    assert result.samples.shape == (20, 1, 8, 8)
    protocol = result.protocol
    assert protocol.features == "classifier(digits)"
    assert (protocol.num_samples, protocol.sampling_steps, protocol.seed) == (20, 2, 1234)
    assert (protocol.num_reference_images, protocol.sampler) == (1797, "DDIM, eta 0, no clipping")
    assert (protocol.neighbours, protocol.manifold_images) == (3, 20)
    assert result.quality.frechet_distance == evaluator.measure(result.samples).frechet_distance
    assert result.seconds > 0


class PixelFeature(nn.Module):
    """The one feature of an image of one pixel is the pixel's value."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


def pixels(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1)


def test_precision_and_recall_compare_as_many_samples_as_reference_images() -> None:
    """k = 3 of 4 points: each ball reaches the farthest other point.

    Balls of 100, 110, 120, 250 reach at least from -20 to 250, so all of 0, 10, 20, 105 lie there.
    Theirs reach from -105 to 210, and 250 lies outside. With 101, 102, 111, 112 as well, the balls
    around 100 to 120 would shrink to 10 or 11 and lose 0, 10 and 20.
    """
    many, few = pixels(100, 110, 120, 250, 101, 102, 111, 112), pixels(0, 10, 20, 105)
    spec = ExtractorSpec(
        kind="classifier", name="pixel", num_features=1, channels=1, image_size=4, num_classes=1,
        layout="[]",
    )  # fmt: skip
    extractor = Extractor(PixelFeature(), nn.Identity(), spec)

    def measured(reference: torch.Tensor, samples: torch.Tensor) -> Quality:
        features = PixelFeature()(reference)
        statistics = FeatureStatistics.of(features, torch.zeros(len(features), dtype=torch.long), 1)
        compared = Reference(extractor, statistics, features, None, (1, 1, 1))
        return Evaluator(EvaluationConfig(), compared, device=CPU).measure(samples)

    more_references, more_samples = measured(many, few), measured(few, many)
    assert (more_references.precision, more_references.recall) == (1.0, 0.75)
    assert (more_samples.precision, more_samples.recall) == (0.75, 1.0)
    # Three neighbours need a fourth point.
    assert measured(many, few[:3]).precision is None


def test_features_are_named_after_the_last_part_of_a_path(tmp_path: Path) -> None:
    config = EvaluationConfig(
        classifier_epochs=1, reference=DataConfig(source="/home/somebody/scans/train.parquet")
    )
    assert evaluator_of(config, FEW, tmp_path).protocol().features == "classifier(train.parquet)"


def test_without_reference_there_are_samples_but_no_distance(
    unet: PrunedUNet, tmp_path: Path
) -> None:
    config = EvaluationConfig(num_samples=2, sampling_steps=1)
    result = evaluator_of(config, None, tmp_path).evaluate(unet, build_scheduler(DiffusionConfig()))
    assert result.samples.shape == (2, 1, 8, 8)
    assert result.quality.frechet_distance is None
    assert result.quality == Quality()
    assert result.protocol == Protocol(
        features="none",
        num_samples=2,
        sampler="DDIM, eta 0, no clipping",
        sampling_steps=1,
        seed=1234,
    )
    assert list(tmp_path.iterdir()) == []


def test_references_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    config = EvaluationConfig(classifier_epochs=1)
    with pytest.raises(ConfigError, match=r"has 1 image\(s\); a distance needs at least 2"):
        evaluator_of(config, FEW.subset(torch.arange(1)), tmp_path)
    evaluator = evaluator_of(config, FEW, tmp_path)
    with pytest.raises(ConfigError, match=r"shape \(1, 8, 8\), the network's are \(3, 16, 16\)"):
        evaluator.measure(noise_images(4, 3, 16, 16))
