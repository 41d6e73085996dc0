"""The manuals' commands are those of this version.

Commands stand in ``sh`` blocks, one program per line. What can start something is run with
``--dry-run``, in a folder that holds the manuals' own settings files and small data sets in the
places that they name; what takes no time is run as it is. Other commands are parsed, with flags
and values.
"""

from __future__ import annotations

import importlib
import io
import re
import shlex
import warnings
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

import click
import datasets
import numpy as np
import pytest
import typer
import yaml
from flwr.common.config import fuse_dicts, get_project_config, parse_config_args
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from PIL import Image
from support.manuals import IDS, MANUALS, ROOT, commands, prose, settings_files, spans, text_of
from typer.testing import CliRunner

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.errors import ConfigError
from fedphd.common.events import write_json
from fedphd.deploy.cli.flags import overrides
from fedphd.deploy.cli.main import app
from fedphd.deploy.simulation.run_config import client_config, cloud_config

# What takes no time and starts nothing; what else has --dry-run gets it.
RUN_AS_IT_IS = ("compare --list", "pseudo-labels", "config")
# Where images would come from the hub; the settings are then checked with the digits.
HUB_PRESETS = ("cifar10", "cifar10-16")
FEDPHD = typer.main.get_command(app)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the manuals' commands name; absolute paths of theirs lie below it."""
    folder = tmp_path_factory.mktemp("site")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    names = [f"{number:02d}.png" for number in range(40)]
    classes = [*(f"data/images/{c}" for c in range(10)), *(f"birds/{c}" for c in "abc")]
    for place in ("images", "img_align_celeba", *classes):
        (folder / place).mkdir(parents=True)
        for name, image in zip(names, pixels, strict=True):
            Image.fromarray(image).save(folder / place / name)
    # All four of Male and Young, ten times each.
    rows = [f"{name} {1 - 2 * (i % 2)} {1 - i // 2 % 2 * 2}" for i, name in enumerate(names)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(["40", "Male Young", *rows]), "utf-8")
    (folder / "cifar10").mkdir()
    columns = {"image": list(map(Image.fromarray, pixels)), "label": [i % 10 for i in range(40)]}
    datasets.Dataset.from_dict(columns).to_parquet(folder / "cifar10/train.parquet")
    (folder / "features.safetensors").touch()
    # A run that goes on.
    interrupted = folder / "runs/20261124-154906"
    interrupted.mkdir(parents=True)
    plain = load_config(CloudConfig, overrides={"superlink.insecure": True})
    write_json(interrupted / "config.json", plain.model_dump(mode="json"))
    write_json(interrupted / "clients.json", {})
    for name, text in settings_files().items():
        (folder / name).write_text(here(text, folder), "utf-8")
    # The keys that the settings name, by the command that the manual has for them.
    made = CliRunner().invoke(
        app, ["keys", "dev", "--edges", "2", "--clients", "6", "--out", f"{folder / 'keys'}"]
    )
    assert made.exit_code == 0, made.output
    return folder


def here(text: str, folder: Path) -> str:
    return re.sub(r"(?<![\w.])/(?:path/to|data)/", f"{folder}/data/", text)


def parsed(command: click.Command, words: list[str]) -> tuple[click.Command, click.Context]:
    """The (sub-)command that ``words`` call, with its flags and values; raises click's errors."""
    name, *rest = words
    context = command.make_context(name, rest, resilient_parsing=False)
    if not isinstance(command, click.Group):
        return command, context
    child, sub, left = command.resolve_command(context, [*context._protected_args, *context.args])
    assert child is not None
    assert sub is not None
    return parsed(sub, [child, *left])


