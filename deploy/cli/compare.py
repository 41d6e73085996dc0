"""``fedphd compare``."""

import shlex
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

from typer import Option, Typer

from fedphd.common.errors import ConfigError, FedPhDError, Interrupted
from fedphd.common.events import Verdict
from fedphd.deploy.cli import flags
from fedphd.deploy.compare.budget import Budget
from fedphd.deploy.compare.comparison import Comparison
from fedphd.deploy.compare.describe import describe, list_methods
from fedphd.deploy.compare.methods import Method, check_common, choose_methods, read_methods
from fedphd.deploy.compare.plan import CommonSettings, Plan, Tuning
from fedphd.deploy.compare.tuning import EXAMPLE, read_grid, take_over
from fedphd.deploy.launch.client_data import with_reference
from fedphd.deploy.launch.launchers import stop_on_signal
from fedphd.deploy.launch.leftovers import claimed
from fedphd.deploy.launch.superlink import make_folder
from fedphd.deploy.simulation.run_config import SimulatedClients

# In the comparison's folder while a process works there; hidden, since the folder may be committed.
CLAIM = ".compare-claim.json"
# In the signature these would count as given.
_BYTE_REFERENCE, _TUNING_SEEDS = "fedphd", "100,101"
MethodsFile = Annotated[
    Path | None,
    Option(
        help="TOML file with more methods: [NAME] with title, reference, topology or base, "
        "and [NAME.settings]",
        show_default="no file",
    ),
]
BudgetRule = Annotated[
    Budget,
    Option(
        metavar="BUDGET",
        help="rounds: equal local work and equal cloud rounds; cloud-bytes: equal bytes over "
        "the cloud's links",
    ),
]
Tune = Annotated[
    list[str] | None,
    Option(
        metavar="KEY=V,...",
        help=f"values that each method chooses among, such as {EXAMPLE}; repeat "
        "the flag for more settings, in the order of tuning",
        show_default="nothing is tuned",
    ),
]
CloudBytes = Annotated[
    int | None,
    Option(
        metavar="N",
        min=1,
        help="number of bytes of --budget cloud-bytes",
        show_default="what --byte-reference moved",
    ),
]
ByteReference = Annotated[
    str | None,
    Option(
        help="method whose run with the first seed and the common cloud rounds sets the bytes",
        show_default=_BYTE_REFERENCE,
    ),
]
TuningSeeds = Annotated[
    str | None,
    Option(help="seeds of --tune; no table of methods shows them", show_default=_TUNING_SEEDS),
]
TuningIntervals = Annotated[
    int | None,
    Option(metavar="N", min=1, help="cloud rounds of a tuning run", show_default="half of a run's"),
]


def compare(
    out: Annotated[
        Path, Option(help="folder of the comparison; the same command continues there")
    ] = Path("runs/compare"),
    methods: Annotated[
        str | None,
        Option(help="names, separated by commas; see --list", show_default="the paper's"),
    ] = None,
    methods_file: MethodsFile = None,
    seeds: Annotated[str, Option(help="one run per method and seed")] = "0,1,2",
    budget: BudgetRule = Budget.rounds,
    cloud_bytes: CloudBytes = None,
    byte_reference: ByteReference = None,
    tune: Tune = None,
    tuning_seeds: TuningSeeds = None,
    tuning_intervals: TuningIntervals = None,
    tuning_from: Annotated[
        Path | None,
        Option(help="folder of a comparison whose choices hold here too", show_default="none"),
    ] = None,
    jobs: Annotated[
        int, Option(metavar="N", min=1, help="runs at a time; each uses all free cores")
    ] = 1,
    config: flags.ConfigFile = None,
    preset: flags.Preset = None,
    num_edges: flags.NumEdges = None,
    num_clients: flags.NumClients = None,
    data: flags.Data = None,
    classes_per_client: flags.ClassesPerClient = None,
    cpus: flags.Cpus = 1,
    gpus: flags.Gpus = 0.0,
    settings: flags.Set = None,
    list_only: Annotated[bool, Option("--list", help="list the methods, start nothing")] = False,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="check, and print each method's settings and work; start nothing"),
    ] = False,
    report_only: Annotated[
        bool,
        Option("--report-only", help="write the report on the finished runs, start nothing"),
    ] = False,
) -> None:
    """Compare methods over seeds on one budget, each run simulated; write tables and plots."""
    known, table = read_methods(), read_methods(methods_file)
    if list_only:
        flags.say("\n".join(list_methods(table.values())))
        return
    if report_only:
        Comparison.stored(out, table)
        with _alone_in(out):
            _write_report(Comparison.stored(out, table), {})
        return
    of_bytes = {"--cloud-bytes": cloud_bytes, "--byte-reference": byte_reference}
    of_tuning = {"--tuning-seeds": tuning_seeds, "--tuning-intervals": tuning_intervals}
    if budget != Budget.cloud_bytes:
        _refuse(of_bytes, without="--budget cloud-bytes")
    if not tune:
        _refuse(of_tuning, without="--tune")
    if tune and tuning_from:
        raise ConfigError("--tune and --tuning-from: choose one of them")
    values, of_data = flags.take_flags(
        preset, num_edges, num_clients, data, classes_per_client, settings=settings
    )
    check_common(values := with_reference(values, of_data, config))
    common = CommonSettings(config, values, SimulatedClients(of_data, cpus=cpus, gpus=gpus), out)
    names = methods and [name.strip() for name in methods.split(",") if name.strip()]
    compared = choose_methods(table, names)
    asked = Plan(
        budget=budget,
        cloud_bytes=cloud_bytes,
        methods=[method.name for method in compared],
        seeds=_numbers(seeds, "--seeds"),
        common=common.fixed(),
        tuning=take_over(tuning_from, compared, table)
        if tuning_from
        else _tuning(common, tune, tuning_seeds, tuning_intervals),
        defined={name: method for name, method in table.items() if name not in known},
    )
    comparison = _comparison(common, asked, table, byte_reference)
    base = common.base()
    # Each seed has a split of its own; the first one stands for all.
    split = flags.open_split(base.model_copy(update={"seed": comparison.plan.seeds[0]}), of_data)
    if dry_run:
        flags.say("\n".join(describe(comparison, split)))
        return
    make_folder(out, "--out")
    with _alone_in(out):
        # Who worked there until now may have added methods and rows.
        verdict = _run(_comparison(common, asked, table, byte_reference), jobs)
    flags.end(verdict)


