"""``fedphd compare``."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fedphd.common.errors import ConfigError, FedPhDError, Interrupted
from fedphd.common.events import Verdict
from fedphd.deploy.cli import flags
from fedphd.deploy.cli.flags import end, say
from fedphd.deploy.compare.budget import Budget
from fedphd.deploy.compare.comparison import Comparison
from fedphd.deploy.compare.describe import describe, list_methods
from fedphd.deploy.compare.methods import check_common, choose_methods, read_methods
from fedphd.deploy.compare.plan import CommonSettings, Plan
from fedphd.deploy.launch.launchers import stop_on_signal
from fedphd.deploy.launch.superlink import make_folder
from fedphd.deploy.simulation.run_config import SimulatedClients

Out = Annotated[
    Path, typer.Option(help="folder of the comparison; the same command continues there")
]
Methods = Annotated[
    str | None,
    typer.Option(help="names, separated by commas; see --list", show_default="the paper's"),
]
MethodsFile = Annotated[
    Path | None,
    typer.Option(
        help="TOML file with more methods: [NAME] with title, reference, topology or base, and "
        "[NAME.settings]",
        show_default="no file",
    ),
]
Seeds = Annotated[str, typer.Option(help="one run per method and seed")]
BudgetChoice = Annotated[
    Budget,
    typer.Option(
        help="rounds: equal local work and equal cloud rounds; cloud-bytes: equal bytes over the "
        "cloud's links"
    ),
]
CloudBytes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="number of bytes of --budget cloud-bytes",
        show_default="what --byte-reference moved",
    ),
]
ByteReference = Annotated[
    str,
    typer.Option(
        help="method whose run with the first seed and the common cloud rounds sets the bytes"
    ),
]
Jobs = Annotated[int, typer.Option(min=1, help="runs at a time; each uses all free cores")]
List = Annotated[bool, typer.Option("--list", help="list the methods, start nothing")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="check, and print each method's settings and work; start nothing"
    ),
]
ReportOnly = Annotated[
    bool, typer.Option("--report-only", help="write the report on the finished runs, start nothing")
]


def compare(
    out: Out = Path("runs/compare"),
    methods: Methods = None,
    methods_file: MethodsFile = None,
    seeds: Seeds = "0,1,2",
    budget: BudgetChoice = Budget.rounds,
    cloud_bytes: CloudBytes = None,
    byte_reference: ByteReference = "fedphd",
    jobs: Jobs = 1,
    config: flags.ConfigFile = None,
    preset: flags.Preset = None,
    num_edges: flags.NumEdges = None,
    num_clients: flags.NumClients = None,
    data: flags.Data = None,
    classes_per_client: flags.ClassesPerClient = 2,
    cpus: flags.Cpus = 1,
    gpus: flags.Gpus = 0.0,
    settings: flags.Set = None,
    list_only: List = False,
    dry_run: DryRun = False,
    report_only: ReportOnly = False,
) -> None:
    """Compare methods over seeds on one budget, each run simulated; write tables and plots."""
    table = read_methods(methods_file)
    if list_only:
        for line in list_methods(table.values()):
            say(line)
        return
    if report_only:
        _write_report(Comparison.stored(out, table), {})
        return
    values, of_data = flags.take_flags(
        preset, num_edges, num_clients, data, classes_per_client, settings=settings
    )
    check_common(values)
    clients = SimulatedClients(of_data, cpus=cpus, gpus=gpus)
    common = CommonSettings(config, values, clients, out)
    names = methods and [name.strip() for name in methods.split(",") if name.strip()]
    plan = Plan(
        budget=budget,
        cloud_bytes=cloud_bytes,
        methods=[method.name for method in choose_methods(table, names)],
        seeds=_numbers(seeds),
        common=common.fixed(),
    )
    comparison = Comparison(common, table, plan.extending(out), byte_reference)
    base = common.base()
    # Each seed has a split of its own; the first one stands for all.
    split = flags.open_split(base.model_copy(update={"seed": comparison.plan.seeds[0]}), of_data)
    if dry_run:
        for line in describe(comparison, split):
            say(line)
        return
    make_folder(out, "--out")
    end(_run(comparison, jobs))


def _run(comparison: Comparison, jobs: int) -> Verdict:
    """Run what is missing, and report on all finished runs even if some fail."""
    with stop_on_signal() as stop:
        failed = comparison.execute(jobs=jobs, stop=stop, say=say)
    _write_report(comparison, failed)
    if stop.is_set():
        return Verdict(Interrupted.exit_code, "interrupted; the same command continues from here")
    if failed:
        names = ", ".join(failed)
        text = f"{len(failed)} run(s) failed: {names}; the same command tries them again"
        return Verdict(FedPhDError.exit_code, text)
    return Verdict()


def _write_report(comparison: Comparison, failed: Mapping[str, str]) -> None:
    command = shlex.join(["fedphd", *sys.argv[1:]])
    for path in comparison.report(failed, command=command):
        say(f"wrote     {path}")


def register(app: typer.Typer) -> None:
    """Add the command to the ``fedphd`` command."""
    app.command()(compare)


def _numbers(text: str) -> list[int]:
    """``"0,1,2"`` -> ``[0, 1, 2]``; raises ConfigError."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text}: write different whole numbers from 0, such as 0,1,2")
    return seeds
