"""Run one role on this machine to its end: SuperLink, ServerApp, verdict."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from fedphd.common.config import ClientConfig, CloudConfig, EdgeConfig
from fedphd.common.errors import EXIT_OK, FedPhDError, Interrupted, StartError
from fedphd.common.events import Verdict, read_verdict, write_json
from fedphd.deploy.render import Tail, render, render_summary
from fedphd.deploy.roles import RoleFile
from fedphd.deploy.superlink import SuperLink, make_folder

POLL_S = 0.1
SERVERAPP_S = 60.0
GRACE_S = 2.5
EVENTS = "metrics.jsonl"
VERDICT = "verdict.json"
FLOWER_TRAFFIC = "flower_traffic.json"

Say = Callable[[str], None]


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; the old handlers come back at the end."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def new_run_dir(out_dir: Path) -> Path:
    """Make a folder named by the time, unlike all others in ``out_dir``.

    Raises:
        StartError: it cannot be made or written to.
    """
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        path = out_dir / f"{name}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StartError(f"out_dir = {out_dir}: cannot be written: {error.strerror}") from error
        return path
    raise StartError(f"out_dir = {out_dir}: no free name for a run")


def run_folder(run_dir: Path | None, out_dir: Path) -> Path:
    """Make the folder of this run: ``run_dir``, or else a new one in ``out_dir``.

    Raises:
        StartError: it cannot be made or written to, or it holds a run already.
    """
    if run_dir is None:
        return new_run_dir(out_dir)
    make_folder(run_dir, "--run-dir")
    if (run_dir / EVENTS).exists():
        raise StartError(f"--run-dir = {run_dir}: holds a run already ({EVENTS}); choose another")
    # A start that failed leaves a verdict, which must not pass for this run's.
    (run_dir / VERDICT).unlink(missing_ok=True)
    return run_dir


def check_data(config: CloudConfig) -> None:
    """Raise ConfigError if the reference data cannot be read or has other classes."""
    reference = config.evaluation.reference
    if reference is None:
        return
    # Imported here: it takes seconds, and an edge does without.
    from fedphd.common.data import LabelledImages

    LabelledImages(reference).check_covers(config.num_classes)


def open_client_data(config: ClientConfig) -> None:
    """Raise ConfigError if a client's data cannot be opened or cut into the wanted parts."""
    from fedphd.common.data import LabelledImages

    LabelledImages(config.data)


def run_cloud(config: CloudConfig, *, run_dir: Path, stop: threading.Event, say: Say) -> Verdict:
    """Run the cloud to its end; the run's files go to ``run_dir``, which ``run_folder`` made."""
    write_json(run_dir / "config.json", config.model_dump(mode="json"))
    file = RoleFile(
        role="cloud",
        config=config.model_dump(mode="json"),
        run_dir=str(run_dir.resolve()),
        events=str((run_dir / EVENTS).resolve()),
        verdict=str((run_dir / VERDICT).resolve()),
        log=str((run_dir / "cloud.log").resolve()),
    )
    with _superlink(config, say) as link:
        say(f"cloud     listening on {config.superlink.address}; run folder {run_dir}")
        verdict = _serve(link, file, run_dir / "role.json", stop, say)
        _keep_traffic(link, verdict, run_dir / FLOWER_TRAFFIC)
    summary = run_dir / "summary.json"
    if verdict.exit_code == EXIT_OK and summary.exists():
        say(f"\nfinished; everything is in {run_dir}")
        say(render_summary(json.loads(summary.read_text("utf-8"))))
    return verdict


def run_edge(config: EdgeConfig, *, stop: threading.Event, say: Say) -> Verdict:
    """Run an edge until the cloud says that the run is over."""
    state = config.state_dir
    make_folder(state, "state_dir")
    file = RoleFile(
        role="edge",
        config=config.model_dump(mode="json"),
        run_dir=str(state.resolve()),
        events=str((state / "events.jsonl").resolve()),
        verdict=str((state / VERDICT).resolve()),
        log=str((state / "edge.log").resolve()),
    )
    for old in (Path(file.events), Path(file.verdict), state / FLOWER_TRAFFIC):
        old.unlink(missing_ok=True)
    with _superlink(config, say) as link:
        say(f"{config.edge_id:<9} listening on {config.superlink.address}; cloud {config.cloud}")
        verdict = _serve(link, file, state / "role.json", stop, say)
        _keep_traffic(link, verdict, state / FLOWER_TRAFFIC)
        return verdict


def _keep_traffic(link: SuperLink, verdict: Verdict, path: Path) -> None:
    """Store Flower's own count of the run's bytes, which goes with the SuperLink."""
    if verdict.exit_code == EXIT_OK and (count := link.traffic()) is not None:
        write_json(path, count)


@contextmanager
def _superlink(config: CloudConfig | EdgeConfig, say: Say) -> Iterator[SuperLink]:
    link = SuperLink(config.superlink, config.state_dir)
    try:
        link.wait_ready()
        yield link
    finally:
        link.stop()


def _serve(
    link: SuperLink, file: RoleFile, role_path: Path, stop: threading.Event, say: Say
) -> Verdict:
    """Submit the ServerApp, show its events, return its verdict."""
    file.write(role_path)
    link.submit(role_path)
    tail = Tail(Path(file.events))
    pid: int | None = None
    submitted_s = time.monotonic()
    while True:
        # The verdict comes last: what was written before it is shown before it counts.
        verdict = read_verdict(Path(file.verdict))
        for event in tail.new_events():
            if event["event"] == "started":
                pid = event["pid"]
            line = render(event)
            if line:
                say(line)
        if verdict is not None:
            return verdict
        if stop.is_set():
            _end(pid)
            return read_verdict(Path(file.verdict)) or Verdict(Interrupted.exit_code, "stopped")
        link.check_alive()
        _check_serverapp(pid, submitted_s, link, file)
        time.sleep(POLL_S)


def _check_serverapp(pid: int | None, submitted_s: float, link: SuperLink, file: RoleFile) -> None:
    if pid is None:
        if time.monotonic() - submitted_s > SERVERAPP_S:
            raise StartError(
                f"the ServerApp did not start within {SERVERAPP_S:g} s; see {link.log}"
            )
    elif not _alive(pid) and read_verdict(Path(file.verdict)) is None:
        raise FedPhDError(f"the ServerApp (process {pid}) died without a verdict; see {file.log}")


def _end(pid: int | None) -> None:
    """Ask the ServerApp to end, so that an edge can say goodbye to the cloud; then insist."""
    if pid is None:
        return
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        deadline_s = time.monotonic() + wait_s
        if _alive(pid):
            # It may end by itself in between.
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while _alive(pid) and time.monotonic() < deadline_s:
            time.sleep(0.05)


def _alive(pid: int) -> bool:
    """Whether a process runs; a zombie, whose parent has yet to reap it, does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        pass
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
