"""``fedphd push`` as a user meets it, against a stand-in of the hub; see ``support/hub.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from huggingface_hub import constants
from support.exportable import write_exportable
from support.hub import TOKEN, HubStandIn
from typer.testing import CliRunner

from fedphd.common.errors import ConfigError, ConnectionLostError
from fedphd.deploy.cli.main import app
from fedphd.deploy.cli.share import _export_of
from fedphd.deploy.share.folder import Choices, export_run, folder_of

# huggingface_hub's own use of httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exportable(tmp_path_factory.mktemp("run"), pruned=False)


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "digits"
    export_run(run, out, Choices())
    return out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """What HF_ENDPOINT and HF_HUB_DISABLE_XET say, which are read once, when imported."""
    with HubStandIn() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stand_in


def push(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_folder_arrives_as_it_is_in_a_process_of_its_own(
    hub: HubStandIn, folder: Path, tmp_path: Path
) -> None:
    before = content(folder)
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "fedphd.deploy.cli", "push", str(folder), "ada/digits", "--private"],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"uploaded to {hub.url}/ada/digits\n"
    model = hub.models["ada/digits"]
    assert model.private
    assert model.files == before == content(folder)
    assert len(model.commits) == 1
    # Weights and pictures go to the storage for large files.
    assert len(hub.large) == 2


def test_a_run_is_exported_first_and_only_once(hub: HubStandIn, run: Path, folder: Path) -> None:
    assert push(run, "digits").exit_code == 0
    files = hub.models["ada/digits"].files
    assert files.keys() == content(folder).keys()
    assert not hub.models["ada/digits"].private
    assert b'place = "ada/digits"' in files["README.md"]
    card = run / "export/README.md"
    card.write_text(card.read_text("utf-8") + "Our own words.\n", "utf-8")
    again = push(run, "digits")
    assert "is there already and is uploaded as it is" in again.stdout
    assert hub.models["ada/digits"].files["README.md"].endswith(b"Our own words.\n")
    # The run went on since, and then somebody wrote more words.
    later = (run / "export/model_index.json").stat().st_mtime + 10
    os.utime(run / "checkpoint/state.json", (later, later))
    os.utime(card, (later + 10, later + 10))
    refused = push(run, "others")
    assert isinstance(refused.exception, ConfigError)
    assert "export is older than the run's checkpoint: remove it" in str(refused.exception)
    assert hub.models.keys() == {"ada/digits"}


@pytest.mark.parametrize(
    ("token", "owner", "why"),
    [
        (None, "ada", "there is no token for the Hugging Face hub: make one with write access"),
        ("hf_old", "ada", r"refuses the token \(Invalid username or password.\): make one"),
        (TOKEN, "bob", r"refuses the token \(You don't have the rights .*\): make one"),
    ],
)
def test_without_a_good_token_nothing_is_lost(
    hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch,
    token: str | None, owner: str, why: str,
) -> None:  # fmt: skip
    before = content(folder)
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    refused = push(folder, f"{owner}/digits").exception
    with pytest.raises(ConfigError, match=why):
        raise refused or AssertionError
    if token:
        assert f"then `fedphd push {folder} {owner}/digits`" in str(refused)
    assert content(folder) == before
    assert hub.models == {}


def test_what_is_no_run_is_said_before_a_token_is_asked_for(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="there is no such folder; name a run's folder"):
        raise push(tmp_path / "nowhere", "ada/digits").exception or AssertionError


def test_a_checkpoint_is_exported_beside_it(tmp_path: Path) -> None:
    run = write_exportable(tmp_path / "run", pruned=False)
    kept = run / "checkpoints/interval-0001"
    kept.mkdir(parents=True)
    for source, out in (
        (run, "export"), (run / "checkpoint", "export"), (kept, "export-interval-0001"),
    ):  # fmt: skip
        assert _export_of(source, folder_of(source)) == run / out
    alone = tmp_path / "copied"
    alone.mkdir()
    assert _export_of(alone, folder_of(alone)) == alone / "export"


def test_a_name_that_is_refused_is_on_no_card(hub: HubStandIn, tmp_path: Path) -> None:
    own = write_exportable(tmp_path / "run", pruned=False)
    assert isinstance(push(own, "bob/digits").exception, ConfigError)
    assert not (own / "export").exists()
    assert push(own, "ada/digits").exit_code == 0
    assert b'place = "ada/digits"' in hub.models["ada/digits"].files["README.md"]


def test_an_export_is_not_uploaded_under_another_name_than_its_cards(
    hub: HubStandIn, tmp_path: Path
) -> None:
    own = write_exportable(tmp_path / "run", pruned=False)
    hub.fault = 507
    lost = push(own, "ada/digits").exception
    assert f"`fedphd push {own}/export ada/digits`" in str(lost)
    hub.fault = None
    for source in (own, own / "export"):
        refused = push(source, "lungs").exception
        assert isinstance(refused, ConfigError)
        assert "is the card of ada/digits, and its code opens that: write ada/lungs" in str(refused)
    assert hub.models["ada/lungs"].files == {}
    assert push(own / "export", "ada/digits").exit_code == 0


def test_an_unreachable_hub_is_named_before_the_export(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write_exportable(tmp_path / "run", pruned=False)
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    lost = push(own, "ada/digits", "--private").exception
    assert isinstance(lost, ConnectionLostError)
    assert f"the Hugging Face hub at {NOBODY} cannot be reached" in str(lost)
    assert f"`fedphd push {own} ada/digits --private`" in str(lost)
    assert not (own / "export").exists()


def test_a_hub_that_is_switched_off_is_not_asked(
    hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused = push(folder, "ada/digits").exception
    assert isinstance(refused, ConfigError)
    assert "HF_HUB_OFFLINE keeps the Hugging Face hub from being asked" in str(refused)
    assert hub.asked == []


def test_what_was_public_is_not_taken_for_private(hub: HubStandIn, folder: Path) -> None:
    assert push(folder, "ada/digits").exit_code == 0
    files = dict(hub.models["ada/digits"].files)
    refused = push(folder, "ada/digits", "--private").exception
    assert isinstance(refused, ConfigError)
    assert "ada/digits is there already and is public, so nothing was uploaded" in str(refused)
    assert hub.models["ada/digits"].files == files


def test_a_card_that_the_hub_does_not_take_is_refused_with_its_words(
    hub: HubStandIn, run: Path, tmp_path: Path
) -> None:
    export_run(run, tmp_path / "out", Choices(license="mine"))
    refused = push(tmp_path / "out", "ada/digits").exception
    assert isinstance(refused, ConfigError)
    assert "license 'mine' must be one of" in str(refused)
    assert hub.models["ada/digits"].files == {}


@pytest.mark.parametrize(("status", "error"), [(403, ConfigError), (507, ConnectionLostError)])
def test_an_upload_that_breaks_off_commits_nothing(
    hub: HubStandIn, folder: Path, status: int, error: type[Exception]
) -> None:
    hub.fault = status
    assert isinstance(push(folder, "ada/digits").exception, error)
    assert hub.models["ada/digits"].files == {}
    hub.fault = None
    assert push(folder, "ada/digits").exit_code == 0
    assert hub.models["ada/digits"].files == content(folder)


def test_another_network_leaves_nothing_of_the_former_but_what_people_added(
    hub: HubStandIn, folder: Path
) -> None:
    assert push(folder, "ada/digits").exit_code == 0
    model = hub.models["ada/digits"]
    model.files |= {"onnx/unet.onnx": b"old", "unet/old.bin": b"old", "NOTES.md": b"ours"}
    assert push(folder, "ada/digits").exit_code == 0
    assert model.files == content(folder) | {"NOTES.md": b"ours"}


def test_a_refusal_that_passes_is_no_bad_configuration(hub: HubStandIn, folder: Path) -> None:
    hub.refusal = 412
    lost = push(folder, "ada/digits").exception
    assert isinstance(lost, ConnectionLostError)
    assert "status 412, A commit has happened since. Please retry.): try later" in str(lost)


def test_a_name_that_no_model_can_have_is_refused_before_the_export(
    hub: HubStandIn, tmp_path: Path
) -> None:
    refused = push(tmp_path, "a/b/c").exception
    assert isinstance(refused, ConfigError)
    assert str(refused).startswith("NAME = a/b/c: ")
    assert list(tmp_path.iterdir()) == []
