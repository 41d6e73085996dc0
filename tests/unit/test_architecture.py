"""The ladder of rooms: each imports only rooms below it; Flower's depths have their own files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from support.rooms import MAY_IMPORT, ROLES

ROOT = Path(__file__).parents[2]
LARGEST_SHARE = 1 / 6
FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy")
# The codes of error replies, and the type of ``Grid.run``: public things without a public home.
HOMELESS = {"flwr.common.constant.ErrorCode", "flwr.common.typing.Run"}
KNOW_FLOWER = {
    "common/wire/control.py",
    "common/wire/internals.py",
    "common/wire/handover.py",
    "common/wire/node.py",
    "common/wire/raypool.py",
    "common/wire/replies.py",
}
PRIVATE = re.compile("_[a-zA-Z0-9]+.*")
BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}


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


def modules() -> Iterator[tuple[str, str, str]]:
    """Path in the repository, room and text of each of the product's modules."""
    for top in ("common", *sorted(ROLES), "deploy"):
        for path in sorted((ROOT / top).rglob("*.py")):
            inside = path.relative_to(ROOT)
            yield inside.as_posix(), ".".join(inside.parent.parts), path.read_text("utf-8")


def rooms_of(source: str, room: str) -> set[str]:
    """Rooms of this project that ``source``, a module of ``room``, imports from."""
    found = set()
    for name in imported_modules(source, f"fedphd.{room}"):
        parts = name.split(".")
        if parts[0] != "fedphd":
            continue
        inside = [".".join(parts[1:end]) for end in range(2, len(parts) + 1)]
        # The longest that is a room; ``fedphd.common.errors`` is of the room ``common``.
        known = [place for place in inside if place in MAY_IMPORT]
        found.add(known[-1] if known else parts[1] if len(parts) > 1 else "")
    return found


def test_every_room_has_its_place_on_the_ladder() -> None:
    assert {room for _, room, _ in modules()} == set(MAY_IMPORT)


def test_the_ladder_has_no_circle() -> None:
    left = dict(MAY_IMPORT)
    while left:
        lowest = [room for room, below in left.items() if not (below - {room}) & left.keys()]
        assert lowest, f"a circle among {sorted(left)}"
        for room in lowest:
            del left[room]


def test_rooms_import_only_what_is_below_them() -> None:
    wrong = [
        f"{path} imports {other}"
        for path, room, text in modules()
        for other in rooms_of(text, room) - MAY_IMPORT[room] - {room}
    ]
    assert wrong == []


def test_no_room_holds_more_than_a_sixth_of_the_lines() -> None:
    lines: Counter[str] = Counter()
    for _, room, text in modules():
        lines[room] += text.count("\n")
    largest, most = lines.most_common(1)[0]
    assert most <= LARGEST_SHARE * lines.total(), largest


def internal_imports(source: str, package: str = "") -> set[str]:
    """Names that ``source``, a module of ``package``, imports from below Flower's public API."""
    names = {n for n in imported_modules(source, package) if n.split(".")[0] == "flwr"}
    public = {f"{module}.{name}" for module in FLOWER for name in import_module(module).__all__}
    return names - public - HOMELESS


def foreign_privates(source: str) -> set[str]:
    """Private parts of other objects that ``source`` reaches for, as it writes them.

    What a module itself gives to its objects is its own, also where it reads it of another one.
    """
    nodes = list(ast.walk(ast.parse(source)))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own = {node.attr for node in attributes if ast.unparse(node.value) in {"self", "cls"}}
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    found = {ast.unparse(n) for n in attributes if PRIVATE.fullmatch(n.attr) and n.attr not in own}
    found |= {
        ast.unparse(node)
        for node in attributes
        if node.attr == "__dict__" and ast.unparse(node.value) != "self"
    }
    for node in nodes:
        names: list[ast.expr] = []
        if isinstance(node, ast.Subscript):
            names = [node.slice]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            names = node.args[1:2]
        if any(isinstance(n, ast.Constant) and PRIVATE.fullmatch(str(n.value)) for n in names):
            found.add(ast.unparse(node))
    return found


