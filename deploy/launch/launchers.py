"""Run a cloud or an edge on this machine to its end: SuperLink, ServerApp, verdict."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fedphd.common.config.roles import CloudConfig, EdgeConfig
from fedphd.common.errors import EXIT_OK, FedPhDError, Interrupted, StartError
from fedphd.common.events import Verdict, read_verdict, write_json, write_verdict
from fedphd.common.history.events import Started, Tail
from fedphd.common.history.status import StatusBoard
from fedphd.deploy.launch.health import serving
from fedphd.deploy.launch.leftovers import claimed
from fedphd.deploy.launch.needs import kills_for_memory
from fedphd.deploy.launch.processes import alive
from fedphd.deploy.launch.refusals import Refusals
from fedphd.deploy.launch.runs import (
    ROLE_FILE,
    VERDICT,
    Resumed,
    RoleFile,
    Say,
    prepare,
    show_event,
    show_summary,
)
from fedphd.deploy.launch.superlink import SuperLink, last_line, make_folder

POLL_S = 0.1
WATCH_S = 1.0
# Imports and, in a simulation, Ray: 10 s on a quiet machine, over 60 s were seen on a busy one.
SERVERAPP_S = 180.0
# Ray's words for its own limit, which cannot be set.
RAY_TOO_SLOW = "The current node timed out during startup"
GRACE_S = 2.5
ASKED_S = 1.0
FLOWER_TRAFFIC = "flower_traffic.json"
FLOWER_LOG = "flower.log"

Watch = Callable[[], None]


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set; restore the old handlers at the end."""
    stop = threading.Event()
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda *_: stop.set())
            stack.callback(signal.signal, number, before)
        yield stop


def run_cloud(
    config: CloudConfig,
    *,
    run_dir: Path,
    stop: threading.Event,
    say: Say,
    resumed: Resumed | None = None,
) -> Verdict:
    """Run the cloud to its end; the run's files go to ``run_dir``, which ``run_folder`` made.

    ``resumed`` says how far the run in it is, if it goes on.
    """
    file = prepare("cloud", config, run_dir, resumed)
    board = StatusBoard("cloud", "cloud")
    with (
        started(SuperLink(config.superlink, config.state_dir)) as link,
        serving(config.health, board, config.state_dir, run_dir),
    ):
        watches = _watches(link, file, say)
        say(f"cloud     listening on {config.superlink.address}; run folder {run_dir}")
        verdict = _run(link, file, stop, say, board, watches)
    if verdict.exit_code == EXIT_OK:
        show_summary(run_dir, say)
    return verdict


def run_edge(config: EdgeConfig, *, stop: threading.Event, say: Say) -> Verdict:
    """Run an edge until the cloud says that the run is over."""
    state = config.state_folder
    make_folder(state, "state_dir")
    file = RoleFile.of("edge", config, state)
    board = StatusBoard("edge", config.edge_id)
    with claimed(state, name="state_dir"):
        for old in (Path(file.events), state / VERDICT, state / FLOWER_TRAFFIC):
            old.unlink(missing_ok=True)
        with (
            started(SuperLink(config.superlink, state)) as link,
            serving(config.health, board, state),
        ):
            file.write()
            watches = _watches(link, file, say)
            listens = f"listening on {config.superlink.address}; cloud {config.cloud}"
            say(f"{config.edge_id:<9} {listens}")
            return _run(link, file, stop, say, board, watches)


def _run(
    link: SuperLink,
    file: RoleFile,
    stop: threading.Event,
    say: Say,
    board: StatusBoard,
    watches: Sequence[Watch],
) -> Verdict:
    link.submit({ROLE_FILE: str(file.path)})
    with file.settled():
        verdict = serve(link, file, stop, say, board, watches)
    # Flower's own count of the run's bytes is lost when the SuperLink ends.
    if verdict.exit_code == EXIT_OK and (count := link.traffic()) is not None:
        write_json(Path(file.run_dir) / FLOWER_TRAFFIC, count)
    return verdict


def _watches(link: SuperLink, file: RoleFile, say: Say) -> list[Watch]:
    """Let in who has a registered key; what to look at from now on."""
    node = str(file.config.get("edge_id", file.role))

    def line(text: str) -> None:
        say(f"{node:<9} {text}")

    refusals = Refusals(link.log, line)
    watches = [refusals.follow]
    if expiry := link.expiry(line):
        watches.append(expiry.follow)
    if ring := link.keyring(Path(file.names), line):
        ring.start()
        # Whose server was started again knocks before the new one knows any key.
        refusals.forget()
        watches.append(ring.follow)
    return watches


