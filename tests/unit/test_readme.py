"""The README's tree is the repository's, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_tree_names_the_folders_that_are_there() -> None:
    tree = README.partition("## The tree")[2]
    named = set(re.findall(r"^    (\w+)/ ", tree, flags=re.MULTILINE))
    there = {path.parent.name for path in ROOT.glob("*/*") if path.suffix in {".py", ".png"}}
    there.discard("build")
    assert named == there | {"tests"}
    parts = re.search(r"^    tests/ +(.*)$", tree, flags=re.MULTILINE)
    assert parts
    for part in re.findall(r"(\w+)/", parts[1]):
        assert (ROOT / "tests" / part).is_dir(), part


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\S+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for named in re.findall(r"(?:^    |`)make ([a-z -]+?)(?:`|  )", README, re.M):
        assert set(named.split()) <= targets, named


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
