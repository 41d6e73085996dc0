"""The ``fedphd`` command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedphd.common.config.roles import (
    ClientConfig,
    CloudConfig,
    EdgeConfig,
    load_config,
    section_class,
)
from fedphd.common.errors import FedPhDError, Interrupted, exit_code_of
from fedphd.common.events import Verdict, write_verdict
from fedphd.deploy.cli import checkpoint, features
from fedphd.deploy.cli.compare import register as register_compare
from fedphd.deploy.cli.flags import (
    ClassesPerClient,
    ConfigFile,
    Data,
    DryRun,
    NumClients,
    NumEdges,
    Preset,
    RunDir,
    Set,
    end,
    load_and_show,
    overrides,
    say,
    take_flags,
)
from fedphd.deploy.cli.pseudo_labels import register as register_pseudo_labels
from fedphd.deploy.launch.launchers import run_cloud, run_edge, stop_on_signal
from fedphd.deploy.launch.local import part_of_data, run_local, toml_value
from fedphd.deploy.launch.runs import VERDICT, Split, check_data, open_client_data, run_folder
from fedphd.deploy.simulation.launcher import run_simulation
from fedphd.deploy.simulation.run_config import SimulatedClients

EXIT_HELP = (
    "Exit codes: 0 success, 1 internal error, 2 bad configuration, 3 could not start (for "
    "example a port in use), 4 too few participants, 5 connection lost, 130 interrupted."
)
START_HELP = "Try it on this machine: fedphd local. Every setting: fedphd config cloud."
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="FedPhD: hierarchical federated training of diffusion models with Flower.\n\n"
    f"{START_HELP}\n\n{EXIT_HELP}",
)


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
    end(verdict, name=resolved.edge_id)


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
    check = _open_data if dry_run else lambda config: None
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
    end(verdict, name=resolved.client_id)


@app.command()
def local(
    config: ConfigFile = None,
    preset: Preset = None,
    num_edges: NumEdges = None,
    num_clients: NumClients = None,
    data: Data = None,
    classes_per_client: ClassesPerClient = 2,
    run_dir: RunDir = None,
    settings: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run a whole federation on this machine: one cloud, edges and clients as processes."""
    values, of_data = take_flags(
        preset, num_edges, num_clients, data, classes_per_client, settings=settings
    )
    splits: list[Split] = []
    check = _checks(of_data, splits, show=dry_run)
    resolved = load_and_show(CloudConfig, config, values, dry_run=dry_run, check=check)
    with stop_on_signal() as stop:
        folder = run_folder(run_dir, resolved.out_dir)
        say(f"data      {splits[0]}")
        splits[0].write(folder)
        verdict = run_local(resolved, data=of_data, run_dir=folder, stop=stop, say=say)
    end(verdict)


@app.command()
def simulate(
    config: ConfigFile = None,
    preset: Preset = None,
    num_edges: NumEdges = None,
    num_clients: NumClients = None,
    data: Data = None,
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
    values, of_data = take_flags(
        preset, num_edges, num_clients, data, classes_per_client, settings=settings
    )
    splits: list[Split] = []
    check = _checks(of_data, splits, show=dry_run)
    resolved = load_and_show(CloudConfig, config, values, dry_run=dry_run, check=check)
    clients = SimulatedClients(of_data, cpus=cpus, gpus=gpus)
    with stop_on_signal() as stop:
        folder = run_folder(run_dir, resolved.out_dir)
        say(f"data      {splits[0]}")
        splits[0].write(folder)
        verdict = run_simulation(resolved, clients=clients, run_dir=folder, stop=stop, say=say)
    end(verdict)


def _open_data(config: ClientConfig) -> None:
    open_client_data(config.data)


def _checks(
    data: dict[str, object], splits: list[Split], *, show: bool
) -> Callable[[CloudConfig], None]:
    """A check of the cloud's and the clients' data, which also tells how the latter is split."""

    def check(cloud: CloudConfig) -> None:
        check_data(cloud)
        part = part_of_data(cloud, 0, data)
        splits.append(open_client_data(part, cloud.num_classes))
        if show:
            # Standard output is the configuration alone.
            print(f"data      {splits[0]}", file=sys.stderr, flush=True)

    return check


register_compare(app)
register_pseudo_labels(app)


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


checkpoint.register(app)
features.register(app)


def main() -> None:
    """Entry point: our own errors become one line and their exit code."""
    try:
        app()
    except FedPhDError as error:
        print(f"fedphd: {error}", file=sys.stderr, flush=True)
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
