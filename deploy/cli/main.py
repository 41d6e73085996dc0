"""The ``fedphd`` command."""

import logging
import os
import sys
from importlib import metadata
from typing import Annotated

from typer import Exit, Option, Typer

from fedphd.common.allocator import keep_freed_memory
from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig, load_config
from fedphd.common.errors import FedPhDError, Interrupted, exit_code_of
from fedphd.common.events import Verdict, write_verdict
from fedphd.common.history.status import StatusBoard
from fedphd.deploy.cli import compare, flags
from fedphd.deploy.cli.checkpoint import evaluate, sample
from fedphd.deploy.cli.explain import explain_config
from fedphd.deploy.cli.features import features_app, statistics
from fedphd.deploy.cli.hints import Commands
from fedphd.deploy.cli.keys import keys_app
from fedphd.deploy.cli.preflight import preflight
from fedphd.deploy.cli.pseudo_labels import pseudo_labels
from fedphd.deploy.cli.report import report as write_report
from fedphd.deploy.cli.share import export, push
from fedphd.deploy.cli.status import status
from fedphd.deploy.cli.top import top
from fedphd.deploy.launch.credentials import check_node, check_server
from fedphd.deploy.launch.health import serving
from fedphd.deploy.launch.launchers import run_cloud, run_edge, stop_on_signal
from fedphd.deploy.launch.leftovers import claimed
from fedphd.deploy.launch.local import run_local
from fedphd.deploy.launch.needs import advice_here
from fedphd.deploy.launch.resuming import AWAITED, resumed_config, rewind
from fedphd.deploy.launch.runs import (
    VERDICT,
    check_data,
    could_not_start,
    discard,
    open_client_data,
    run_folder,
    state_of,
)
from fedphd.deploy.launch.versions import check_flower
from fedphd.deploy.report.leaving import leave_report
from fedphd.deploy.simulation.cluster import Cluster
from fedphd.deploy.simulation.launcher import run_simulation
from fedphd.deploy.simulation.run_config import SimulatedClients

EXIT_HELP = (
    "Exit codes: 0 success, 1 internal error, 2 bad configuration, 3 could not start (for "
    "example a port in use), 4 too few participants, 5 connection lost, 130 interrupted."
)
START_HELP = "Try it on this machine: fedphd local. Every setting: fedphd config cloud."
app = Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    # click does that by itself.
    suggest_commands=False,
    pretty_exceptions_enable=False,
    help="FedPhD: hierarchical federated training of diffusion models with Flower.\n\n"
    f"{START_HELP}\n\n{EXIT_HELP}",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fedphd {metadata.version('fedphd')}")
        raise Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def cloud(
    config: flags.ConfigFile = None,
    preset: flags.Preset = None,
    address: Annotated[
        str | None, Option(help="host:port that edges connect to", show_default="0.0.0.0:9092")
    ] = None,
    run_dir: flags.RunDir = None,
    resume: flags.Resume = None,
    go_on: flags.GoOn = False,
    insecure: flags.Insecure = False,
    settings: flags.Set = None,
    no_report: flags.NoReport = False,
    dry_run: flags.DryRun = False,
) -> None:
    """Run the cloud: it owns the training run, averages the edges, prunes and evaluates."""
    own = {"preset": preset, "superlink.address": address, "superlink.insecure": insecure or None}
    values = flags.overrides(own, settings)
    former = flags.resumed_folder(resume, run_dir, go_on=go_on)
    if former:
        resolved = resumed_config(former, config, values, free=AWAITED)
    else:
        resolved = load_config(CloudConfig, config, values)
    resolved.superlink.check_protected()
    check_server(resolved.superlink)
    check_data(resolved)
    flags.end_dry_run(resolved, dry_run=dry_run)
    with stop_on_signal() as stop:
        folder = former or run_folder(run_dir, resolved.out_dir)
        with claimed(folder, name="the run's folder"):
            try:
                resumed = rewind(folder, resolved.state_dir, flags.say) if former else None
                verdict = run_cloud(
                    resolved, run_dir=folder, stop=stop, say=flags.say, resumed=resumed
                )
            except FedPhDError as error:
                verdict = Verdict(exit_code_of(error), str(error))
                write_verdict(folder / VERDICT, verdict)
        if former is None and run_dir is None:
            discard(folder, verdict)
        if folder.exists() and not (no_report or could_not_start(verdict)):
            leave_report(folder, flags.say)
    flags.end(verdict)


