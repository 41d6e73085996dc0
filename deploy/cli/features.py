"""``fedphd features train`` and ``fedphd statistics``: a reference prepared in advance."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option, Typer

from fedphd.common.config.data import DataConfig
from fedphd.common.config.roles import CloudConfig, load_config, read_preset, read_toml
from fedphd.common.config.text import flattened, merged
from fedphd.common.errors import ConfigError
from fedphd.deploy.cli.bars import bar
from fedphd.deploy.cli.flags import ConfigFile, Preset, Set, check_out, overrides, say
from fedphd.deploy.cli.hints import CommandGroup

READING = "reading data"
Data = Annotated[str, Option(help="labelled images: digits, a Hugging Face name or a local path")]
Out = Annotated[Path, Option(help="file to write (.safetensors)")]
features_app = Typer(
    cls=CommandGroup, no_args_is_help=True, help="Features in which images are compared."
)


@features_app.command("train")
def train(
    data: Data, out: Out, config: ConfigFile = None, preset: Preset = None, settings: Set = None
) -> None:
    """Train a feature classifier on public or proxy data, for evaluation.features_file.

    The configuration gives the images' size and channels (model) and the epochs (evaluation).
    """
    check_out(out)
    resolved = _load(data, config, preset, settings)
    from fedphd.common.data.images import LabelledImages
    from fedphd.common.quality.extractor import save_extractor
    from fedphd.common.quality.reference import trained_classifier
    from fedphd.common.unet.model import resolve_device

    evaluation, model = resolved.evaluation, resolved.model
    assert evaluation.reference is not None
    cache, device = resolved.out_dir / ".cache", resolve_device(resolved.device)
    with bar(READING):
        source = LabelledImages(evaluation.reference)
        images = source.decode(image_size=model.image_size, channels=model.channels)
        extractor = trained_classifier(evaluation, images, cache_dir=cache, device=device)
    save_extractor(extractor, out)
    name, shape = extractor.spec.name, extractor.image_shape
    say(f"wrote {out}: {name}, trained on {len(images)} images {shape}")


def statistics(
    data: Data,
    out: Out,
    features_file: Annotated[
        Path | None,
        Option(
            help="classifier of fedphd features train",
            show_default="evaluation.features_file, or Inception by evaluation.inception_weights",
        ),
    ] = None,
    config: ConfigFile = None,
    preset: Preset = None,
    settings: Set = None,
) -> None:
    """Summarise a data set's features, for evaluation.reference_file; it holds no image."""
    check_out(out)
    more = {"evaluation.features_file": features_file and str(features_file)}
    resolved = _load(data, config, preset, settings, more)
    from fedphd.common.data.images import LabelledImages
    from fedphd.common.quality.moments import StatisticsFile
    from fedphd.common.quality.reference import fixed_extractor
    from fedphd.common.unet.model import resolve_device

    evaluation, model = resolved.evaluation, resolved.model
    extractor = fixed_extractor(evaluation)
    if extractor is None:
        raise ConfigError(
            "statistics need features: give --features-file (fedphd features train), or --set "
            "evaluation.inception_weights=FILE"
        )
    assert evaluation.reference is not None
    classes, device = resolved.num_classes, resolve_device(resolved.device)
    with bar(READING):
        source = LabelledImages(evaluation.reference)
        source.check_classes(classes)
        images = source.decode(image_size=model.image_size, channels=model.channels)
        summed = extractor.statistics(
            images, num_classes=classes, batch_size=evaluation.batch_size, device=device
        )
    StatisticsFile(summed, extractor.spec.name, extractor.fingerprint()).save(out)
    say(f"wrote {out}: {summed.count} images in features of {extractor.spec.name}")
    say(f"SHA-256 of count, mean and covariance: {summed.sha256()}")


def _load(
    data: str,
    config: Path | None,
    preset: str | None,
    settings: list[str] | None,
    more: dict[str, Any] | None = None,
) -> CloudConfig:
    """A cloud's configuration whose reference is ``data``.

    The preset or the file may say how to read another data set, of which columns and how many
    images; that holds only where they name the same one.
    """
    given = overrides({"preset": preset, **(more or {})}, settings)
    of_file = read_toml(config) if config else {}
    usual = of_file.get("preset", CloudConfig.model_fields["preset"].default)
    configured = merged(read_preset(given.get("preset", usual)), of_file)
    alone: dict[str, Any] = {
        "evaluation.reference_file": None,
        "evaluation.reference_clients": False,
    }
    if dict(flattened(configured)).get("evaluation.reference.source") != data:
        fresh = {**DataConfig().model_dump(mode="json"), "source": data}
        alone["evaluation.reference"] = fresh
    return load_config(CloudConfig, config, alone | given)
