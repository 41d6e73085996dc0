"""The manuals' settings, names, links and pictures are those of this repository.

Their commands: ``test_docs_commands.py``.
"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from support.manuals import IDS, MANUALS, ROOT, blocks, file_blocks, prose, spans, text_of
from support.rooms import COMMON, MAY_IMPORT, ROLES

from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig, load_config
from fedphd.common.config.text import setting_keys
from fedphd.common.errors import ConfigError
from fedphd.deploy.compare.methods import read_methods

ROLE_OF_FILE = {"cloud.toml": CloudConfig, "edge.toml": EdgeConfig, "client.toml": ClientConfig}
LIMITS = {"README.md": 150, "CONTRIBUTING.md": 70}


@pytest.mark.parametrize("path", MANUALS, ids=IDS)
def test_blocks_say_what_they_are(path: Path) -> None:
    fences = re.findall(r"^```(.*)$", text_of(path), re.MULTILINE)
    languages, ends = fences[::2], fences[1::2]
    assert set(ends) <= {""}
    assert set(languages) <= {"sh", "text", "toml", "python", "yaml"}


def test_settings_files_load(tmp_path: Path) -> None:
    for path, name, text in file_blocks():
        (tmp_path / name).write_text(text, "utf-8")
        if name in ROLE_OF_FILE:
            load_config(ROLE_OF_FILE[name], tmp_path / name)
        else:
            assert name == "methods.toml", f"{path}: {name}"
            assert tomllib.loads(text).keys() < read_methods(tmp_path / name).keys()


def test_prometheus_is_shown_files_that_are_there() -> None:
    shown = [block.text for path in MANUALS for block in blocks(path, "yaml")]
    assert shown
    for text in shown:
        (rules,) = yaml.safe_load(text)["rule_files"]
        assert (ROOT / rules.removeprefix("/path/to/fedphd/")).is_file(), rules


@cache
def known_settings() -> dict[str, type[CloudConfig] | type[EdgeConfig] | type[ClientConfig]]:
    """Every dotted setting and section, and a role that has it."""
    found: dict[str, type[CloudConfig] | type[EdgeConfig] | type[ClientConfig]] = {}
    for role in (ClientConfig, EdgeConfig, CloudConfig):
        for key in setting_keys(role):
            parts = key.split(".")
            found |= {".".join(parts[:end]): role for end in range(1, len(parts) + 1)}
    return found


@pytest.mark.parametrize("path", MANUALS, ids=IDS)
def test_settings_named_in_passing_exist(path: Path) -> None:
    sections = {key.partition(".")[0] for key in known_settings() if "." in key}
    for span in spans(path):
        found = re.fullmatch(r"\[?([a-z_]+(?:\.[a-z0-9_]+)*)\]?(?: ?= ?(.+))?", span)
        if not found or found[1].split(".")[0] not in sections or found[1].endswith(".toml"):
            continue
        key, value = found.groups()
        assert key in known_settings(), f"there is no setting {key}"
        # Some need others beside them; but the value must be one that it can have.
        assert value is None or f"  {key} = " not in refusal(key, value)


def refusal(key: str, value: str) -> str:
    """What is said of a setting's ``value``, written as in TOML; "" where nothing is wrong."""
    try:
        load_config(known_settings()[key], None, {key: tomllib.loads(f"v = {value}")["v"]})
    except ConfigError as error:
        return str(error)
    return ""


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
        found |= set(names_of(node))
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in names_of(inner)}
    return found


def names_of(node: ast.stmt) -> Iterator[str]:
    """What a statement defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
            yield name


@pytest.mark.parametrize("path", MANUALS, ids=IDS)
def test_files_and_names_in_them_are_there(path: Path) -> None:
    for span in spans(path):
        found = re.fullmatch(r"((?:[\w-]+/)*[\w-]+\.(?:py|toml|sh|json|svg))(?:: ([\w.]+))?", span)
        inside = re.fullmatch(r"(?:server|edge|client|common|deploy|docs|tests)/[\w/]*", span)
        if inside:
            # A file without an ending looks like a folder, but for the stroke at the end.
            is_there = (ROOT / span).is_dir() if span.endswith("/") else (ROOT / span).exists()
            assert is_there, f"there is no {span}"
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


def linked_from(path: Path) -> set[Path]:
    """The manuals that a manual's links lead to."""
    targets = re.findall(r"\]\(([^)\s#]+)", prose(path))
    return {(path.parent / target).resolve() for target in targets}.intersection(MANUALS)


def test_every_manual_can_be_found_from_the_index() -> None:
    found, left = set[Path](), {ROOT / "docs/README.md"}
    while left:
        found |= left
        left = set[Path]().union(*map(linked_from, left)) - found
    assert {path for path in MANUALS if path.parent != ROOT} <= found


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
    assert drawn.keys() >= ROLES


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
    assert latest
    assert latest[1] == project["version"]