@app.command()
def edge(
    config: flags.ConfigFile = None,
    edge_id: Annotated[
        str | None, Option(help="name of this edge, unique among the edges", show_default="edge-0")
    ] = None,
    cloud_address: Annotated[
        str | None, Option("--cloud", help="host:port of the cloud", show_default="127.0.0.1:9092")
    ] = None,
    address: Annotated[
        str | None, Option(help="host:port that clients connect to", show_default="0.0.0.0:9192")
    ] = None,
    insecure: flags.Insecure = False,
    settings: flags.Set = None,
    dry_run: flags.DryRun = False,
) -> None:
    """Run an edge: it averages its clients every edge round and reports to the cloud."""
    own = {
        "edge_id": edge_id,
        "cloud": cloud_address,
        "superlink.address": address,
        "superlink.insecure": insecure or None,
        "node.insecure": insecure or None,
    }
    resolved = load_config(EdgeConfig, config, flags.overrides(own, settings))
    resolved.superlink.check_protected()
    resolved.node.check_protected()
    check_server(resolved.superlink)
    check_node(resolved.node)
    flags.end_dry_run(resolved, dry_run=dry_run)
    with stop_on_signal() as stop:
        verdict = run_edge(resolved, stop=stop, say=flags.say)
    flags.end(verdict, name=resolved.edge_id)


@app.command()
def client(
    config: flags.ConfigFile = None,
    client_id: Annotated[
        str | None,
        Option(help="name of this client, unique among the clients", show_default="client-0"),
    ] = None,
    edges: Annotated[
        list[str] | None,
        Option(
            "--edge",
            help="host:port of an edge; repeat it for every edge that the client may choose",
            show_default="127.0.0.1:9192",
        ),
    ] = None,
    partition: Annotated[
        int | None,
        Option(
            metavar="N",
            help="number, from 0, of this client's part of the data set, of "
            "data.partition.num_partitions",
            show_default="all of the data set",
        ),
    ] = None,
    insecure: flags.Insecure = False,
    settings: flags.Set = None,
    dry_run: flags.DryRun = False,
) -> None:
    """Run a client: one process that keeps its data and serves all its edges."""
    own = {
        "client_id": client_id,
        "edges": edges or None,
        "data.partition.partition_id": partition,
        "node.insecure": insecure or None,
    }
    resolved = load_config(ClientConfig, config, flags.overrides(own, settings))
    resolved.node.check_protected()
    check_node(resolved.node)
    # A client that starts opens them anyway.
    if dry_run:
        open_client_data(resolved.data)
    flags.end_dry_run(resolved, dry_run=dry_run)
    check_flower()
    keep_freed_memory()
    with claimed(resolved.state_folder, name="state_dir"):
        verdict = serve_client(resolved)
    flags.end(verdict, name=resolved.client_id)


