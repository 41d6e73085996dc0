"""``fedphd evaluate``, ``sample``, ``features`` and ``statistics`` as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fedphd.common.config.run import DiffusionConfig, FederationConfig, ModelConfig
from fedphd.common.errors import ConfigError
from fedphd.common.quality.moments import StatisticsFile
from fedphd.common.unet.checkpoint import save_checkpoint
from fedphd.common.unet.model import build_scheduler, build_unet
from fedphd.deploy.cli.main import app

SMALL = ModelConfig(block_out_channels=(8, 8), attention_head_dim=8, norm_num_groups=4)
RUN = FederationConfig.model_validate_json(
    json.dumps(
        {
            "model": SMALL.model_dump(mode="json"),
            "evaluation": {
                "num_samples": 20, "sampling_steps": 2, "seed": 5, "classifier_epochs": 1,
                "reference": {"source": "digits"},
            },
            "pruning": {"mode": "none"},
        }
    )
)  # fmt: skip


def saved(folder: Path, model: ModelConfig = SMALL, timesteps: int = 1000, **state: Any) -> Path:
    """A checkpoint whose averaged weights are twice the raw ones."""
    unet = build_unet(model, seed=0)
    save_checkpoint(
        folder / "checkpoint",
        unet=unet,
        ema_state={name: 2 * tensor for name, tensor in unet.state_dict().items()},
        scheduler=build_scheduler(DiffusionConfig(num_train_timesteps=timesteps)),
        state=state,
    )
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a checkpoint, whose classifier is trained once."""
    folder = tmp_path_factory.mktemp("shared")
    saved(folder, interval=3, config=RUN.model_dump(mode="json"))
    return folder


@pytest.fixture
def fedphd(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(shared)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, arguments)

    return run


def numbers(result: Result) -> dict[str, Any]:
    assert result.exception is None, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def refusal(result: Result) -> str:
    """What a command says that ends with the exit code of a bad configuration."""
    assert isinstance(result.exception, ConfigError), result.output
    assert result.exception.exit_code == 2
    return str(result.exception)


def test_evaluate_measures_as_the_run_did(fedphd: Any) -> None:
    values = numbers(fedphd("evaluate", "checkpoint", "--json"))
    assert values["frechet_distance"] > 0
    assert (values["weights"], values["interval"]) == ("ema", 3)
    assert (values["num_samples"], values["sampling_steps"], values["seed"]) == (20, 2, 5)
    assert (values["features"], values["num_reference_images"]) == ("classifier(digits)", 1797)
    assert sum(values["class_shares"]) == pytest.approx(1)
    assert len(values["reference_sha256"]) == 64
    again = numbers(fedphd("evaluate", "checkpoint", "--json", "--device", "cpu"))
    assert again["frechet_distance"] == values["frechet_distance"]


def test_flags_of_evaluate_win_over_the_run_and_set_over_flags(fedphd: Any) -> None:
    flags = ["--samples", "9", "--steps", "1", "--seed", "6", "--weights", "raw"]
    values = numbers(fedphd("evaluate", "checkpoint", "--json", *flags))
    assert (values["num_samples"], values["sampling_steps"], values["seed"]) == (9, 1, 6)
    assert values["weights"] == "raw"
    setting = ["--set", "evaluation.num_samples=7"]
    assert numbers(fedphd("evaluate", "checkpoint", "--json", *flags, *setting))["num_samples"] == 7


def test_evaluate_in_words(fedphd: Any) -> None:
    text = fedphd("evaluate", "checkpoint").stdout
    assert text.startswith("ema       evaluated checkpoint: Frechet distance ")
    for part in ("precision", "recall", "of its share", "20 samples, 2 DDIM", "of 1797 images"):
        assert part in text


