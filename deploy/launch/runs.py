"""A run's folder, and the role file in which a launcher tells a ServerApp what to run."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Self
from uuid import uuid4

from fedphd.common.config.data import DataConfig, Section
from fedphd.common.config.roles import CloudConfig, EdgeConfig
from fedphd.common.data.partition import PARTITION_FILE
from fedphd.common.errors import ConfigError, Interrupted, StartError, within
from fedphd.common.events import Event, Verdict, write_json
from fedphd.common.history.summary import SAMPLES, SUMMARY, Summary
from fedphd.common.wire.names import NAMES
from fedphd.deploy.launch.render import render, render_summary
from fedphd.deploy.launch.superlink import make_folder

EVENTS = "metrics.jsonl"
EDGE_EVENTS = "events.jsonl"
VERDICT = "verdict.json"
ROLE = "role.json"
CONFIG = "config.json"
SIMULATION = "simulation.json"
CLIENTS = "clients.json"
LOGS = "logs"
# How the line begins that says that everybody is being ended.
STOPPING = "stopping"
# The key of a run configuration that says where the role file is.
ROLE_FILE = "role-file"

Say = Callable[[str], None]
RoleName = Literal["cloud", "edge", "simulation"]


@dataclass(frozen=True)
class Resumed:
    """How far a run is that goes on: intervals, 0 for none, and what its event log holds.

    That are the cloud's events, and the bytes of everybody's.
    """

    interval: int = 0
    events: int = 0
    events_size: int = 0


@dataclass(frozen=True)
class RoleFile:
    """What a launcher hands over to the ServerApp: what to run, and where to write.

    ``names`` is the file with the names that nodes' keys are bound to; "" where anybody may join.
    ``cores`` are those on which clients are simulated, 0: this machine's.
    """

    role: RoleName
    config: dict[str, object]
    run_dir: str
    events: str
    verdict: str
    log: str
    names: str = ""
    resumed: bool = False
    events_before: int = 0
    events_size: int = 0
    cores: int = 0

    @classmethod
    def of(
        cls,
        role: RoleName,
        config: Section,
        folder: Path,
        resumed: Resumed | None = None,
        cores: int = 0,
    ) -> Self:
        """The hand-over of a role whose files all lie in ``folder``; ``resumed``: it goes on."""
        folder = folder.resolve()
        events, log = (EDGE_EVENTS, "edge.log") if role == "edge" else (EVENTS, "cloud.log")
        # A ServerApp that outlives a killed launcher must not leave its verdict to the next one.
        verdict = f"{uuid4().hex[:8]}-{VERDICT}"
        files = {"run_dir": "", "events": events, "verdict": verdict, "log": log}
        paths = {key: str(folder / name) for key, name in files.items()}
        so_far = resumed or Resumed()
        bound = isinstance(config, CloudConfig | EdgeConfig) and config.superlink.node_keys
        return cls(
            role=role,
            config=config.model_dump(mode="json"),
            **paths,
            # Simulated nodes have no keys.
            names=str(folder / NAMES) if bound and role != "simulation" else "",
            resumed=so_far.interval > 0,
            events_before=so_far.events,
            events_size=so_far.events_size,
            cores=cores,
        )

    @property
    def path(self) -> Path:
        """Where it is stored itself."""
        return Path(self.run_dir) / ROLE

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Give the verdict of this start the name that others know, once the block has ended."""
        for former in Path(self.run_dir).glob(f"*-{VERDICT}"):
            former.unlink(missing_ok=True)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                os.replace(self.verdict, Path(self.run_dir) / VERDICT)

    def write(self) -> None:
        """Store as JSON."""
        write_json(self.path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Load what ``write`` stored."""
        return cls(**json.loads(path.read_text("utf-8")))


def state_of(run_dir: Path) -> Path:
    """Where all that one command starts keeps its state: with the run, so that several can run."""
    return run_dir / "state"


def clients_folder(run_dir: Path) -> Path:
    """Where the training states of a simulation's clients are until it has ended well."""
    return state_of(run_dir) / "clients"


def new_run_dir(out_dir: Path) -> Path:
    """Make a new folder in ``out_dir``, named after the time; raise StartError if that fails."""
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        path = out_dir / f"{name}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StartError(
                f"out_dir = {out_dir}: cannot be written to: {error.strerror}; choose another"
            ) from error
        return path
    raise StartError(f"out_dir = {out_dir}: too many runs have started in this second; try again")


