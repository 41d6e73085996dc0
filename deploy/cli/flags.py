"""Flags that several commands of ``fedphd`` have, and how their values become a configuration."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from typer import Exit, Option

from fedphd.common.config.data import Section
from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.config.text import parse_settings
from fedphd.common.errors import ConfigError, FedPhDError, Interrupted, exit_code_of
from fedphd.common.events import Verdict, write_json, write_verdict
from fedphd.deploy.cli.bars import bar
from fedphd.deploy.launch.client_data import (
    CLASSES,
    SOURCE,
    is_own,
    part_of_data,
    take_data,
    with_reference,
)
from fedphd.deploy.launch.launchers import stop_on_signal
from fedphd.deploy.launch.leftovers import LAUNCHER, claimed
from fedphd.deploy.launch.resuming import (
    check_same_data,
    has_ended,
    holds_run,
    resumed_config,
    stored_data,
    wait_for_former,
)
from fedphd.deploy.launch.runs import (
    CLIENTS,
    VERDICT,
    Say,
    Split,
    check_data,
    could_not_start,
    discard,
    open_client_data,
    run_folder,
)
from fedphd.deploy.live.show import shown
from fedphd.deploy.report.leaving import leave_report
from fedphd.deploy.simulation.run_config import MIN_CLIENTS

NUM_EDGES_KEY = "schedule.num_edges"
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
        help="settings to start from: digits (minutes on 2 CPU cores), cifar10-16 (an hour), "
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
Resume = Annotated[
    Path | None,
    Option(
        "--resume",
        metavar="RUN",
        help="folder of a run that was interrupted: go on from its last whole interval; what "
        "defines the training must be as it was",
        show_default="a new run",
    ),
]
GoOn = Annotated[
    bool,
    Option("--go-on", help="--resume the run in --run-dir if it holds one, else begin it there"),
]
# A flag with two names would take a column of its own in each help.
NoReport = Annotated[
    bool, Option("--no-report", help="do not write report.html into the run's folder at the end")
]
DryRun = Annotated[
    bool, Option("--dry-run", help="check and print the configuration, start nothing")
]
Plain = Annotated[
    bool,
    Option(
        "--plain",
        help="a line for each event, as where the output is no terminal, in place of a picture of "
        "the federation that is refreshed",
    ),
]
Insecure = Annotated[
    bool,
    Option(
        "--insecure",
        help="plain text where there are no certificates: on a network that you trust",
    ),
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
    int | None,
    Option("--edges", metavar="N", help="number of edges", show_default="schedule.num_edges, 2"),
]
NumClients = Annotated[
    int | None,
    Option(
        "--clients",
        metavar="N",
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
ClassesPerClient = Annotated[
    int | None,
    Option(metavar="N", min=1, help="classes of images that each client holds", show_default="2"),
]
Cpus = Annotated[
    int, Option(metavar="N", min=1, help="CPU cores per client; fewer cores, fewer at a time")
]
Gpus = Annotated[float, Option(metavar="X", min=0.0, help="GPUs per client, parts allowed")]
RayAddress = Annotated[
    str | None,
    Option(
        metavar="HOST:PORT",
        envvar="RAY_ADDRESS",
        help="a running Ray cluster whose machines train the clients; all must see the run folder",
        show_default="Ray on this machine alone",
    ),
]


def say(line: str) -> None:
    """Print a line for people, at once and in one piece, since several threads print."""
    print(f"{line}\n", end="", flush=True)


def overrides(flags: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """The flags that were given, and ``--set``, which wins over them."""
    given = {key: value for key, value in flags.items() if value is not None}
    return {**given, **parse_settings(settings or ())}


def resumed_folder(resume: Path | None, run_dir: Path | None, *, go_on: bool) -> Path | None:
    """The folder of the run to go on with; None: a new one; raises ConfigError.

    Ends the process with success if that run has ended.
    """
    if resume and run_dir:
        raise ConfigError("--resume and --run-dir both name the run's folder; keep one of them")
    if go_on and run_dir is None:
        raise ConfigError("--go-on needs --run-dir, the folder that may hold a run")
    folder = run_dir if go_on and run_dir and holds_run(run_dir) else resume
    if folder and not folder.is_dir():
        raise ConfigError(
            f"--resume {folder}: there is no such folder; name that of a run that was cut off"
        )
    if folder and has_ended(folder):
        say(f"{folder}: the run has finished already; for more intervals begin a new one")
        raise Exit(0)
    return folder


def take_flags(
    preset: str | None,
    num_edges: int | None,
    num_clients: int | None,
    data: str | None,
    classes_per_client: int | None,
    settings: list[str] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags of a whole federation and ``--set``: settings of the cloud, and of clients' data."""
    flags = {"preset": preset, NUM_EDGES_KEY: num_edges, MIN_CLIENTS: num_clients}
    return take_data(overrides({**flags, SOURCE: data, CLASSES: classes_per_client}, settings))


def check_out(out: Path) -> None:
    """Raise ConfigError, before the work rather than after it, if ``out`` cannot be a file."""
    if not out.parent.is_dir() or out.is_dir():
        problem = "is a folder, or its folder does not exist; name a file to write"
        raise ConfigError(f"--out = {out}: {problem}")


def end_dry_run(config: Section, *, dry_run: bool) -> None:
    """On a dry run, print the checked configuration and end the process with success."""
    if dry_run:
        say(config.model_dump_json(indent=2))
        raise Exit(0)