def serve_client(resolved: ClientConfig) -> Verdict:
    """Run a client until the run is over or a signal comes."""
    from fedphd.common.data.apart import Opening

    # While it is opened, this process imports torch and diffusers: seconds, which other commands
    # should not pay for.
    opening = Opening.begin(resolved.data)
    from fedphd.client.resident import Resident

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for library in ("flwr", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    name = resolved.client_id
    board = StatusBoard("client", name)
    with stop_on_signal() as stop:
        resident = Resident(
            resolved,
            stop=stop,
            say=lambda line: flags.say(f"{name:<9} {line}"),
            status=board,
            opening=opening,
        )
        # Only now, with its data loaded, can it be ready.
        with serving(resolved.health, board, resolved.state_folder):
            verdict = resident.run()
        if stop.is_set() and resident.verdict is None:
            verdict = Verdict(Interrupted.exit_code, "interrupted")
    return verdict


@app.command()
def local(
    config: flags.ConfigFile = None,
    preset: flags.Preset = None,
    num_edges: flags.NumEdges = None,
    num_clients: flags.NumClients = None,
    data: flags.Data = None,
    classes_per_client: flags.ClassesPerClient = None,
    run_dir: flags.RunDir = None,
    resume: flags.Resume = None,
    go_on: flags.GoOn = False,
    plain: flags.Plain = False,
    settings: flags.Set = None,
    no_report: flags.NoReport = False,
    dry_run: flags.DryRun = False,
) -> None:
    """Run a whole federation on this machine: one cloud, edges and clients as processes."""
    values, of_data = flags.take_flags(
        preset, num_edges, num_clients, data, classes_per_client, settings
    )
    former = flags.resumed_folder(resume, run_dir, go_on=go_on)
    run = flags.Federation.load(
        config, values, of_data, dry_run=dry_run, resumed=former, note_of=advice_here
    )
    with run.begin(run_dir, plain=plain, report=not no_report) as begun:
        begun.verdict = run_local(
            run.config,
            data=run.data,
            run_dir=begun.folder,
            stop=begun.stop,
            say=begun.say,
            resumed=former is not None,
        )
    flags.end(begun.verdict)


@app.command()
def simulate(
    config: flags.ConfigFile = None,
    preset: flags.Preset = None,
    num_edges: flags.NumEdges = None,
    num_clients: flags.NumClients = None,
    data: flags.Data = None,
    classes_per_client: flags.ClassesPerClient = None,
    cpus: flags.Cpus = 1,
    gpus: flags.Gpus = 0.0,
    ray_address: flags.RayAddress = None,
    run_dir: flags.RunDir = None,
    resume: flags.Resume = None,
    go_on: flags.GoOn = False,
    plain: flags.Plain = False,
    settings: flags.Set = None,
    no_report: flags.NoReport = False,
    dry_run: flags.DryRun = False,
) -> None:
    """Simulate a whole federation in Flower's simulation engine (Ray), with the same code."""
    values, of_data = flags.take_flags(
        preset, num_edges, num_clients, data, classes_per_client, settings
    )
    former = flags.resumed_folder(resume, run_dir, go_on=go_on)
    run = flags.Federation.load(config, values, of_data, dry_run=dry_run, resumed=former)
    clients = SimulatedClients(run.data, cpus=cpus, gpus=gpus)
    cluster = Cluster.at(ray_address) if ray_address else None
    with run.begin(run_dir, plain=plain, report=not no_report) as begun:
        resumed = rewind(begun.folder, state_of(begun.folder), begun.say) if former else None
        begun.verdict = run_simulation(
            run.config,
            clients=clients,
            run_dir=begun.folder,
            stop=begun.stop,
            say=begun.say,
            resumed=resumed,
            cluster=cluster,
        )
    flags.end(begun.verdict)


compare.register(app)
app.command("pseudo-labels")(pseudo_labels)
app.command("config")(explain_config)
app.command("report")(write_report)
for command in (evaluate, sample, export, push, statistics, status, top, preflight):
    app.command()(command)
app.add_typer(features_app, name="features")
app.add_typer(keys_app, name="keys")


def main() -> None:
    """Entry point: our own errors become a message and their exit code."""
    # For what it starts by `python -c`, which would import what lies in the current folder under
    # the name of a library.
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        app()
    except FedPhDError as error:
        print(f"fedphd: {error}", file=sys.stderr, flush=True)
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