def run_folder(run_dir: Path | None, out_dir: Path) -> Path:
    """Make the folder of this run: ``run_dir``, or else a new one in ``out_dir``.

    Raises StartError if it cannot be created or written to, or if it already holds a run.
    """
    if run_dir is None:
        return new_run_dir(out_dir)
    make_folder(run_dir, "--run-dir")
    if (run_dir / EVENTS).exists():
        raise StartError(
            f"--run-dir = {run_dir}: already holds a run ({EVENTS}); choose another folder, or go "
            f"on with that run: --resume {run_dir}"
        )
    # A start that failed leaves a verdict, which must not be taken for this run's.
    (run_dir / VERDICT).unlink(missing_ok=True)
    return run_dir


def could_not_start(verdict: Verdict) -> bool:
    """Whether a run ended before it began."""
    return verdict.exit_code in (ConfigError.exit_code, StartError.exit_code)


def discard(run_dir: Path, verdict: Verdict) -> None:
    """Remove the folder of a run that did not start: nobody needs what is in it.

    It stays where the verdict names a file in it, or where there is a checkpoint.
    """
    failed = could_not_start(verdict)
    failed |= verdict.exit_code == Interrupted.exit_code and not (run_dir / CONFIG).exists()
    named = str(run_dir) in verdict.message
    if failed and not named:
        # It takes seconds to import.
        from fedphd.common.unet.checkpoint import CHECKPOINT, has_checkpoint

        if not has_checkpoint(run_dir / CHECKPOINT):
            shutil.rmtree(run_dir, ignore_errors=True)


def prepare(
    role: Literal["cloud", "simulation"],
    config: CloudConfig,
    run_dir: Path,
    resumed: Resumed | None = None,
    cores: int = 0,
) -> RoleFile:
    """Store the resolved configuration and the role file in ``run_dir``; return the latter."""
    file = RoleFile.of(role, config, run_dir, resumed, cores)
    write_json(run_dir / CONFIG, file.config)
    file.write()
    return file


def show_event(event: Event, say: Say) -> None:
    """Say an event's line for people, if it has one."""
    if line := render(event):
        say(line)


def show_summary(run_dir: Path, say: Say) -> None:
    """Say how a run ended, if it left a summary."""
    if (run_dir / SUMMARY).exists():
        say(f"\nfinished; everything is in {run_dir}")
        say(render_summary(Summary.read(run_dir)))
        say(f"  {'samples in':<18} {run_dir / SAMPLES}")


def check_data(config: CloudConfig, *, reference: str = "evaluation.reference") -> None:
    """Raise ConfigError if what the cloud needs is not there, or has other classes.

    ``reference`` is the section that says with which images samples are compared.
    """
    config.tracking.check_installed()
    evaluation = config.evaluation
    if evaluation.wants_inception or evaluation.features_file or evaluation.reference_file:
        from fedphd.common.quality.reference import check_features

        check_features(evaluation)
    if evaluation.reference:
        # What is imported here takes time, and an edge does not need it.
        from fedphd.common.data.labelled import LabelledData

        with within(reference):
            LabelledData(evaluation.reference).check_covers(config.num_classes)


@dataclass(frozen=True)
class Split:
    """How clients share a data set: a name to cite, and the number of each one's images."""

    name: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {min(self.sizes)} to {max(self.sizes)} images per client"

    def training_sizes(self, validation_fraction: float) -> tuple[int, ...]:
        """Images that each one trains on, without those that it holds out."""
        from fedphd.common.data.labelled import num_held_out

        return tuple(size - num_held_out(size, validation_fraction) for size in self.sizes)

    def write(self, run_dir: Path) -> None:
        """Store it for the run's summary."""
        write_json(run_dir / PARTITION_FILE, asdict(self))


def open_client_data(data: DataConfig, num_classes: int | None = None) -> Split:
    """Open a client's data.

    Raises ConfigError if it cannot be read or cut, or has more than ``num_classes`` classes.
    """
    from fedphd.common.data.labelled import LabelledData

    with within("data"):
        opened = LabelledData(data)
        if num_classes is not None:
            opened.check_classes(num_classes)
    return Split(opened.partition_name or "whole data set", opened.part_sizes)