def test_a_reference_that_was_made_beforehand_gives_the_same_distance(
    fedphd: Any, shared: Path
) -> None:
    epochs = ["--set", "evaluation.classifier_epochs=1"]
    features = ["features", "train", "--data", "digits", "--out", "f.safetensors", *epochs]
    assert "wrote f.safetensors: classifier(digits), trained on 1797" in fedphd(*features).stdout
    made = fedphd(
        "statistics", "--data", "digits", "--features-file", "f.safetensors",
        "--out", "s.safetensors",
    )  # fmt: skip
    assert made.exception is None
    digest = StatisticsFile.load(shared / "s.safetensors").statistics.sha256()
    assert digest in made.stdout
    own = numbers(fedphd("evaluate", "checkpoint", "--json"))
    reference = ["--reference", "s.safetensors"]
    told = ["--set", "evaluation.features_file=f.safetensors"]
    values = numbers(fedphd("evaluate", "checkpoint", "--json", *reference, *told))
    assert values["frechet_distance"] == pytest.approx(own["frechet_distance"], rel=1e-4)
    assert values["reference_sha256"] == digest
    assert (values["precision"], values["kernel_distance"]) == (None, None)
    assert values["class_shares"] == own["class_shares"]
    assert "needs features" in refusal(fedphd("evaluate", "checkpoint", *reference))
    other = ["features", "train", "--data", "digits", "--out", "g.safetensors"]
    fedphd(*other, "--set", "evaluation.classifier_epochs=2")
    told = ["--set", "evaluation.features_file=g.safetensors"]
    assert "was made in the features" in refusal(
        fedphd("evaluate", "checkpoint", *reference, *told)
    )


def test_sample_writes_a_grid_or_single_images(fedphd: Any, shared: Path) -> None:
    options = ["--num", "5", "--steps", "2", "--seed", "1"]
    text = fedphd("sample", "checkpoint", *options).stdout
    assert text == "wrote samples.png: 5 images, 2 DDIM steps, ema weights\n"
    with Image.open(shared / "samples.png") as grid:
        # Three images of 48 in a row, with gaps of an eighth of one.
        assert grid.size == (168, 168)
    text = fedphd("sample", "checkpoint", *options, "--out", "one by one").stdout
    assert "wrote one by one/grid.png and 5 single images" in text
    names = sorted(path.name for path in (shared / "one by one").iterdir())
    assert names == [*(f"{n:05d}.png" for n in range(5)), "grid.png"]
    with Image.open(shared / "one by one" / "00004.png") as image:
        assert (image.size, image.mode) == ((8, 8), "L")
        ema = np.asarray(image)
    fedphd("sample", "checkpoint", *options, "--out", "raw", "--weights", "raw")
    with Image.open(shared / "raw" / "00004.png") as image:
        assert not np.array_equal(np.asarray(image), ema)


def test_a_short_diffusion_is_sampled_with_as_many_steps(fedphd: Any, tmp_path: Path) -> None:
    short = str(saved(tmp_path, timesteps=7))
    done = fedphd("sample", short, "--num", "1", "--out", str(tmp_path / "a.png"))
    assert "1 images, 7 DDIM steps" in done.stdout


def test_a_run_is_known_by_its_folder(fedphd: Any, shared: Path) -> None:
    text = fedphd("sample", str(shared), "--num", "1", "--steps", "1", "--out", "run.png").stdout
    assert text.startswith("wrote run.png: 1 images")


def test_wrong_paths_and_values_are_refused(fedphd: Any, shared: Path) -> None:
    for command in ("evaluate", "sample"):
        assert "checkpoint nowhere: there is no such folder" in refusal(fedphd(command, "nowhere"))
    (shared / "hollow").mkdir(exist_ok=True)
    assert "that folder holds none" in refusal(fedphd("sample", "hollow"))
    (shared / "hollow" / "unet").mkdir(exist_ok=True)
    assert "is missing or damaged" in refusal(fedphd("sample", "hollow"))
    assert "--out = x.JPG: images are written as PNG" in refusal(
        fedphd("sample", "checkpoint", "--out", "x.JPG")
    )
    (shared / "file").touch()
    assert "--out = file/x.png: cannot be written" in refusal(
        fedphd("sample", "checkpoint", "--num", "1", "--steps", "1", "--out", "file/x.png")
    )
    assert "no such file or folder" in refusal(
        fedphd("evaluate", "checkpoint", "--reference", "./nothing")
    )
    assert "reference_file = no.safetensors: no such file" in refusal(
        fedphd(
            "evaluate", "checkpoint", "--reference", "no.safetensors",
            "--set", "evaluation.inception_weights=null",
            "--set", "evaluation.features_file=file",
        )
    )  # fmt: skip
    assert "evaluation.samples: unknown key" in refusal(
        fedphd("evaluate", "checkpoint", "--set", "evaluation.samples=3")
    )
    assert "--steps = 1001 is more than diffusion.num_train_timesteps = 1000; use 1000" in refusal(
        fedphd("sample", "checkpoint", "--steps", "1001", "--num", "1")
    )
    for command in ("sample", "evaluate"):
        assert "= 501 leaves out the noisiest part" in refusal(
            fedphd(command, "checkpoint", "--steps", "501")
        )
    for command in (["features", "train"], ["statistics"]):
        assert "name a file to write" in refusal(
            fedphd(*command, "--data", "digits", "--out", "no/where")
        )
    assert "statistics need features" in refusal(
        fedphd("statistics", "--data", "digits", "--out", "x.safetensors")
    )


