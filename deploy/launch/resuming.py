"""Let a run go on in its folder: from its last whole interval, or from the start without one."""

import json
import time
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any, Final

from fedphd.common.config.roles import CloudConfig, load_config, validate
from fedphd.common.config.text import differences, flattened, with_overrides
from fedphd.common.errors import ConfigError, StartError
from fedphd.common.files import replaced
from fedphd.common.history.events import parsed
from fedphd.common.history.summary import SUMMARY
from fedphd.deploy.launch.client_data import CLIENT_DEFAULTS, PRESET, UNSET, says_reference
from fedphd.deploy.launch.leftovers import end_leftovers, user_of
from fedphd.deploy.launch.local import merge_events
from fedphd.deploy.launch.runs import (
    CLIENTS,
    CONFIG,
    EDGE_EVENTS,
    EVENTS,
    VERDICT,
    Resumed,
    Say,
    state_of,
)

FORMER_S: Final = 10.0
_LOOK_S: Final = 0.1


def holds_run(run_dir: Path) -> bool:
    """Whether a run has begun in the folder."""
    return (run_dir / CONFIG).exists()


def has_ended(run_dir: Path) -> bool:
    """Whether the run in the folder has done all its intervals."""
    return (run_dir / SUMMARY).exists()


def stored_config(run_dir: Path) -> CloudConfig:
    """The configuration of the run in ``run_dir``; raises ConfigError if there is none."""
    path = run_dir / CONFIG
    if run_dir.is_dir() and not path.exists():
        raise ConfigError(
            f"--resume {run_dir}: no run has begun there ({CONFIG} is missing); start a new one"
        )
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume {run_dir}: no run to go on with: {error}") from error
    return validate(CloudConfig, values, source=str(path))


def stored_data(run_dir: Path) -> dict[str, Any]:
    """The settings of the clients' data of a whole federation's run; raises ConfigError."""
    path = run_dir / CLIENTS
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--resume {run_dir}: it was not started by this command: {error}"
        ) from error


def wait_for_former(run_dir: Path, *, within_s: float = FORMER_S) -> None:
    """Wait until nobody of a federation whose launcher was killed uses the run's folder any more.

    Its cloud and edges end by themselves, but write into it as long as they run.

    Raises:
        StartError: one of them still does after ``within_s`` seconds.
    """
    deadline_s = time.monotonic() + within_s
    for folder in (run_dir, *sorted(state_of(run_dir).glob("*"))):
        while (pid := user_of(folder)) is not None:
            if time.monotonic() > deadline_s:
                raise StartError(
                    f"the run's folder = {run_dir}: process {pid} still uses it; stop that process"
                )
            time.sleep(_LOOK_S)


# How many a cloud waits for: whoever is gone for good need not be waited for again.
AWAITED: Final = ("schedule.num_edges", "schedule.min_clients")


def resumed_config(
    run_dir: Path, path: Path | None, values: Mapping[str, Any], *, free: Collection[str] = ()
) -> CloudConfig:
    """The configuration of a run that goes on: its own, and over it the settings that are given.

    A file, or a preset, says all of it again, but for what samples are compared with, which may
    have followed from the clients' data. The dotted settings that are ``free`` may change. Raises
    ConfigError that names what else differs in the training run.
    """
    before = stored_config(run_dir)
    own = before.model_dump(mode="json")
    if path or PRESET in values:
        followed = {"evaluation.reference": own["evaluation"]["reference"]}
        stored = {} if says_reference(values, path) else followed
        config = load_config(CloudConfig, path, {**stored, **values})
    else:
        config = validate(CloudConfig, with_overrides(own, values), source="command line")
    check_unchanged(run_dir, before, config, free)
    return config


def check_unchanged(
    run_dir: Path, before: CloudConfig, now: CloudConfig, free: Collection[str] = ()
) -> None:
    """Raise ConfigError that names the settings of the training run that differ.

    How long participants are waited for may change, and what is ``free``.
    """
    plans = (c.federation().model_dump(mode="json", exclude={"waits"}) for c in (before, now))
    old, new = ({k: v for k, v in flattened(plan) if k not in free} for plan in plans)
    if found := differences(old, new):
        raise ConfigError(
            f"--resume {run_dir}: the run was started with other settings: {found}; set them as "
            "they were, or start a new run"
        )


def check_same_data(run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError that names what the clients' data differ in."""
    old, new = (
        {k: UNSET if v is None else v for k, v in {**CLIENT_DEFAULTS, **data}.items()}
        for data in (before, now)
    )
    if found := differences(old, new):
        raise ConfigError(
            f"--resume {run_dir}: the clients had other data: {found}; set them as they were, or "
            "leave them out"
        )


def rewind(run_dir: Path, state_dir: Path, say: Say) -> Resumed:
    """Bring the files of a run back to its last whole interval; says how far that is.

    What a killed launcher left running in ``state_dir`` is ended before: it would write on.

    Raises ConfigError if its checkpoint cannot be used; StartError if ``state_dir`` is in use.
    """
    end_leftovers(state_dir)
    # They take seconds to import, and most starts need none of them.
    from fedphd.common.history.progress import Progress
    from fedphd.common.unet.checkpoint import CHECKPOINT, has_checkpoint

    events, checkpoint = run_dir / EVENTS, run_dir / CHECKPOINT
    # First, since it refuses a damaged one: then everything stays as it is.
    progress = Progress.read(checkpoint) if has_checkpoint(checkpoint) else None
    for name in (VERDICT, SUMMARY):
        (run_dir / name).unlink(missing_ok=True)
    # A local run that was killed has its edges' events still in their folders.
    if edges := sorted(run_dir.glob(f"state/edge-*/{EDGE_EVENTS}")):
        merge_events(events, edges)
    if progress is None:
        events.unlink(missing_ok=True)
        say(f"resuming  {run_dir}: no interval was finished, it begins anew")
        return Resumed()
    say(f"resuming  {run_dir} after interval {progress.interval} of {progress.intervals}")
    evaluated = {record.interval for record in progress.reported.evaluations}
    count, size = keep_events(events, progress.events, evaluated)
    return Resumed(progress.interval, count, size)


def keep_events(
    path: Path, count: int, evaluated: Container[int | None] = frozenset()
) -> tuple[int, int]:
    """Cut an event log after the cloud's event number ``count``.

    Of what follows only evaluations after the intervals ``evaluated`` stay. Returns the number of
    the cloud's events that are left, and the log's size in bytes.

    Raises ConfigError if it has fewer; names the lines that are no events.
    """
    kept, seen, broken = [], 0, []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        # None where a machine that lost its power left something else.
        if (event := parsed(line)) is None:
            broken.append(number)
            continue
        is_cloud = event.get("role") == "cloud"
        if seen < count or (is_cloud and _is_evaluation(event, evaluated)):
            kept.append(line)
            seen += is_cloud
    if seen < count:
        where = f" (not an event: line {', '.join(map(str, broken))})" if broken else ""
        raise ConfigError(
            f"{path} has {seen} events of the cloud{where}, but the checkpoint beside it was made "
            f"after {count}; put the whole log back"
        )
    content = b"".join(kept)
    with replaced(path) as beside:
        beside.write_bytes(content)
    return seen, len(content)


def _is_evaluation(event: Mapping[str, Any], intervals: Container[int | None]) -> bool:
    return event.get("event") == "evaluated" and event.get("interval") in intervals
