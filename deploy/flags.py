"""Flags that several commands of ``fedphd`` have, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedphd.common.errors import ConfigError

EXAMPLE = "num_threads=4"

# rich takes [default: ...] in a help text for mark-up and swallows it; show_default is safe.
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file with the settings that differ from the defaults; other flags win over it",
        show_default="no file",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="settings to start from: digits (minutes on 2 CPU cores), cifar10 or celeba",
        show_default="digits",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"one setting, such as {EXAMPLE}; JSON or plain text, null for none; may be repeated",
        show_default="none",
    ),
]


def say(line: str) -> None:
    """Print a line for people, at once and in one piece, since several threads do."""
    print(f"{line}\n", end="", flush=True)


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """``["a.b=3"]`` -> ``{"a.b": 3}``; a value is JSON, and otherwise text."""
    values: dict[str, Any] = {}
    for setting in settings or []:
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {setting}: write KEY=VALUE, such as {EXAMPLE}")
        try:
            values[key.strip()] = json.loads(text)
        except json.JSONDecodeError:
            values[key.strip()] = text
    return values


def overrides(flags: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """The flags that were given, and ``--set``, which wins over them."""
    given = {key: value for key, value in flags.items() if value is not None}
    return {**given, **parse_settings(settings)}