def test_checkpoints_without_configuration_or_reference_are_refused(
    fedphd: Any, tmp_path: Path
) -> None:
    bare = str(saved(tmp_path / "bare", interval=1))
    assert "holds no configuration of its run" in refusal(fedphd("evaluate", bare))
    config = RUN.model_dump(mode="json")
    config["evaluation"]["reference"] = None
    alone = str(saved(tmp_path / "alone", config=config))
    assert "had no reference to compare with; name" in refusal(fedphd("evaluate", alone))
    values = numbers(fedphd("evaluate", alone, "--json", "--reference", "digits"))
    assert values["num_reference_images"] == 1797


def test_a_reference_of_another_shape_is_refused_before_sampling(fedphd: Any, shared: Path) -> None:
    for size in (8, 16):
        fedphd(
            "features", "train", "--data", "digits", "--out", f"f{size}.safetensors",
            "--set", f"model.image_size={size}", "--set", "evaluation.classifier_epochs=1",
        )  # fmt: skip
    refused = refusal(
        fedphd("evaluate", "checkpoint", "--set", "evaluation.features_file=f16.safetensors")
    )
    assert "images of shape (1, 16, 16), these are (1, 8, 8)" in refused
    fedphd(
        "statistics", "--data", "digits", "--features-file", "f16.safetensors",
        "--out", "s16.safetensors", "--set", "model.image_size=16",
    )  # fmt: skip
    refused = refusal(
        fedphd(
            "evaluate", "checkpoint", "--reference", "s16.safetensors", "--steps", "900",
            "--samples", "100000", "--set", "evaluation.features_file=f16.safetensors",
        )
    )  # fmt: skip
    assert "images of shape (1, 16, 16), the network's are (1, 8, 8)" in refused


def test_the_clients_reference_is_found_beside_the_checkpoint(
    fedphd: Any, shared: Path, tmp_path: Path
) -> None:
    fedphd(
        "features", "train", "--data", "digits", "--out", "f.safetensors",
        "--set", "evaluation.classifier_epochs=1",
    )  # fmt: skip
    config = RUN.model_dump(mode="json")
    config["evaluation"] |= {
        "reference": None,
        "reference_clients": True,
        "features_file": str(shared / "f.safetensors"),
    }
    folder = str(saved(tmp_path, config=config))
    assert "statistics.safetensors: no such file" in refusal(fedphd("evaluate", folder))
    fedphd(
        "statistics", "--data", "digits", "--features-file", "f.safetensors",
        "--out", str(tmp_path / "statistics.safetensors"),
    )  # fmt: skip
    values = numbers(fedphd("evaluate", folder, "--json"))
    assert values["num_reference_images"] == 1797
    assert torch.tensor(values["class_shares"]).sum() == pytest.approx(1)
    former = tmp_path / "checkpoints" / "interval-0001"
    shutil.copytree(folder, former)
    again = numbers(fedphd("evaluate", str(former), "--json"))
    assert again["frechet_distance"] == values["frechet_distance"]


def test_samples_of_a_class(fedphd: Any, shared: Path) -> None:
    model = SMALL.model_copy(update={"class_conditional": True, "num_class_embeds": 4})
    saved(shared / "told", model)

    def drawn(name: str, *flags: str) -> bytes:
        result = fedphd("sample", "told", "--num", "3", "--steps", "2", "--out", name, *flags)
        assert result.exception is None, result.output
        return (shared / name).read_bytes()

    two = drawn("two.png", "--class", "2")
    assert drawn("again.png", "--class", "2") == two
    assert drawn("one.png", "--class", "1") != two
    assert drawn("more.png", "--class", "2", "--guidance", "3") != two
    assert drawn("all.png") != two
    unknown = refusal(fedphd("sample", "told", "--class", "3"))
    assert unknown == "--class = 3: this network knows 3 classes; use 0 to 2"


@pytest.mark.parametrize("flags", [("--class", "3"), ("--guidance", "2")])
def test_a_network_without_classes_has_none_to_draw(fedphd: Any, flags: tuple[str, str]) -> None:
    said = refusal(fedphd("sample", "checkpoint", *flags))
    assert said.startswith(f"{flags[0]} = {flags[1]}: this network was trained without classes")