@contextmanager
def started(link: SuperLink) -> Iterator[SuperLink]:
    """Yield ``link`` when it is ready, and stop it at the end."""
    try:
        link.wait_ready()
        yield link
    finally:
        link.stop()


def serve(
    link: SuperLink,
    file: RoleFile,
    stop: threading.Event,
    say: Say,
    board: StatusBoard | None = None,
    watches: Sequence[Watch] = (),
) -> Verdict:
    """Show the submitted ServerApp's events, also on ``board``; return its verdict.

    ``watches`` are called once a second.
    """
    board = board or StatusBoard(file.role, file.role)
    tail, path = Tail(Path(file.events)), Path(file.verdict)
    # What a run that goes on had said before has been shown.
    tail.skip(file.events_size)
    pid: int | None = None
    submitted_s = watched_s = time.monotonic()
    kills = kills_for_memory()
    while True:
        # Read before the events: the verdict is written last, so all events are shown first.
        verdict = read_verdict(path)
        board.beat()
        for event in tail.new_events():
            board.event(event)
            if isinstance(event, Started):
                pid = event.pid
                link.started(pid)
            show_event(event, say)
        if verdict is not None:
            check_asked_for(verdict, stop, link)
            return verdict
        if stop.is_set():
            end_serverapp(pid, path)
            return interrupted(path)
        if time.monotonic() - watched_s > WATCH_S:
            watched_s = time.monotonic()
            for watch in watches:
                watch()
        link.check_alive(at_work=pid is not None)
        check_serverapp(pid, submitted_s, link, file, kills)
        time.sleep(POLL_S)


def interrupted(path: Path) -> Verdict:
    """The verdict on a run that was ended from outside, unless it had just succeeded."""
    verdict = read_verdict(path)
    if verdict is not None and verdict.exit_code == EXIT_OK:
        return verdict
    # Errors that a ServerApp reports while it is being ended are not the reason for its end.
    stopped = Verdict(Interrupted.exit_code, "stopped")
    write_verdict(path, stopped)
    return stopped


def check_asked_for(verdict: Verdict, stop: threading.Event, link: SuperLink) -> None:
    """Raise FedPhDError if the ServerApp was ended, and nobody had asked for that.

    Flower's SuperLink ends it when its heartbeat seems to be late, as after a jump of the clock.
    """
    # A signal to the whole process group reaches the ServerApp and this process in any order.
    if verdict.exit_code == Interrupted.exit_code and not stop.wait(ASKED_S):
        raise FedPhDError(
            "Flower ended the ServerApp, as it does when this machine's clock was set: correct the "
            f"clock and start it again, it goes on from where it was; see {link.log}"
        )


def check_serverapp(
    pid: int | None, submitted_s: float, link: SuperLink, file: RoleFile, kills: int
) -> None:
    """Raise FedPhDError if the ServerApp died, StartError if it or Ray did not start in time.

    ``pid`` is its process, once it has started; ``submitted_s`` is of the monotonic clock, and
    ``kills`` are those for lack of memory that there were then.
    """
    if pid is None and time.monotonic() - submitted_s > SERVERAPP_S:
        raise StartError(f"the ServerApp did not start within {SERVERAPP_S:g} s; see {link.log}")
    if pid is not None and not alive(pid) and read_verdict(Path(file.verdict)) is None:
        printed = link.run_log()
        flower_log = Path(file.verdict).parent / FLOWER_LOG
        flower_log.write_text(printed, encoding="utf-8")
        see = f"see {file.log} and {flower_log}"
        if RAY_TOO_SLOW in printed:
            raise StartError(
                "Ray did not start within its limit of 30 s: this machine is too busy, or short of "
                "memory; try again when it is less so, or start Ray before, by `ray start --head "
                f"--port 6379`, and add --ray-address 127.0.0.1:6379; {see}"
            )
        reason = "died without a verdict"
        if kills_for_memory() > kills:
            reason += (
                "; this machine's kernel has meanwhile ended a process for lack of memory (dmesg "
                "says which). The last that was printed"
            )
        raise FedPhDError(f"the ServerApp (process {pid}) {reason}: {last_line(printed)}; {see}")


def end_serverapp(pid: int | None, verdict: Path, *, grace_s: float = GRACE_S) -> None:
    """Ask the ServerApp to end, so that an edge can leave the cloud in order; then kill it.

    It has ``grace_s`` seconds after each signal, or until its ``verdict`` is there: what Flower
    does after that takes seconds.
    """
    if pid is None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline_s = time.monotonic() + grace_s
        if alive(pid):
            # It may exit in between.
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while alive(pid) and time.monotonic() < deadline_s:
            if read_verdict(verdict) is not None:
                return
            time.sleep(0.05)
