"""The ``fedphd`` command."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedphd.common.config import (
    ClientConfig,
    CloudConfig,
    ConfigT,
    EdgeConfig,
    load_config,
    section_class,
)
from fedphd.common.errors import ConfigError, FedPhDError, Interrupted, exit_code_of
from fedphd.common.events import Verdict, write_verdict
from fedphd.deploy.launch import run_cloud, run_edge, run_simulation, stop_on_signal
from fedphd.deploy.local import part_of_data, run_local, toml_value
from fedphd.deploy.runs import VERDICT, check_client_data, check_data, open_client_data, run_folder
from fedphd.deploy.simulate import CLASSES, SOURCE

EXIT_HELP = (
    "Exit codes: 0 success, 1 internal error, 2 bad configuration, 3 could not start (for "
    "example a port in use), 4 too few participants, 5 connection lost, 130 interrupted."
)
START_HELP = "Try it on this machine: fedphd local. Every setting: fedphd config cloud."
EXAMPLE = "num_threads=4"
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="FedPhD: hierarchical federated training of diffusion models with Flower.\n\n"
    f"{START_HELP}\n\n{EXIT_HELP}",
)

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
    str, typer.Option(help="data set of the clients: digits, a Hugging Face name or a local path")
]
ClassesPerClient = Annotated[
    int, typer.Option(min=1, help="classes of images that each client holds")
]


class RoleName(StrEnum):
    """The roles that have a configuration."""

    cloud = "cloud"
    edge = "edge"
    client = "client"


ROLE_CONFIGS: dict[str, type[CloudConfig] | type[EdgeConfig] | type[ClientConfig]] = {
    "cloud": CloudConfig,
    "edge": EdgeConfig,
    "client": ClientConfig,
}


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


def end(verdict: Verdict) -> None:
    """End the process with the verdict's exit code, and say why if it is not success."""
    if verdict.exit_code:
        print(f"fedphd: {verdict.message}", file=sys.stderr, flush=True)
    raise typer.Exit(verdict.exit_code)