def check_edges(topology: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError if a number of edges is given for a federation that has none."""
    if topology == "flat" and (given := values.get(NUM_EDGES_KEY)) is not None:
        raise ConfigError(
            f"--edges ({NUM_EDGES_KEY}) = {given}, but a flat federation has no edges: leave it "
            "out, or set topology=hierarchical"
        )


def open_split(config: CloudConfig, data: Mapping[str, Any]) -> Split:
    """How the clients share their data; raises ConfigError if it or the cloud's is unusable."""
    own, reference = part_of_data(config, 0, data), config.evaluation.reference
    with bar("reading data"):
        try:
            split = open_client_data(own, config.num_classes)
        except ConfigError as error:
            # Parts are clients here, which have flags.
            if "num_partitions" not in str(error):
                raise
            flags = "--clients (num_partitions) and --classes-per-client (classes_per_partition)"
            raise ConfigError(f"{error}; the flags are {flags}") from error
        # Where nothing else was said samples are compared with the clients' own images.
        section = "data" if is_own(reference, own) else "evaluation.reference"
        check_data(config, reference=section)
    return split


NoteOf = Callable[[CloudConfig], str | None]


def load_federation(
    path: Path | None,
    values: dict[str, Any],
    data: Mapping[str, Any],
    *,
    dry_run: bool,
    note_of: NoteOf = lambda _: None,
) -> tuple[CloudConfig, Mapping[str, Any], Split]:
    """Load a whole federation's configuration, as ``load_config``, and open its data.

    A dry run prints the configuration, beside it what ``note_of`` it there is to say, and ends
    here with success.
    """
    config = load_config(CloudConfig, path, with_reference(values, data, path))
    check_edges(config.topology, values)
    split = open_split(config, data)
    if dry_run:
        # Standard output is the configuration alone.
        for line in lines_before(split, note_of(config)):
            print(line, file=sys.stderr, flush=True)
    end_dry_run(config, dry_run=dry_run)
    return config, data, split


def lines_before(split: Split, note: str | None) -> list[str]:
    """What is said of a run before it starts."""
    return [f"data      {split}", *([f"note      {note}"] if note else [])]


@dataclass(frozen=True)
class Federation:
    """A whole federation's run: its configuration, its clients' data, and where it goes on.

    ``note`` is what there is to say before it starts.
    """

    config: CloudConfig
    data: Mapping[str, Any]
    split: Split
    resumed: Path | None = None
    note: str | None = None

    @classmethod
    def load(
        cls,
        path: Path | None,
        values: dict[str, Any],
        data: Mapping[str, Any],
        *,
        dry_run: bool,
        resumed: Path | None,
        note_of: NoteOf = lambda _: None,
    ) -> Self:
        """As ``load_federation``; a run that goes on has its own settings unless they are given.

        Raises ConfigError that names what is given otherwise than it was.
        """
        if resumed is None:
            loaded = load_federation(path, values, data, dry_run=dry_run, note_of=note_of)
            return cls(*loaded, note=note_of(loaded[0]))
        data_before = stored_data(resumed)
        data_now = {**data_before, **data}
        config = resumed_config(resumed, path, values)
        check_same_data(resumed, data_before, data_now)
        end_dry_run(config, dry_run=dry_run)
        split = open_split(config, data_before)
        return cls(config, data_before, split, resumed, note_of(config))

    @contextmanager
    def begin(self, run_dir: Path | None, *, plain: bool, report: bool) -> Iterator["Begun"]:
        """Make the run's folder unless it goes on, and show what happens there, as ``shown``.

        A folder that it made in ``out_dir`` is removed again where the run could not start. A
        ``report`` is written at the end, also where the block raises FedPhDError.
        """
        with ExitStack() as stack:
            stop = stack.enter_context(stop_on_signal())
            folder = self.resumed or run_folder(run_dir, self.config.out_dir)
            # Its cloud is a process of its own, which claims the folder in the same way.
            stack.enter_context(claimed(folder, name="the run's folder", file=LAUNCHER))
            if self.resumed is not None:
                wait_for_former(folder)
                # Whatever happens next, it is not what ended the run before.
                (folder / VERDICT).unlink(missing_ok=True)
            self.split.write(folder)
            write_json(folder / CLIENTS, dict(self.data))
            begun = Begun(folder, stop, say)
            try:
                with shown(folder, say, self.config, plain=plain) as begun.say:
                    for line in lines_before(self.split, self.note):
                        begun.say(line)
                    yield begun
            except FedPhDError as error:
                begun.verdict = Verdict(exit_code_of(error), str(error))
                if not (folder / VERDICT).exists():
                    write_verdict(folder / VERDICT, begun.verdict)
                raise
            finally:
                if self.resumed is None and run_dir is None:
                    discard(folder, begun.verdict)
                if report and folder.exists() and not could_not_start(begun.verdict):
                    leave_report(folder, say)
                if begun.verdict.exit_code == Interrupted.exit_code and holds_run(folder):
                    say(f"to go on  the same command with --resume {folder}")


@dataclass
class Begun:
    """A run that begins: its folder, the event that signals set, and what takes its lines.

    ``verdict`` is how it ended.
    """

    folder: Path
    stop: threading.Event
    say: Say
    verdict: Verdict = field(default_factory=Verdict)


def end(verdict: Verdict, *, name: str = "") -> None:
    """End the process with the verdict's exit code, and print why if it is not success.

    Success of the participant ``name`` gets a line too; "": of nobody.
    """
    if verdict.exit_code:
        print(f"fedphd: {verdict.message}", file=sys.stderr, flush=True)
    elif name:
        say(f"{name:<9} ends: the run is over")
    raise Exit(verdict.exit_code)
