"""Checkpoints: bit-exact, opened by diffusers, and whole whenever the process dies."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from support.disk import files_limited_to

from fedphd.common.config.run import DiffusionConfig, ModelConfig
from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.unet import checkpoint as checkpoints
from fedphd.common.unet.checkpoint import (
    checkpoint_of,
    kept_checkpoints,
    load_checkpoint,
    load_extras,
    save_checkpoint,
)
from fedphd.common.unet.model import (
    PrunedUNet,
    build_scheduler,
    build_unet,
    unet_config,
    unet_from_config,
)
from fedphd.server.pruning import prune_unet

SMALL = ModelConfig(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4)


@pytest.fixture(scope="module")
def unet() -> PrunedUNet:
    return prune_unet(build_unet(SMALL, seed=1), ratio=0.5).unet


def ema_state(unet: PrunedUNet) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in unet.state_dict().items()}


def save(folder: Path, unet: PrunedUNet, keep: int = 1, **state: Any) -> None:
    save_checkpoint(
        folder,
        unet=unet,
        ema_state=ema_state(unet),
        scheduler=build_scheduler(DiffusionConfig(num_train_timesteps=50)),
        state=state,
        keep=keep,
    )


def interval_in(folder: Path) -> int:
    return int(load_checkpoint(folder)[3]["interval"])


def test_a_pruned_network_its_average_and_the_state_come_back_to_the_bit(
    tmp_path: Path, unet: PrunedUNet
) -> None:
    save(tmp_path / "run" / "checkpoint", unet, interval=3, nested={"seed": [1, 2]})
    back, averaged, scheduler, state = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert state == {"interval": 3, "nested": {"seed": [1, 2]}}
    assert scheduler.config.num_train_timesteps == 50
    for got, expected in ((back, unet.state_dict()), (averaged, ema_state(unet))):
        assert unet_config(got) == unet_config(unet)
        assert list(got.state_dict()) == list(expected)
        assert all(torch.equal(got.state_dict()[name], expected[name]) for name in expected)
        # Fresh memory is aligned for vector instructions; a mapped file need not be.
        assert all(parameter.data_ptr() % 64 == 0 for parameter in got.parameters())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint"]


def test_loading_leaves_the_callers_random_state(tmp_path: Path, unet: PrunedUNet) -> None:
    save(tmp_path / "checkpoint", unet)
    before = torch.get_rng_state()
    load_checkpoint(tmp_path / "checkpoint")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("averaged", [True, False])
def test_diffusers_opens_it_with_the_documented_lines(
    tmp_path: Path, unet: PrunedUNet, caplog: pytest.LogCaptureFixture, averaged: bool
) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, unet)
    chosen = {}
    if averaged:
        chosen["unet"] = PrunedUNet.from_pretrained(folder, subfolder="unet_ema")
    pipeline = DDIMPipeline.from_pretrained(folder, **chosen)

    expected = ema_state(unet) if averaged else unet.state_dict()
    got = pipeline.unet.state_dict()
    assert type(pipeline.unet) is PrunedUNet
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert pipeline.scheduler.config.num_train_timesteps == 50
    assert not [r for r in caplog.records if "expected" in r.getMessage().lower()]

    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (2, 8, 8, 1)


def test_a_network_is_opened_in_silence(
    tmp_path: Path, unet: PrunedUNet, caplog: pytest.LogCaptureFixture
) -> None:
    unet.save_pretrained(tmp_path)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        opened = PrunedUNet.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert torch.equal(opened.conv_in.weight, unet.conv_in.weight)
    assert caplog.messages == []


def test_a_second_checkpoint_replaces_the_first(tmp_path: Path, unet: PrunedUNet) -> None:
    save(tmp_path / "checkpoint", unet, interval=1)
    (tmp_path / "checkpoint" / "leftover").touch()
    save(tmp_path / "checkpoint", unet, interval=2)
    assert interval_in(tmp_path / "checkpoint") == 2
    assert not (tmp_path / "checkpoint" / "leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("size", [100, 2000, 30_000])
def test_a_full_disk_leaves_the_old_one(tmp_path: Path, unet: PrunedUNet, size: int) -> None:
    save(tmp_path / "checkpoint", unet, interval=1)
    with (
        files_limited_to(size),
        pytest.raises(FedPhDError, match=rf"checkpoint {tmp_path}.* could not be written"),
    ):
        save(tmp_path / "checkpoint", unet, interval=2)
    assert interval_in(tmp_path / "checkpoint") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_crash_while_writing_leaves_the_old_one(tmp_path: Path, unet: PrunedUNet) -> None:
    save(tmp_path / "checkpoint", unet, interval=1)
    (tmp_path / ".checkpoint.new" / "unet").mkdir(parents=True)
    assert interval_in(tmp_path / "checkpoint") == 1
    save(tmp_path / "checkpoint", unet, interval=2)
    assert interval_in(tmp_path / "checkpoint") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_crash_between_the_two_renames_has_the_new_one(tmp_path: Path, unet: PrunedUNet) -> None:
    save(tmp_path / "one", unet, interval=1)
    save(tmp_path / "two", unet, interval=2)
    (tmp_path / "one").rename(tmp_path / ".checkpoint.old")
    (tmp_path / "two").rename(tmp_path / ".checkpoint.new")
    assert interval_in(tmp_path / "checkpoint") == 2
    with files_limited_to(100), pytest.raises(FedPhDError, match="could not be written"):
        save(tmp_path / "checkpoint", unet, interval=3)
    assert interval_in(tmp_path / "checkpoint") == 2
    save(tmp_path / "checkpoint", unet, interval=3)
    assert interval_in(tmp_path / "checkpoint") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_crash_before_the_old_one_was_removed_has_the_new_one(
    tmp_path: Path, unet: PrunedUNet
) -> None:
    save(tmp_path / "checkpoint", unet, interval=2)
    (tmp_path / ".checkpoint.old" / "unet").mkdir(parents=True)
    assert interval_in(tmp_path / "checkpoint") == 2
    save(tmp_path / "checkpoint", unet, interval=3)
    assert interval_in(tmp_path / "checkpoint") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("name", ["checkpoint", ".checkpoint.old"])
def test_a_run_is_known_by_its_folder(name: str, tmp_path: Path, unet: PrunedUNet) -> None:
    save(tmp_path / "checkpoint", unet, interval=2)
    # As a process leaves it that was killed between two renames.
    (tmp_path / "checkpoint").rename(tmp_path / name)
    for given in (tmp_path, tmp_path / "checkpoint"):
        assert interval_in(checkpoint_of(given)) == 2


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint {tmp_path}/none: there is no such folder"):
        load_checkpoint(tmp_path / "none")


@pytest.mark.parametrize(
    "missing",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet_ema/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "state.json",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_missing_or_damaged_part_is_named(
    tmp_path: Path, unet: PrunedUNet, missing: str, damage: str
) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, unet)
    if damage == "missing":
        (folder / missing).unlink()
    else:
        (folder / missing).write_bytes((folder / missing).read_bytes()[:-20])
    with pytest.raises(ConfigError, match=Path(missing).name) as caught:
        load_checkpoint(folder)
    assert Path(missing).parts[0] in str(caught.value)


def test_where_a_former_checkpoint_is_kept_it_is_the_way_out(
    tmp_path: Path, unet: PrunedUNet
) -> None:
    folder, weights = tmp_path / "checkpoint", "unet/diffusion_pytorch_model.safetensors"
    for interval in (1, 2, 3):
        save(folder, unet, interval=interval, keep=3)
    (folder / weights).write_bytes(b"")
    (folder / "variate.safetensors").write_bytes(b"")
    former = tmp_path / "checkpoints" / "interval-0002"
    told = rf"remove {folder} and put {former} in its place"
    for load in (load_checkpoint, load_extras):
        with pytest.raises(ConfigError, match=told):
            load(folder)
    # It is one.
    shutil.rmtree(folder)
    former.rename(folder)
    assert load_checkpoint(folder)[3]["interval"] == 2


def test_former_checkpoints_are_in_the_order_of_their_intervals(
    tmp_path: Path, unet: PrunedUNet
) -> None:
    folder = tmp_path / "checkpoint"
    for interval in (9999, 10_000, 10_001):
        save(folder, unet, interval=interval, keep=3)
    names = [kept.name for kept in kept_checkpoints(folder)]
    assert names == ["interval-9999", "interval-10000"]


@pytest.mark.parametrize(("keep", "left"), [(2, [6]), (3, [5, 6])])
def test_after_an_earlier_checkpoint_was_put_back_what_came_later_is_no_way_out(
    tmp_path: Path, unet: PrunedUNet, keep: int, left: list[int]
) -> None:
    folder, former = tmp_path / "checkpoint", tmp_path / "checkpoints"
    for interval in range(4, 9):
        save(folder, unet, interval=interval, keep=4)
    shutil.copytree(former / "interval-0007", former / "interval-0007.bak")
    shutil.rmtree(folder)
    (former / "interval-0006").rename(folder)
    save(folder, unet, interval=7, keep=keep)
    assert kept_checkpoints(folder) == [former / f"interval-000{number}" for number in left]
    (folder / "unet" / "config.json").write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"put {former / 'interval-0006'} in its place"):
        load_checkpoint(folder)
    # A copy that somebody made is left alone.
    assert interval_in(former / "interval-0007.bak") == 7


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path, unet: PrunedUNet) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, unet)
    unet_from_config({**unet_config(unet), "block_out_channels": [4, 16]}).save_pretrained(
        tmp_path / "other"
    )
    shutil.copy(tmp_path / "other" / "config.json", folder / "unet" / "config.json")
    with pytest.raises(ConfigError, match="size mismatch"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"time_feature_width": 8, "evil": 1}'])
def test_a_strange_config_is_refused(tmp_path: Path, unet: PrunedUNet, text: str) -> None:
    save(tmp_path / "checkpoint", unet)
    (tmp_path / "checkpoint" / "unet" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_checkpoint(tmp_path / "checkpoint")


def test_state_that_is_no_json_is_refused_before_anything_is_written(
    tmp_path: Path, unet: PrunedUNet
) -> None:
    with pytest.raises(TypeError):
        save(tmp_path / "checkpoint", unet, interval={1, 2})
    assert list(tmp_path.iterdir()) == []


def test_files_are_plain(tmp_path: Path, unet: PrunedUNet) -> None:
    save(tmp_path / "checkpoint", unet, interval=1)
    names = {str(p.relative_to(tmp_path / "checkpoint")) for p in tmp_path.rglob("*.*")}
    assert names == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "state.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet_ema/config.json",
        "unet_ema/diffusion_pytorch_model.safetensors",
    }
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text()) == {"interval": 1}


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, unet: PrunedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = unet_from_config(unet_config(unet))
    later.load_state_dict({name: 2 * t for name, t in unet.state_dict().items()}, assign=True)
    load, left = checkpoints._load_unet, [2]
    save(tmp_path / "checkpoint", unet, interval=1)

    def load_and_replace(folder: Path) -> PrunedUNet:
        found = load(folder)
        if folder.name == "unet" and left[0]:
            left[0] -= 1
            save(tmp_path / "checkpoint", later, interval=3 - left[0])
        return found

    monkeypatch.setattr(checkpoints, "_load_unet", load_and_replace)
    back, averaged, _, state = load_checkpoint(tmp_path / "checkpoint")
    assert state["interval"] == 3
    for got, expected in ((back, later.state_dict()), (averaged, ema_state(later))):
        assert all(torch.equal(got.state_dict()[name], expected[name]) for name in expected)
    # One that never stays is given up.
    left[0] = 100
    with pytest.raises(ConfigError, match="is replaced faster than it can be read"):
        load_checkpoint(tmp_path / "checkpoint")
