"""Executes planned runs, each as a ``fedphd simulate`` process, a few at a time."""

import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from statistics import fmean

from fedphd.common.config.text import write_config
from fedphd.common.events import read_verdict
from fedphd.common.history.events import Evaluated
from fedphd.deploy.compare.plan import PlannedRun
from fedphd.deploy.compare.results import DISTANCE, result_of
from fedphd.deploy.launch.local import FEDPHD
from fedphd.deploy.launch.origin import origin
from fedphd.deploy.launch.render import human_bytes, human_seconds
from fedphd.deploy.launch.runs import CONFIG, EVENTS, VERDICT, Say
from fedphd.deploy.launch.superlink import die_with_parent, last_line

POLL_S = 0.2
# Within this time `fedphd simulate` ends everything that it started.
STOP_S = 15.0
REQUEST = "request.toml"
Keep = Callable[[PlannedRun], None]


class Runner:
    """Runs what is planned in order, ``jobs`` at a time.

    ``logs`` gets what the runs print, ``keep`` is called with each run that ended well.
    """

    def __init__(self, logs: Path, *, jobs: int, say: Say, keep: Keep = lambda _: None) -> None:
        self._logs, self._jobs, self._say, self._keep = logs, jobs, say, keep
        self._running: list[tuple[PlannedRun, subprocess.Popen[bytes]]] = []
        # Of the runs that were asked for last.
        self._failed: dict[str, str] = {}

    def run(self, runs: Sequence[PlannedRun], stop: threading.Event) -> dict[str, str]:
        """Run all that are not finished, until ``stop`` is set; return why runs failed, by name."""
        self._failed = {}
        waiting = deque(run for run in runs if not run.finished)
        if skipped := len(runs) - len(waiting):
            self._say(f"{skipped} of {len(runs)} runs are finished already")
        try:
            while (waiting or self._running) and not stop.is_set():
                while waiting and self._may_start(runs):
                    self._start(waiting.popleft())
                self._collect(runs)
                stop.wait(POLL_S if self._running else 0)
        finally:
            self._end()
        return self._failed

    def _may_start(self, runs: Sequence[PlannedRun]) -> bool:
        """Whether a place is free, and no process is still training the feature classifier.

        The runs share it, and two processes that train it at the same time may get different ones.
        """
        return not self._running or (
            len(self._running) < self._jobs
            and any(isinstance(event, Evaluated) for run in runs for event in run.events())
        )

    def _log(self, run: PlannedRun) -> Path:
        return self._logs / f"{run.name}.log"

    def _start(self, run: PlannedRun) -> None:
        goes_on = run.goes_on(origin())
        if not goes_on:
            set_aside(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        with self._log(run).open("ab" if goes_on else "wb") as output:
            process = subprocess.Popen(
                [*FEDPHD, *self.arguments(run)],
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._running.append((run, process))
        self._say(f"{'goes on' if goes_on else 'started'}   {run.name}; {self._log(run)}")

    def arguments(self, run: PlannedRun) -> list[str]:
        """``simulate`` and its flags, with which it also goes on.

        The configuration goes into a file in the run's folder.
        """
        config = write_config(run.folder / REQUEST, run.config.model_dump(mode="json"))
        arguments = ["simulate", *config, "--run-dir", str(run.folder), "--go-on"]
        for key, value in run.clients.data.items():
            arguments += ["--set", f"{key}={json.dumps(value)}"]
        return [*arguments, "--cpus", str(run.clients.cpus), "--gpus", str(run.clients.gpus)]

    def _collect(self, runs: Sequence[PlannedRun]) -> None:
        for run, process in [pair for pair in self._running if pair[1].poll() is not None]:
            self._running.remove((run, process))
            if process.returncode == 0 and run.finished:
                self._keep(run)
                self._say(finished_line(run, runs, jobs=self._jobs))
            else:
                self._failed[run.name] = why_failed(self._log(run), run, process.returncode)
                self._say(f"FAILED    {run.name}: {self._failed[run.name]}")

    def _end(self) -> None:
        """End the processes that still run, and their children."""
        for _, process in self._running:
            process.terminate()
        deadline_s = time.monotonic() + STOP_S
        for _, process in self._running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline_s - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def set_aside(folder: Path) -> None:
    """Move what a run that cannot go on left to ``<folder>.failed``, ``.failed-2``, ..."""
    if any((folder / name).exists() for name in (CONFIG, EVENTS)):
        suffixes = chain([".failed"], (f".failed-{number}" for number in count(2)))
        names = (folder.with_name(folder.name + suffix) for suffix in suffixes)
        folder.rename(next(name for name in names if not name.exists()))


def finished_line(run: PlannedRun, runs: Sequence[PlannedRun], *, jobs: int) -> str:
    """The progress line of a run that ended well."""
    result = result_of(run)
    distance = result.quality.get(DISTANCE)
    done = [other for other in runs if other.finished]
    left = [other for other in runs if not other.finished]
    quality = "no distance" if distance is None else f"Frechet distance {distance:.1f}"
    text = (
        f"finished  {run.name}: {quality} | {run.config.schedule.intervals} cloud rounds, "
        f"{human_bytes(result.costs['cloud_bytes'])} over the cloud's links | "
        f"{human_seconds(result.costs['seconds'])} | {len(done)} of {len(runs)} runs"
    )
    if result.failures:
        text += f" | DISTURBED: clients or edges failed {result.failures} times"
    if not left:
        return text
    return f"{text} | about {human_seconds(time_left_s(done, left, jobs=jobs))} left"


def time_left_s(done: Sequence[PlannedRun], left: Sequence[PlannedRun], *, jobs: int) -> float:
    """Seconds for ``left``, from the mean of each method's finished runs, else of all."""
    took = [(run.method.name, result_of(run).costs["seconds"]) for run in done]
    total = 0.0
    for run in left:
        same = [seconds for name, seconds in took if name == run.method.name]
        total += fmean(same or [seconds for _, seconds in took])
    return total / min(jobs, len(left))


def why_failed(log: Path, run: PlannedRun, code: int) -> str:
    """The message of the run's own verdict, else the last line that it printed.

    A verdict of another code is from an earlier start.
    """
    if (verdict := read_verdict(run.folder / VERDICT)) and verdict.exit_code == code:
        return verdict.message
    printed = last_line(log.read_text("utf-8", "replace")).removeprefix("fedphd: ")
    return f"exit code {code}: {printed}"
