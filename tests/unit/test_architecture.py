"""Which folder may import which: a folder is a process, and processes share only common/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROLES = ("server", "edge", "client")
FOLDERS = (*ROLES, "common", "deploy")
FORBIDDEN = {
    "server": {"edge", "client", "deploy"},
    "edge": {"server", "client", "deploy"},
    "client": {"server", "edge", "deploy"},
    "common": {"server", "edge", "client", "deploy"},
    "deploy": set(),
}
# The simulation puts edges inside the cloud's process.
ALLOWED = {"deploy/simulation/virtual_edges.py": {"edge"}}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Dotted names that ``source``, a module of ``package``, imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def sources(folder: str) -> Iterator[tuple[str, str, str]]:
    """Path in the repository, package and text of each module below ``folder``."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        inside = path.relative_to(ROOT)
        package = ".".join(["fedphd", *inside.parent.parts])
        yield inside.as_posix(), package, path.read_text("utf-8")


def folders_of(source: str, package: str) -> set[str]:
    """Folders of this project that ``source`` imports from."""
    names = [name.split(".") for name in imported_modules(source, package)]
    return {parts[1] for parts in names if parts[0] == "fedphd" and len(parts) > 1}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_what_they_may(folder: str) -> None:
    modules = list(sources(folder))
    assert modules, f"{folder}/ holds no code"
    wrong = [
        f"{path} imports fedphd.{other}"
        for path, package, text in modules
        for other in folders_of(text, package) & (FORBIDDEN[folder] - ALLOWED.get(path, set()))
    ]
    assert wrong == []


def test_imports_name_existing_folders() -> None:
    for folder in FOLDERS:
        for path, package, text in sources(folder):
            assert folders_of(text, package) <= set(FOLDERS), path


def test_flowers_internal_connection_is_used_in_one_file() -> None:
    internal = ("flwr.client.", "flwr.proto.", "flwr.supercore.")
    users = {
        path
        for folder in FOLDERS
        for path, package, text in sources(folder)
        if any(f"{name}.".startswith(internal) for name in imported_modules(text, package))
    }
    assert users == {"common/wire/node.py", "common/wire/replies.py"}


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("import fedphd.edge", "edge"),
        ("import os, fedphd.edge.app as app", "edge"),
        ("from fedphd.edge.app import main", "edge"),
        ("from fedphd import edge", "edge"),
        ("from ..edge import app", "edge"),
        ("from .. import edge", "edge"),
        ("from . import app", "server"),
        ("from .app import main", "server"),
        ("def f():\n    if True:\n        from fedphd.client import app", "client"),
        ("if TYPE_CHECKING:\n    import fedphd.deploy.cli", "deploy"),
    ],
)
def test_every_form_of_import_is_seen(source: str, folder: str) -> None:
    assert folders_of(source, "fedphd.server") == {folder}


def test_other_packages_are_not_ours() -> None:
    assert folders_of("import server, fedphd\nfrom client import x", "fedphd.server") == set()
