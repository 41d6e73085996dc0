"""The manuals' commands, settings, names, links and pictures are those of this repository.

Commands stand in ``sh`` blocks, one program per line. What can start something is run with
``--dry-run``, in a folder that holds the manuals' own settings files and small data sets in the
places that they name; so is what takes no time. Other commands are parsed, flags and values.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import click
import datasets
import numpy as np
import pytest
import typer
import yaml
from flwr.common.config import fuse_dicts, get_project_config, parse_config_args
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from PIL import Image
from typer.testing import CliRunner
from unit.test_architecture import COMMON, MAY_IMPORT, ROLES

from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig, load_config
from fedphd.common.errors import ConfigError
from fedphd.deploy.cli.flags import overrides
from fedphd.deploy.cli.main import app
from fedphd.deploy.compare.methods import read_methods
from fedphd.deploy.simulation.run_config import client_config, cloud_config

ROOT = Path(__file__).parents[2]
MANUALS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/results/README.md")
    for path in ROOT.glob(pattern)
)
IDS = [path.relative_to(ROOT).as_posix() for path in MANUALS]
ROLE_OF_FILE = {"cloud.toml": CloudConfig, "edge.toml": EdgeConfig, "client.toml": ClientConfig}
# What takes no time and starts nothing; what else has --dry-run gets it.
RUN_AS_IT_IS = ("compare --list", "pseudo-labels", "config")
# Where images would come from the hub; the settings are then checked with the digits.
HUB_PRESETS = ("cifar10",)
LIMITS = {"README.md": 150, "CONTRIBUTING.md": 70}
FEDPHD = typer.main.get_command(app)


class Block(NamedTuple):
    """A fenced block: its language and text, and the text before it."""

    language: str
    text: str
    before: str


def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def blocks(path: Path, language: str) -> list[Block]:
    parts = re.split(r"^```(\w*)\n(.*?)^```$", text_of(path), flags=re.MULTILINE | re.DOTALL)
    found = [Block(*parts[i : i + 2], parts[i - 1]) for i in range(1, len(parts), 3)]
    return [block for block in found if block.language == language]


def prose(path: Path) -> str:
    """A manual without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)


def spans(path: Path) -> list[str]:
    """What stands in back quotes, on one line."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def commands(path: Path) -> list[list[str]]:
    """The words of each command of the manual's ``sh`` blocks, without comments."""
    lines = "\n".join(block.text for block in blocks(path, "sh")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in lines.splitlines()]
    return [line for line in words if line]


def file_blocks() -> list[tuple[Path, str, str]]:
    """Manual, file name and text of every TOML block; the text before a block names its file."""
    found = []
    for path in MANUALS:
        for block in blocks(path, "toml"):
            names = re.findall(r"`(\w+\.toml)`", block.before)
            assert names, f"{path}: which file is this? {block.text}"
            found.append((path, names[-1], block.text))
    return found


@cache
def settings_files() -> dict[str, str]:
    """The first block of each file, as a reader who follows the manuals writes it."""
    first: dict[str, str] = {}
    for _, name, text in file_blocks():
        first.setdefault(name, text)
    return first


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the manuals' commands name; absolute paths of theirs lie below it."""
    folder = tmp_path_factory.mktemp("site")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    names = [f"{number:02d}.png" for number in range(40)]
    for place in ("images", "img_align_celeba", *(f"data/images/{c}" for c in range(10))):
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
    for name, text in settings_files().items():
        (folder / name).write_text(here(text, folder), "utf-8")
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
    assert child is not None and sub is not None
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
        arguments += ["--data", "digits"]
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
    assert len(words) > 1 and not unknown, f"make has no target {unknown}"


def check_script(words: list[str], folder: Path) -> None:
    """A script of the repository's, which `python` may run."""
    assert (ROOT / words[words[0] == "python"]).is_file()


