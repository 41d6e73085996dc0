"""The manuals: which there are, and what stands in them."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MANUALS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/results/*.md", "docs/results/*/README.md")
    for path in ROOT.glob(pattern)
)
IDS = [path.relative_to(ROOT).as_posix() for path in MANUALS]


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
    """The first block of each file, as a reader who follows the manuals writes it.

    Others show parts of it; the whole files stand where it is said how to start them.
    """
    first: dict[str, str] = {}
    for _, name, text in sorted(file_blocks(), key=lambda block: block[0].name != "deployment.md"):
        first.setdefault(name, text)
    return first
