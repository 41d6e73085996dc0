"""``fedphd export`` and ``fedphd push``: a run's network for others."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from fedphd.common.config.roles import DeviceName
from fedphd.common.errors import ConfigError
from fedphd.deploy.cli.flags import say
from fedphd.deploy.share.places import CARD, INDEX, is_export

if TYPE_CHECKING:
    from fedphd.deploy.share.folder import Choices

# In a run's folder.
EXPORT = "export"
# As the card has it, of a model whose name is known.
_PLACE = re.compile(r'^place = "(.*?)"', re.MULTILINE)


def export(
    run: Annotated[Path, Argument(metavar="RUN", help="a run's folder, or its checkpoint/")],
    out: Annotated[Path, Option(help="folder to make")],
    weights: Annotated[
        Literal["averaged", "raw"], Option(help="the moving average, or the last raw weights")
    ] = "averaged",
    onnx: Annotated[
        bool,
        Option(
            "--onnx", help="also write the network as ONNX, and check it (needs the extra onnx)"
        ),
    ] = False,
    license_name: Annotated[
        str | None,
        Option(
            "--license",
            help="of the weights, for the card, as the hub names it: cc-by-4.0",
            show_default="not stated",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        Option(
            help="the clients' data set, for the card: a name on the hub, or any other",
            show_default="named only if it is the digits or CIFAR-10",
        ),
    ] = None,
    device: Annotated[
        DeviceName, Option(help="where samples are drawn; auto is CUDA where there is one")
    ] = "auto",
) -> None:
    """Make a folder that diffusers opens, with a model card and samples."""
    from fedphd.common.unet.model import resolve_device
    from fedphd.deploy.share.folder import Choices

    choices = Choices(
        weights=weights,
        onnx=onnx,
        license=license_name,
        dataset=dataset,
        device=resolve_device(device),
    )
    _export(run, out, choices)
    say(f"to upload it: fedphd push {out} USER/MODEL")


def push(
    run: Annotated[
        Path, Argument(metavar="RUN", help="a run's folder, or one that `fedphd export` made")
    ],
    name: Annotated[str, Argument(metavar="NAME", help="of the model on the hub: USER/MODEL")],
    private: Annotated[
        bool, Option("--private", help="only you, and whom you let in, see the model")
    ] = False,
) -> None:
    """Upload a model to the Hugging Face hub; a run is exported into RUN/export before."""
    from fedphd.common.unet.checkpoint import check_holds_checkpoint
    from fedphd.deploy.share.hub import check_name, check_token, make, upload

    # Before the export, which takes a minute, and before the hub has a model without files.
    check_name(name)
    folder = run
    if not is_export(run):
        from fedphd.deploy.share.folder import folder_of

        check_holds_checkpoint(run)
        folder = _export_of(run, folder_of(run))
        if is_export(folder):
            _check_recent(folder, run)
    check_token()
    # The whole name, which the card says, is the hub's to know.
    made = make(run, name, private=private)
    if not is_export(folder):
        from fedphd.deploy.share.folder import Choices

        _export(run, folder, Choices(name=made.repo_id))
    elif folder != run:
        say(f"{folder}: is there already and is uploaded as it is")
    _check_place(folder, made.repo_id)
    upload(folder, made.repo_id)
    say(f"uploaded to {made}")


def _export(run: Path, out: Path, choices: "Choices") -> None:
    from fedphd.deploy.share.folder import export_run

    done = export_run(run, out, choices)
    needs = "fedphd" if done.own_class else "diffusers alone"
    say(
        f"wrote {out}: {choices.weights} weights, which need {needs}; "
        f"{out / CARD} has the code to open it"
    )
    if done.done < done.intervals:
        say(f"an early version: the run has done {done.done} of {done.intervals} cloud rounds")
    if not done.is_measured:
        say("the run has not measured these weights: the card gives no distance of theirs")
    if done.onnx_difference is not None:
        say(
            f"onnx: ONNX Runtime and torch differ by at most {done.onnx_difference:.2g}, over "
            "batches of 1 and 3"
        )


def _export_of(run: Path, home: Path) -> Path:
    """Where ``run``, or a checkpoint of the run in ``home``, is exported.

    Not into a checkpoint, which the run replaces; those of former intervals have their own.
    """
    from fedphd.common.unet.checkpoint import checkpoint_of

    if run.resolve() in (home.resolve(), checkpoint_of(home).resolve()):
        return home / EXPORT
    return home / f"{EXPORT}-{run.resolve().name}"


def _check_place(folder: Path, name: str) -> None:
    """Raise ConfigError where the card's code opens another model than ``name``."""
    text = (folder / CARD).read_text("utf-8", "replace")
    if (found := _PLACE.search(text)) and found[1] not in (".", name):
        raise ConfigError(
            f"{folder / CARD} is the card of {found[1]}, and its code opens that: write {name} "
            "there, or remove the folder, so that it is made again"
        )


def _check_recent(folder: Path, run: Path) -> None:
    """Raise ConfigError where the run has gone on since it was exported.

    By a file that nobody edits: people add words to the card, which make no weights newer.
    """
    from fedphd.common.unet.checkpoint import checkpoint_of

    state = checkpoint_of(run) / "state.json"
    if state.exists() and state.stat().st_mtime > (folder / INDEX).stat().st_mtime:
        raise ConfigError(
            f"{folder} is older than the run's checkpoint: remove it, so that it is made again, or "
            f"push it by its own name: fedphd push {folder} NAME"
        )
