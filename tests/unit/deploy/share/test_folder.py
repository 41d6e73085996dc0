"""What ``fedphd export`` writes: that others can open it, and what it does not give away."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.disk import files_limited_to
from support.exportable import CLIENT, SECRETS, write_exportable
from support.told import write_told
from typer.testing import CliRunner

from fedphd.common.config.run import ModelConfig
from fedphd.common.errors import ConfigError
from fedphd.common.events import write_json
from fedphd.common.history.summary import SUMMARY, Summary
from fedphd.common.quality.stored_run import StoredRun
from fedphd.common.unet.checkpoint import read_state, update_state
from fedphd.common.unet.model import PrunedUNet, UNet2DModel, build_unet, plain_unet
from fedphd.deploy.cli.main import app
from fedphd.deploy.launch.runs import CLIENTS
from fedphd.deploy.share.folder import Choices, export_run

ROOT = Path(__file__).parents[4]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exportable(tmp_path_factory.mktemp("dense-run"), pruned=False)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exportable(tmp_path_factory.mktemp("pruned-run"), pruned=True)


@pytest.fixture(scope="module")
def exported(dense: Path, pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of both, side by side."""
    folder = tmp_path_factory.mktemp("exported")
    export_run(dense, folder / "dense", Choices())
    export_run(pruned, folder / "pruned", Choices())
    return folder


def python_of(card: Path) -> str:
    """The first block of Python in a card."""
    found = re.search(r"^```python\n(.*?)^```$", card.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_the_cards_code_draws_images_in_a_fresh_process(exported: Path, kind: str) -> None:
    checks = (
        "import sys\n"
        "assert len(images) == 16 and images[0].size == (8, 8), images\n"
        "print('fedphd' in sys.modules)\n"
    )
    code = python_of(exported / kind / "README.md").replace(
        "num_inference_steps=50", "num_inference_steps=2"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{checks}"],
        cwd=exported / kind, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A dense network needs diffusers alone.
    assert done.stdout.strip() == str(kind == "pruned")


def test_the_card_is_of_the_weights_interval_where_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, load = write_exportable(tmp_path / "run", pruned=False), StoredRun.load
    checkpoint = run / "checkpoint"
    update_state(checkpoint, read_state(checkpoint) | {"interval": 1})

    def load_and_go_on(folder: Path, weights: Literal["ema", "raw"]) -> StoredRun:
        found = load(folder, weights)
        update_state(checkpoint, read_state(checkpoint) | {"interval": 2})
        return found

    monkeypatch.setattr(StoredRun, "load", load_and_go_on)
    assert export_run(run, tmp_path / "out", Choices()).done == 1
    assert "had done 1 of its 2 cloud rounds" in (tmp_path / "out/README.md").read_text("utf-8")


def test_a_dense_network_is_diffusers_own_and_computes_the_same(
    exported: Path, dense: Path
) -> None:
    stock = UNet2DModel.from_pretrained(exported / "dense", subfolder="unet")
    assert type(stock) is UNet2DModel
    index = json.loads((exported / "dense/model_index.json").read_text("utf-8"))
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    ours = PrunedUNet.from_pretrained(dense / "checkpoint/unet_ema")
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(stock(images, 7).sample, ours(images, 7).sample)


def test_a_pruned_network_stays_what_it_is(pruned: Path) -> None:
    unet = PrunedUNet.from_pretrained(pruned / "checkpoint/unet")
    assert plain_unet(unet) is unet


def test_a_class_conditional_network_stays_what_it_is() -> None:
    """A pipeline names no class, which diffusers' own network would refuse."""
    unet = build_unet(ModelConfig(class_conditional=True, num_class_embeds=4), seed=0)
    assert plain_unet(unet) is unet


def test_the_scheduler_does_not_clip(exported: Path) -> None:
    config = json.loads((exported / "pruned/scheduler/scheduler_config.json").read_text("utf-8"))
    assert (config["_class_name"], config["clip_sample"]) == ("DDIMScheduler", False)


def test_samples_are_a_grid_of_sixty_four(exported: Path) -> None:
    # Pixels become squares of 6, eight of 48 and nine gaps of 6.
    with Image.open(exported / "dense/samples.png") as grid:
        assert grid.size == (8 * 54 + 6, 8 * 54 + 6)


def test_raw_weights_on_demand(exported: Path, dense: Path, tmp_path: Path) -> None:
    export_run(dense, tmp_path / "raw", Choices(weights="raw"))
    raw, averaged = load_file(tmp_path / "raw" / WEIGHTS), load_file(exported / "dense" / WEIGHTS)
    assert all(torch.equal(averaged[name], 2 * raw[name]) for name in raw)
    card = (tmp_path / "raw/README.md").read_text("utf-8")
    assert "The weights are the raw ones" in card
    # Only the averaged ones were measured.
    assert "These weights were not measured." in card
    assert "model-index" not in card


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_nothing_private_is_in_the_folder(exported: Path, kind: str, request: Any) -> None:
    run = request.getfixturevalue(kind)
    machine = [ROOT, run, exported, Path.home(), sys.prefix, socket.gethostname()]
    told = [text.lower().encode() for text in (*SECRETS, *map(str, machine)) if len(text) > 3]
    assert CLIENT in (run / "metrics.jsonl").read_text("utf-8")
    for path in (exported / kind).rglob("*"):
        content = path.read_bytes().lower() if path.is_file() else b""
        assert [text for text in told if text in content] == [], path


def test_a_folder_that_has_something_in_it_is_left_alone(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConfigError, match=r"out: is there already; name a new folder"):
        export_run(dense, out, Choices())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_empty_folder_is_filled_even_where_the_user_is(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    export_run(dense, Path(), Choices())
    assert (out / "README.md").is_file()
    assert Path.cwd() == out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("inside", ["checkpoint", "checkpoints/interval-0001"])
def test_a_checkpoint_of_a_run_keeps_its_datas_name_and_version(
    tmp_path: Path, inside: str
) -> None:
    run = write_exportable(tmp_path / "run", pruned=False)
    write_json(run / CLIENTS, {"data.source": "digits"})
    told = write_told(tmp_path / "told")
    shutil.copy(told / SUMMARY, run)
    if inside != "checkpoint":
        (run / inside).parent.mkdir()
        (run / "checkpoint").rename(run / inside)
    export_run(run / inside, tmp_path / "out", Choices())
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert "# FedPhD model of scikit-learn's digits" in card
    assert "`pathological-2x3-seed0-00c0ffee`" in card
    assert f"version {Summary.read(told).fedphd_version}: the training images" in card


def test_a_full_disk_leaves_no_half_folder(dense: Path, tmp_path: Path) -> None:
    with (
        files_limited_to(20_000),
        pytest.raises(ConfigError, match=r"--out = .*out: cannot be written: .*; make room"),
    ):
        export_run(dense, tmp_path / "out", Choices())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="that folder holds none; name the folder of a run"):
        export_run(tmp_path / "run", tmp_path / "out", Choices())


def test_the_command_says_what_it_made(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(pruned), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert f"wrote {out}: averaged weights, which need fedphd" in done.stdout
    assert f"fedphd push {out} USER/MODEL" in done.stdout
    # Others shall read it, whoever made it.
    modes = {path.stat().st_mode for path in out.rglob("*") if path.is_file()}
    assert len(modes) == 1
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused = CliRunner().invoke(
        app, ["export", str(pruned), "--out", str(tmp_path / "other"), "--onnx"]
    )
    assert isinstance(refused.exception, ConfigError)
    assert "pip install 'fedphd[onnx]'" in str(refused.exception)
    assert not (tmp_path / "other").exists()