PROGRAMS = {
    "fedphd": check_fedphd,
    "flwr": check_flwr,
    "flower-supernode": check_supernode,
    "make": check_make,
    "python": check_script,
    "docs/results/cifar10.sh": check_script,
    "export": lambda words, folder: None,
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
        ("fedphd local --set schedule.interval=3", "unknown key; did you mean 'intervals'"),
        ("fedphd simulate --set data.colour=red", "data.colour"),
        ("fedphd cloud --config nowhere.toml", "nowhere.toml: cannot be read"),
        ("fedphd client --set data.source=nowhere/at/all.parquet", "nowhere/at/all.parquet"),
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
def test_blocks_say_what_they_are(path: Path) -> None:
    fences = re.findall(r"^```(.*)$", text_of(path), re.MULTILINE)
    languages, ends = fences[::2], fences[1::2]
    assert set(ends) <= {""}
    assert set(languages) <= {"sh", "text", "toml", "python"}
    # A command that stands outside a block would not be checked.
    assert not re.findall(r"^    (?:fedphd|flwr|make|python|export) .*$", prose(path), re.MULTILINE)


def test_settings_files_load(tmp_path: Path) -> None:
    for path, name, text in file_blocks():
        (tmp_path / name).write_text(text, "utf-8")
        if name in ROLE_OF_FILE:
            load_config(ROLE_OF_FILE[name], tmp_path / name)
        else:
            assert name == "methods.toml", f"{path}: {name}"
            assert tomllib.loads(text).keys() < read_methods(tmp_path / name).keys()


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


@cache
def known_settings() -> dict[str, type[CloudConfig] | type[EdgeConfig] | type[ClientConfig]]:
    """Every dotted setting and section, and the role that has it."""

    def keys(cls: type, prefix: str) -> Iterator[str]:
        from fedphd.common.config.roles import section_class

        for name, field in cls.model_fields.items():  # type: ignore[attr-defined]
            yield f"{prefix}{name}"
            if section := section_class(field.annotation):
                yield from keys(section, f"{prefix}{name}.")

    roles = (ClientConfig, EdgeConfig, CloudConfig)
    return {key: role for role in roles for key in keys(role, "")}


@pytest.mark.parametrize("path", MANUALS, ids=IDS)
def test_settings_named_in_passing_exist(path: Path) -> None:
    sections = {key.partition(".")[0] for key in known_settings() if "." in key}
    for span in spans(path):
        found = re.fullmatch(r"\[?([a-z_]+(?:\.[a-z0-9_]+)*)\]?(?: ?= ?(.+))?", span)
        if not found or found[1].split(".")[0] not in sections or found[1].endswith(".toml"):
            continue
        key, value = found.groups()
        assert key in known_settings(), f"there is no setting {key}"
        if value is not None:
            try:
                load_config(known_settings()[key], None, {key: tomllib.loads(f"v = {value}")["v"]})
            except ConfigError as error:
                # Some need others beside them; but the value must be one that it can have.
                assert f"  {key} = " not in str(error), error


@pytest.mark.parametrize("path", MANUALS, ids=IDS)
def test_python_blocks_import_what_is_there(path: Path) -> None:
    for block in blocks(path, "python"):
        tree = ast.parse(block.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


@cache
def names_in(path: Path) -> set[str]:
    """``f``, ``C`` and ``C.m`` of a Python file."""
    found = set()
    for node in ast.parse(text_of(path)).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        for inner in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
            found |= {f"{node.name}.{inner.name}"} if isinstance(inner, ast.FunctionDef) else set()
    return found


@pytest.mark.parametrize("path", MANUALS, ids=IDS)
def test_files_and_names_in_them_are_there(path: Path) -> None:
    for span in spans(path):
        found = re.fullmatch(r"((?:[\w-]+/)*[\w-]+\.(?:py|toml|sh|json|svg))(?:: ([\w.]+))?", span)
        inside = re.fullmatch(r"(?:server|edge|client|common|deploy|docs|tests)/[\w/]*", span)
        if inside:
            assert (ROOT / span).is_dir(), f"there is no folder {span}"
        if not found or "/" not in found[1]:
            continue
        assert (ROOT / found[1]).is_file(), f"there is no file {found[1]}"
        if found[2]:
            assert found[2] in names_in(ROOT / found[1]), f"{found[1]} has no {found[2]}"


def anchors(path: Path) -> set[str]:
    """What links to a manual's headings end in."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MANUALS, ids=IDS)
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


def test_every_manual_can_be_found_from_the_index() -> None:
    linked = re.findall(r"\]\(([^)\s#]+)", text_of(ROOT / "docs/README.md"))
    found = {(ROOT / "docs" / target).resolve() for target in linked}
    assert {path for path in MANUALS if path.parent != ROOT} <= found | {ROOT / "docs/README.md"}


def test_the_tree_is_the_repository() -> None:
    tree = text_of(ROOT / "README.md").partition("## The tree\n")[2].partition("\nRead these")[0]
    named, above = set(), ""
    for indent, name in re.findall(r"^    ( *)(\w+)/ ", tree, flags=re.MULTILINE):
        above = above if indent else name
        named.add(f"{above}/{name}" if indent else name)
    rooms = {room.replace(".", "/") for room in MAY_IMPORT} - {"common/config/presets"}
    assert named == rooms | {"docs", "fedphd", "tests"}
    assert all((ROOT / folder).is_dir() for folder in named)
    tests = re.search(r"^    tests/ +(.*)$", tree, flags=re.MULTILINE)
    assert tests
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert set(re.findall(r"(\w+)/", tests[1])) == folders - {"__pycache__"}


def test_the_picture_of_the_rooms_shows_who_may_import_whom() -> None:
    drawn: dict[str, set[str]] = {}
    for arrow in ElementTree.parse(ROOT / "docs/rooms.svg").findall(".//{*}path"):
        for room in (arrow.get("data-from") or "").split():
            drawn.setdefault(room, set()).update((arrow.get("data-to") or "").split())
    for room, below in MAY_IMPORT.items():
        # Only holds files of settings, or nothing.
        if room in ("common.config.presets", "deploy"):
            continue
        if room.startswith("common"):
            assert reached(room, drawn) == below - {room}, room
        else:
            # The picture says so in words: common is open to all rooms above but the bundle.
            assert drawn[room] - {"common"} == below - set(COMMON), room
            assert set(COMMON) <= below or room == "deploy.bundle", room
    assert ROLES <= drawn.keys()


def reached(room: str, arrows: dict[str, set[str]]) -> set[str]:
    direct = arrows.get(room, set())
    return direct.union(*(reached(other, arrows) for other in direct))


def test_front_pages_are_short() -> None:
    for name, most in LIMITS.items():
        assert text_of(ROOT / name).count("\n") <= most, name


def test_versions_agree() -> None:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    latest = re.search(r"^## \[(.+?)\]", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert latest and latest[1] == project["version"]