def test_flowers_internals_are_imported_in_few_files() -> None:
    users = {path for path, room, text in modules() if internal_imports(text, room)}
    assert users == KNOW_FLOWER


def test_only_these_files_reach_for_private_parts() -> None:
    reaching = {path: found for path, _, text in modules() if (found := foreign_privates(text))}
    assert {path: found for path, found in reaching.items() if path not in KNOW_FLOWER} == {}
    assert "self._grid._stub" in reaching["common/wire/replies.py"]


@pytest.mark.parametrize(
    "source",
    [
        "import flwr.proto.node_pb2",
        "import flwr.app",
        "from flwr.app import *",
        "from flwr.app import message",
        "from flwr.app.message import make_message",
        "from flwr import supercore",
        "from flwr.supercore.inflatable.inflatable_object import get_object_tree",
        "from flwr.client.grpc_rere_client import connection",
        "from flwr.common.constant import SUPERLINK_NODE_ID",
        "def f():\n    from flwr.common.serde import message_to_proto",
    ],
)
def test_imports_of_flowers_internals_are_seen(source: str) -> None:
    assert internal_imports(source)


def test_flowers_public_api_is_open_to_all() -> None:
    source = (
        "from flwr.app import Message, RecordDict\n"
        "from flwr.serverapp.strategy import Strategy\n"
        "from flwr.common.constant import ErrorCode\n"
        "import numpy, flwr_datasets\n"
    )
    assert internal_imports(source) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("grid._stub.PullMessages(request)", "grid._stub"),
        ("self._grid._stub", "self._grid._stub"),
        ("message.metadata.__dict__['_message_id'] = 1", "message.metadata.__dict__"),
        ("message.metadata.__dict__.update(_run_id=1)", "message.metadata.__dict__"),
        ("hasattr(grid, '_stub')", "hasattr(grid, '_stub')"),
        ("setattr(message.metadata, '_run_id', 1)", "setattr(message.metadata, '_run_id', 1)"),
        ("vars(message)['_content']", "vars(message)['_content']"),
    ],
)
def test_private_parts_of_others_are_seen(source: str, found: str) -> None:
    assert found in foreign_privates(source)


def test_private_parts_of_ones_own_are_open() -> None:
    source = (
        "class Log:\n"
        "    def __init__(self):\n"
        "        self._common = {}\n"
        "    def twin(self, other):\n"
        "        other._common = self.__dict__\n"
        "        return getattr(other, 'name'), type(self).__name__\n"
    )
    assert foreign_privates(source) == set()


def test_no_module_is_loaded_under_two_names() -> None:
    script = (
        "import importlib, os, pkgutil, sys, fedphd\n"
        "for found in pkgutil.walk_packages(fedphd.__path__, 'fedphd.'):\n"
        "    if not found.name.endswith('__main__'):\n"
        "        importlib.import_module(found.name)\n"
        "files = [os.path.realpath(m.__file__) for m in list(sys.modules.values())\n"
        "         if getattr(m, '__file__', None)]\n"
        f"ours = [file for file in files if file.startswith({str(ROOT)!r} + os.sep)\n"
        "        and '.venv' not in file]\n"
        "assert len(ours) > 50, ours\n"
        "print(sorted({file for file in ours if ours.count(file) > 1}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    # This process, too, knows the product by one name only.
    assert not {"server", "edge", "client", "common", "deploy"} & sys.modules.keys()


@pytest.mark.parametrize(
    ("source", "room"),
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
        ("if TYPE_CHECKING:\n    import fedphd.deploy.cli", "deploy.cli"),
        ("from fedphd.common.wire.node import Node", "common.wire"),
        ("from fedphd.common.errors import ConfigError", "common"),
    ],
)
def test_every_form_of_import_is_seen(source: str, room: str) -> None:
    assert rooms_of(source, "server") == {room}


def test_other_packages_are_not_ours() -> None:
    assert rooms_of("import server\nfrom client import x", "server") == set()


def test_what_tests_share_is_in_their_own_room() -> None:
    """None imports from another: its helpers would be found by nobody, and run as its own."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        found = imported_modules(path.read_text("utf-8"), "")
        other = [name for name in found if name.startswith(("unit.", "integration.", "e2e."))]
        assert other == [], path
