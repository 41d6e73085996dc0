"""Flags that several commands of ``fedphd`` have, and how their values become a configuration."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fedphd.common.config.roles import ConfigT, load_config
from fedphd.common.errors import ConfigError
from fedphd.common.events import Verdict
from fedphd.deploy.launch.client_data import CLASSES, SOURCE, take_data
from fedphd.deploy.simulation.run_config import MIN_CLIENTS

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
RunDir = Annotated[
    Path | None,
    typer.Option(
        help="folder of this run, for its checkpoints, samples and figures",
        show_default="a new one in out_dir, runs/DATE-TIME",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="check and print the configuration, start nothing")
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


NumEdges = Annotated[
    int | None,
    typer.Option("--edges", help="number of edges", show_default="schedule.num_edges, 2"),
]
NumClients = Annotated[
    int | None,
    typer.Option(
        "--clients",
        help="number of clients",
        show_default="schedule.min_clients, 6; other presets 20",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="data set of the clients: digits, a Hugging Face name or a local path",
        show_default="the preset's",
    ),
]
ClassesPerClient = Annotated[
    int, typer.Option(min=1, help="classes of images that each client holds")
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


def take_flags(
    preset: str | None,
    num_edges: int | None,
    num_clients: int | None,
    data: str | None,
    classes_per_client: int,
    *,
    settings: list[str] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags of a whole federation and ``--set``: settings of the cloud, and of clients' data."""
    flags = {
        "preset": preset,
        "schedule.num_edges": num_edges,
        MIN_CLIENTS: num_clients,
        SOURCE: data,
        CLASSES: classes_per_client,
    }
    return take_data(overrides(flags, settings))


def load_and_show(
    cls: type[ConfigT],
    path: Path | None,
    values: dict[str, Any],
    *,
    dry_run: bool,
    check: Callable[[ConfigT], None] = lambda config: None,
) -> ConfigT:
    """Load a role's configuration and ``check`` it; on a dry run print it and end with success."""
    config = load_config(cls, path, values)
    check(config)
    if dry_run:
        say(config.model_dump_json(indent=2))
        raise typer.Exit(0)
    return config


def end(verdict: Verdict, *, name: str = "") -> None:
    """End the process with the verdict's exit code, and say why if it is not success.

    Args:
        verdict: how it went.
        name: of a participant that says goodbye where all is well; "": nothing is said.
    """
    if verdict.exit_code:
        print(f"fedphd: {verdict.message}", file=sys.stderr, flush=True)
    elif name:
        say(f"{name:<9} ends: the run is over")
    raise typer.Exit(verdict.exit_code)