def _comparison(
    common: CommonSettings, asked: Plan, table: Mapping[str, Method], byte_reference: str | None
) -> Comparison:
    """What is ``asked`` for, and what its folder has already.

    Raises ConfigError if they do not fit together, or no method is the byte reference.
    """
    plan = asked.extending(common.out)
    known, name = plan.completing(table), byte_reference or _BYTE_REFERENCE
    if name not in known:
        raise ConfigError(f"--byte-reference {name}: unknown; choose among {', '.join(known)}")
    return Comparison(common, known, plan, name)


def _alone_in(out: Path) -> AbstractContextManager[None]:
    """Keep a comparison's folder to this process; raises StartError if another one works there.

    Two would take each other's runs for cut off, and forget each other's rows.
    """
    return claimed(out, name="--out", file=CLAIM)


def _refuse(given: Mapping[str, object], *, without: str) -> None:
    """Raise ConfigError if one of the flags that are ``given`` says nothing ``without`` another."""
    for flag, value in given.items():
        if value is not None:
            raise ConfigError(f"{flag} {value}: says nothing without {without}; give both or none")


def _run(comparison: Comparison, jobs: int) -> Verdict:
    """Run what is missing, and report on all finished runs even if some fail."""
    with stop_on_signal() as stop:
        failed = comparison.execute(jobs=jobs, stop=stop, say=flags.say)
    _write_report(comparison, failed)
    if stop.is_set():
        return Verdict(Interrupted.exit_code, "interrupted; the same command continues from here")
    if failed:
        text = (
            f"{len(failed)} run(s) failed: {', '.join(failed)}; the same command tries them again"
        )
        return Verdict(FedPhDError.exit_code, text)
    return Verdict()


def _write_report(comparison: Comparison, failed: Mapping[str, str]) -> None:
    for path in comparison.report(failed, command=shlex.join(["fedphd", *sys.argv[1:]])):
        flags.say(f"wrote     {path}")


def register(app: Typer) -> None:
    """Add the command to the ``fedphd`` command."""
    app.command()(compare)


def _tuning(
    common: CommonSettings, tune: list[str] | None, seeds: str | None, intervals: int | None
) -> Tuning | None:
    """What the flags of tuning say; None without any; raises ConfigError."""
    if not tune:
        return None
    grid = read_grid(tune)
    check_common(grid)
    base = common.base()
    if not base.evaluation.compares:
        raise ConfigError(
            "--tune: the value with the least distance is chosen, but samples are compared with "
            "nothing; set evaluation.reference (--set evaluation.reference.source=...), or leave "
            "--tune out"
        )
    return Tuning(
        grid=grid,
        seeds=_numbers(seeds or _TUNING_SEEDS, "--tuning-seeds"),
        intervals=intervals or max(1, base.schedule.intervals // 2),
    )


def _numbers(text: str, flag: str) -> list[int]:
    """``"0,1,2"`` -> ``[0, 1, 2]``; raises ConfigError that names the ``flag``."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{flag} {text}: write different whole numbers from 0, such as 0,1,2")
    return seeds