def check_fedphd(words: list[str], folder: Path) -> None:
    """Parse a command and check its settings; run what starts nothing, in ``folder``."""
    command, context = parsed(FEDPHD, words)
    arguments = words[1:]
    dry = any("--dry-run" in parameter.opts for parameter in command.params)
    if not dry and not " ".join(arguments).startswith(RUN_AS_IT_IS):
        flags = {"preset": context.params.get("preset")}
        load_config(CloudConfig, None, overrides(flags, context.params.get("settings")))
        return
    if dry and not context.params.get("list_only"):
        arguments.append("--dry-run")
    if context.params.get("preset") in HUB_PRESETS and not context.params.get("data", "here"):
        arguments += ["--data", "digits", "--set", "evaluation.reference=null"]
    done = CliRunner().invoke(app, [here(word, folder) for word in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output


@cache
def flwr() -> click.Command:
    """Flower's command, whose import warns of how it uses typer."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return typer.main.get_command(importlib.import_module("flwr.cli.app").app)


def check_flwr(words: list[str], folder: Path) -> None:
    """Parse a command of Flower's; check a run's settings as the run would."""
    _, context = parsed(flwr(), words)
    if words[1] != "run":
        return
    given = parse_config_args(context.params["run_config_overrides"])
    defaults = get_project_config(ROOT)["tool"]["flwr"]["app"]["config"]
    run_config = fuse_dicts(flat(defaults), given)
    federation = parse_config_args(context.params["federation_config_overrides"])
    num_nodes = int(federation.get("num-supernodes", 10))
    cloud_config(run_config, num_nodes)
    client_config(run_config, 0, num_nodes)


def flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        inner = (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
        found.update(inner)
    return found


def check_supernode(words: list[str], folder: Path) -> None:
    """Parse a call of Flower's own node, and the file that it names."""
    error = io.StringIO()
    with redirect_stderr(error):
        try:
            args = _parse_args_run_supernode().parse_args(words[1:])
        except SystemExit:
            raise AssertionError(error.getvalue()) from None
    node = parse_config_args([args.node_config])
    assert set(node) == {"config"}
    assert Path(str(node["config"])).name in settings_files()


def check_make(words: list[str], folder: Path) -> None:
    targets = re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
    unknown = [word for word in words[1:] if "=" not in word and word not in targets]
    assert not unknown, f"make has no target {unknown}"


def check_script(words: list[str], folder: Path) -> None:
    """A script of the repository's, which `python` may run."""
    assert (ROOT / words[words[0] == "python"]).is_file()


def check_docker(words: list[str], folder: Path) -> None:
    """A call of compose, its file and the service that it names; or a copy from such a service."""
    if words[1] == "cp":
        inner = re.fullmatch(r"\$\((docker compose .+)\):/.+", words[2])
        assert inner, f"{words[2]!r} names no container by `docker compose ps`"
        words = shlex.split(inner[1])
    assert words[1:3] == ["compose", "-f"]
    services = yaml.safe_load(text_of(ROOT / words[3]))["services"]
    named = [word for word in words[5:] if words[4] in ("logs", "ps") and not word.startswith("-")]
    assert set(named) <= set(services)


def check_ray(words: list[str], folder: Path) -> None:
    """A start of Ray, with flags that it has."""
    from ray.scripts.scripts import start

    assert words[1] == "start"
    start.make_context("start", words[2:])


PROGRAMS = {
    "docker": check_docker,
    "fedphd": check_fedphd,
    "flwr": check_flwr,
    "flower-supernode": check_supernode,
    "make": check_make,
    "python": check_script,
    "docs/results/cifar10.sh": check_script,
    "docs/results/cifar10-16.sh": check_script,
    "docs/results/digits.sh": check_script,
    "export": lambda words, folder: None,
    "ray": check_ray,
    "pip": lambda words, folder: None,
    "rm": lambda words, folder: None,
    "ssh-keygen": lambda words, folder: None,
}


def check(words: list[str], folder: Path) -> None:
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    assert words[0] in PROGRAMS, f"nothing here checks {words[0]!r}"
    PROGRAMS[words[0]](words, folder)


@pytest.mark.parametrize("path", MANUALS, ids=IDS)
def test_commands_of_a_manual_work(path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    for words in commands(path):
        try:
            check(words, site)
        except (click.ClickException, ConfigError, AssertionError, ValueError) as error:
            why = error.format_message() if isinstance(error, click.ClickException) else error
            pytest.fail(f"{path.name}: {shlex.join(words)}\n{why}")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("fedphd local --klients 6", "--klients"),
        ("fedphd locale", "No such command 'locale'"),
        ("fedphd local --clients six", "'six' is not a valid int"),
        (
            "fedphd local --set schedule.interval=3",
            "unknown key; did you mean 'schedule.intervals'",
        ),
        ("fedphd simulate --set data.colour=red", "data.colour"),
        ("fedphd cloud --config nowhere.toml", "nowhere.toml: cannot be read"),
        (
            "fedphd client --insecure --set data.source=nowhere/a.parquet",
            "nowhere/a.parquet",
        ),
        ("fedphd sample", "Missing argument"),
        ("fedphd features train --data x --out y --set seeds=1", "seeds: unknown key"),
        ("flwr run . --runconfig 'seed=1'", "--runconfig"),
        ("flwr run . --run-config 'schedule.edge_round=1'", "schedule.edge_round"),
        ("flwr run . --run-config 'schedule.intervals=1'", "prunes after the last"),
        ("flower-supernode --insecurely", "--insecurely"),
        ("make dmeo", "make has no target"),
        ("python tests/benchmarks/nothing.py", "is_file"),
        ("kubectl apply", "nothing here checks 'kubectl'"),
    ],
)
def test_a_wrong_command_is_found(
    line: str, why: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site)
    with pytest.raises((click.ClickException, ConfigError, AssertionError, ValueError)) as caught:
        check(shlex.split(line), site)
    error = caught.value
    said = error.format_message() if isinstance(error, click.ClickException) else str(error)
    assert why in said


@pytest.mark.parametrize("path", MANUALS, ids=IDS)
def test_commands_named_in_passing_exist(path: Path) -> None:
    for span in spans(path):
        if span.startswith("make "):
            check_make(shlex.split(span), ROOT)
        words = shlex.split(span) if span.startswith("fedphd ") else []
        command: click.Command = FEDPHD
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        for word in words[1:]:
            if isinstance(command, click.Group) and not word.startswith("-"):
                assert word in command.commands, span
                command = command.commands[word]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        assert set(flags) <= known, span


@pytest.mark.parametrize("path", MANUALS, ids=IDS)
def test_no_command_stands_outside_a_block(path: Path) -> None:
    names = "|".join(map(re.escape, PROGRAMS))
    assert not re.findall(rf"^    (?:{names}) .*$", prose(path), re.MULTILINE)
