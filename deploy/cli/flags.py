"""Flags that several commands of ``fedphd`` have, and how their values become a configuration."""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from typer import Exit, Option

from fedphd.common.config.data import Section
from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.config.text import parse_settings
from fedphd.common.events import Verdict
from fedphd.deploy.launch.client_data import CLASSES, SOURCE, part_of_data, take_data
from fedphd.deploy.launch.launchers import stop_on_signal
from fedphd.deploy.launch.runs import Split, check_data, open_client_data, run_folder
from fedphd.deploy.simulation.run_config import MIN_CLIENTS

# rich treats [default: ...] in a help text as mark-up and drops it; show_default is safe.
ConfigFile = Annotated[
    Path | None,
    Option(
        "--config",
        help="TOML file with the settings that differ from the defaults; other flags win over it",
        show_default="no file",
    ),
]
Preset = Annotated[
    str | None,
    Option(
        help="settings to start from: digits (minutes on 2 CPU cores), cifar10-16 (half an hour), "
        "cifar10 or celeba",
        show_default="digits",
    ),
]
RunDir = Annotated[
    Path | None,
    Option(
        help="folder of this run, for its checkpoints, samples and figures",
        show_default="a new one in out_dir, runs/DATE-TIME",
    ),
]
DryRun = Annotated[
    bool, Option("--dry-run", help="check and print the configuration, start nothing")
]
Set = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="one setting by its dotted name; VALUE is JSON or plain text, null unsets it; may be "
        "repeated",
        show_default="none",
    ),
]
NumEdges = Annotated[
    int | None, Option("--edges", help="number of edges", show_default="schedule.num_edges, 2")
]
NumClients = Annotated[
    int | None,
    Option(
        "--clients",
        help="number of clients",
        show_default="schedule.min_clients, 6; other presets 20",
    ),
]
Data = Annotated[
    str | None,
    Option(
        help="data set of the clients: digits, a Hugging Face name or a local path",
        show_default="the preset's",
    ),
]
ClassesPerClient = Annotated[int, Option(min=1, help="classes of images that each client holds")]
Cpus = Annotated[int, Option(min=1, help="CPU cores per client; fewer cores, fewer at a time")]
Gpus = Annotated[float, Option(min=0.0, help="GPUs per client, parts allowed")]


def say(line: str) -> None:
    """Print a line for people, at once and in one piece, since several threads print."""
    print(f"{line}\n", end="", flush=True)


def overrides(flags: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """The flags that were given, and ``--set``, which wins over them."""
    given = {key: value for key, value in flags.items() if value is not None}
    return {**given, **parse_settings(settings or ())}


def take_flags(
    preset: str | None,
    num_edges: int | None,
    num_clients: int | None,
    data: str | None,
    classes_per_client: int,
    settings: list[str] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags of a whole federation and ``--set``: settings of the cloud, and of clients' data."""
    flags = {"preset": preset, "schedule.num_edges": num_edges, MIN_CLIENTS: num_clients}
    return take_data(overrides({**flags, SOURCE: data, CLASSES: classes_per_client}, settings))


def end_dry_run(config: Section, *, dry_run: bool) -> None:
    """On a dry run, print the checked configuration and end the process with success."""
    if dry_run:
        say(config.model_dump_json(indent=2))
        raise Exit(0)


def open_split(config: CloudConfig, data: Mapping[str, Any]) -> Split:
    """How the clients share their data; raises ConfigError if it or the cloud's is unusable."""
    check_data(config)
    return open_client_data(part_of_data(config, 0, data), config.num_classes)


def load_federation(
    path: Path | None, values: dict[str, Any], data: Mapping[str, Any], *, dry_run: bool
) -> tuple[CloudConfig, Split]:
    """Load a whole federation's configuration, as ``load_config``, and open its data.

    A dry run prints the configuration and ends here with success.
    """
    config = load_config(CloudConfig, path, values)
    split = open_split(config, data)
    if dry_run:
        # Standard output is the configuration alone.
        print(f"data      {split}", file=sys.stderr, flush=True)
    end_dry_run(config, dry_run=dry_run)
    return config, split


@contextmanager
def begin(
    config: CloudConfig, split: Split, run_dir: Path | None
) -> Iterator[tuple[Path, threading.Event]]:
    """Make the folder of a whole federation's run; yield it, and the event that signals set."""
    with stop_on_signal() as stop:
        folder = run_folder(run_dir, config.out_dir)
        say(f"data      {split}")
        split.write(folder)
        yield folder, stop


def end(verdict: Verdict, *, name: str = "") -> None:
    """End the process with the verdict's exit code, and print why if it is not success.

    Success of the participant ``name`` gets a line too; "": of nobody.
    """
    if verdict.exit_code:
        print(f"fedphd: {verdict.message}", file=sys.stderr, flush=True)
    elif name:
        say(f"{name:<9} ends: the run is over")
    raise Exit(verdict.exit_code)