@app.command()
def cloud(
    config: ConfigFile = None,
    preset: Preset = None,
    address: Annotated[
        str | None,
        typer.Option(help="host:port that edges connect to", show_default="0.0.0.0:9092"),
    ] = None,
    run_dir: RunDir = None,
    settings: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run the cloud: it owns the training run, averages the edges, prunes and evaluates."""
    values = overrides({"preset": preset, "superlink.address": address}, settings)
    resolved = load_and_show(CloudConfig, config, values, dry_run=dry_run, check=check_data)
    with stop_on_signal() as stop:
        folder = run_folder(run_dir, resolved.out_dir)
        try:
            verdict = run_cloud(resolved, run_dir=folder, stop=stop, say=say)
        except FedPhDError as error:
            verdict = Verdict(exit_code_of(error), str(error))
            write_verdict(folder / VERDICT, verdict)
    end(verdict)


@app.command()
def edge(
    config: ConfigFile = None,
    edge_id: Annotated[
        str | None,
        typer.Option(help="name of this edge, unlike the others'", show_default="edge-0"),
    ] = None,
    cloud_address: Annotated[
        str | None,
        typer.Option("--cloud", help="host:port of the cloud", show_default="127.0.0.1:9092"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="host:port that clients connect to", show_default="0.0.0.0:9192"),
    ] = None,
    settings: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run an edge: it averages its clients every edge round and reports to the cloud."""
    flags = {"edge_id": edge_id, "cloud": cloud_address, "superlink.address": address}
    resolved = load_and_show(EdgeConfig, config, overrides(flags, settings), dry_run=dry_run)
    with stop_on_signal() as stop:
        verdict = run_edge(resolved, stop=stop, say=say)
    end(verdict)


@app.command()
def client(
    config: ConfigFile = None,
    client_id: Annotated[
        str | None,
        typer.Option(help="name of this client, unlike the others'", show_default="client-0"),
    ] = None,
    edges: Annotated[
        list[str] | None,
        typer.Option(
            "--edge",
            help="host:port of an edge; repeat it for every edge that the client may choose",
            show_default="127.0.0.1:9192",
        ),
    ] = None,
    partition: Annotated[
        int | None,
        typer.Option(
            help="which of data.partition.num_partitions parts of the data set is this "
            "client's, from 0",
            show_default="all of the data set",
        ),
    ] = None,
    settings: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run a client: one process that keeps its data and serves all its edges."""
    flags = {
        "client_id": client_id,
        "edges": edges or None,
        "data.partition.partition_id": partition,
    }
    # A client that starts opens its data anyway, so only a dry run does it here.
    check = open_client_data if dry_run else lambda config: None
    values = overrides(flags, settings)
    resolved = load_and_show(ClientConfig, config, values, dry_run=dry_run, check=check)
    # torch and diffusers take seconds to import; the other commands do without.
    from fedphd.client.resident import Resident

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with stop_on_signal() as stop:
        resident = Resident(
            resolved, stop=stop, say=lambda line: say(f"{resolved.client_id:<9} {line}")
        )
        verdict = resident.run()
        if stop.is_set() and resident.verdict is None:
            verdict = Verdict(Interrupted.exit_code, "interrupted")
    end(verdict)


@app.command()
def local(
    config: ConfigFile = None,
    preset: Preset = None,
    num_edges: NumEdges = None,
    num_clients: NumClients = None,
    data: Data = "digits",
    classes_per_client: ClassesPerClient = 2,
    run_dir: RunDir = None,
    settings: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run a whole federation on this machine: one cloud, edges and clients as processes."""
    flags = {
        "preset": preset,
        "schedule.num_edges": num_edges,
        "schedule.min_clients": num_clients,
    }

    def check(cloud: CloudConfig) -> None:
        check_data(cloud)
        part = part_of_data(cloud, 0, source=data, classes_per_client=classes_per_client)
        open_client_data(ClientConfig(data=part))

    # The processes look at their data themselves, so only a dry run does it here.
    checked = check if dry_run else lambda config: None
    values = overrides(flags, settings)
    resolved = load_and_show(CloudConfig, config, values, dry_run=dry_run, check=checked)
    with stop_on_signal() as stop:
        folder = run_folder(run_dir, resolved.out_dir)
        verdict = run_local(
            resolved,
            source=data,
            classes_per_client=classes_per_client,
            run_dir=folder,
            stop=stop,
            say=say,
        )
    end(verdict)


@app.command()
def simulate(
    config: ConfigFile = None,
    preset: Preset = None,
    num_edges: NumEdges = None,
    num_clients: NumClients = None,
    data: Data = "digits",
    classes_per_client: ClassesPerClient = 2,
    cpus: Annotated[
        int, typer.Option(min=1, help="CPU cores per client; fewer cores, fewer at a time")
    ] = 1,
    gpus: Annotated[float, typer.Option(min=0.0, help="GPUs per client, parts allowed")] = 0.0,
    run_dir: RunDir = None,
    settings: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Simulate a whole federation by Flower's simulation engine (Ray), with the same code."""
    flags = {
        "preset": preset,
        "schedule.num_edges": num_edges,
        "schedule.min_clients": num_clients,
    }

    def check(cloud: CloudConfig) -> None:
        check_data(cloud)
        part = part_of_data(cloud, 0, source=data, classes_per_client=classes_per_client)
        check_client_data(ClientConfig(data=part), cloud.num_classes)

    values = overrides(flags, settings)
    resolved = load_and_show(CloudConfig, config, values, dry_run=dry_run, check=check)
    clients = {SOURCE: data, CLASSES: classes_per_client, "seed": resolved.seed}
    federation = {
        "num-supernodes": resolved.schedule.min_clients,
        "client-resources-num-cpus": cpus,
        "client-resources-num-gpus": gpus,
    }
    with stop_on_signal() as stop:
        folder = run_folder(run_dir, resolved.out_dir)
        # Flower's home goes into the run's folder, so that simulations can run side by side.
        resolved = resolved.model_copy(update={"state_dir": folder / "state"})
        verdict = run_simulation(
            resolved, clients=clients, federation=federation, run_dir=folder, stop=stop, say=say
        )
    end(verdict)


@app.command("config")
def explain_config(
    role: Annotated[RoleName, typer.Argument(help="whose configuration")],
) -> None:
    """List every setting of a role with its default, range and meaning, as valid TOML."""
    say(f"# Settings of `fedphd {role.value}`, with their defaults. Into a file for --config")
    say("# belong only the lines that you change; or give one by --set KEY=VALUE.")
    say("# Names in _s are seconds.")
    # The cloud's settings start from a preset, so the fields' own defaults do not tell.
    for line in _explain(load_config(ROLE_CONFIGS[role.value]), ""):
        say(line)


def _explain(config: BaseModel, prefix: str, *, absent: bool = False) -> Iterator[str]:
    """Lines on all fields; those of an ``absent`` section are comments."""
    for name, field in type(config).model_fields.items():
        key, value = f"{prefix}{name}", getattr(config, name)
        section = section_class(field.annotation)
        if section is None:
            yield f"\n# {field.description}{_limits(field)}"
            comment = "# " if absent or value is None else ""
            yield f"{comment}{key} = {'(absent)' if value is None else toml_value(value)}"
            continue
        missing = absent or value is None
        meaning = field.description or str(section.__doc__).replace("``", "`")
        yield f"\n# {key}: {meaning}{' (absent by default)' if value is None else ''}"
        yield from _explain(value or section(), f"{key}.", absent=missing)


def _limits(field: FieldInfo) -> str:
    """The range of a field in words, from its annotation."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >="}
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]
    if get_origin(field.annotation) is Literal:
        limits.append(" | ".join(get_args(field.annotation)))
    return f"  [{', '.join(limits)}]" if limits else ""


def main() -> None:
    """Entry point: our own errors become one line and their exit code."""
    try:
        app()
    except FedPhDError as error:
        print(f"fedphd: {error}", file=sys.stderr, flush=True)
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)


if __name__ == "__main__":
    main()
