"""Executes planned runs, each as a ``fedphd simulate`` process, a few at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from statistics import fmean
from typing import Any

from fedphd.common.config.text import write_config
from fedphd.common.events import read_verdict
from fedphd.common.history.events import Tail
from fedphd.common.history.summary import SUMMARY
from fedphd.deploy.compare.plan import PlannedRun
from fedphd.deploy.launch.render import human_bytes, human_seconds
from fedphd.deploy.launch.runs import EVENTS, VERDICT, Say
from fedphd.deploy.launch.superlink import die_with_parent, last_line
from fedphd.deploy.simulation.run_config import SimulatedClients

POLL_S = 0.2
# Within this time `fedphd simulate` ends everything that it started.
STOP_S = 15.0
REQUEST = "request.toml"


@dataclass
class Started:
    """A run in progress."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: Path


class Runner:
    """Starts planned runs in order and reports how they end.

    Args:
        clients: their data, and their share of the machine.
        logs: folder for what the runs print.
        jobs: runs at a time.
        say: receives a line per start and per end.
    """

    def __init__(self, clients: SimulatedClients, logs: Path, *, jobs: int, say: Say) -> None:
        self._clients = clients
        self._logs = logs
        self._jobs = jobs
        self._say = say
        self._running: list[Started] = []
        self._failed: dict[str, str] = {}

    def run(self, runs: Sequence[PlannedRun], stop: threading.Event) -> dict[str, str]:
        """Run all that are not finished, until ``stop`` is set.

        Returns:
            Why runs failed, by name; empty if none did.
        """
        waiting = deque(run for run in runs if not run.finished)
        if skipped := len(runs) - len(waiting):
            self._say(f"{skipped} of {len(runs)} runs are finished already")
        try:
            while (waiting or self._running) and not stop.is_set():
                while waiting and self._may_start(runs):
                    self._running.append(self._start(waiting.popleft()))
                self._collect(runs)
                stop.wait(POLL_S if self._running else 0)
        finally:
            self._end()
        return self._failed

    def _may_start(self, runs: Sequence[PlannedRun]) -> bool:
        """Whether a place is free, and no process is still training the feature classifier.

        The runs share it, and two processes that train it at the same time may get different ones.
        """
        if not self._running:
            return True
        return len(self._running) < self._jobs and any(
            event["event"] == "evaluated"
            for run in runs
            for event in Tail(run.folder / EVENTS).new_lines()
        )

    def _start(self, run: PlannedRun) -> Started:
        set_aside(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{run.name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedphd.deploy.cli", *self.arguments(run)],
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._say(f"started   {run.name}; {log}")
        return Started(run, process, log)

    def arguments(self, run: PlannedRun) -> list[str]:
        """``simulate`` and its flags; the configuration goes into a file in the run's folder."""
        config = write_config(run.folder / REQUEST, run.config.model_dump(mode="json"))
        clients = self._clients
        arguments = ["simulate", *config, "--run-dir", str(run.folder)]
        for key, value in clients.data.items():
            arguments += ["--set", f"{key}={json.dumps(value)}"]
        return [*arguments, "--cpus", str(clients.cpus), "--gpus", str(clients.gpus)]

    def _collect(self, runs: Sequence[PlannedRun]) -> None:
        for started in [s for s in self._running if s.process.poll() is not None]:
            self._running.remove(started)
            run = started.run
            if started.process.returncode == 0 and run.finished:
                self._say(finished_line(run, runs, jobs=self._jobs))
            else:
                self._failed[run.name] = why_failed(started.log, run, started.process.returncode)
                self._say(f"FAILED    {run.name}: {self._failed[run.name]}")

    def _end(self) -> None:
        """End the processes that still run, and their children."""
        for started in self._running:
            if started.process.poll() is None:
                started.process.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + STOP_S
        for started in self._running:
            with suppress(subprocess.TimeoutExpired):
                started.process.wait(max(0.0, deadline_s - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(started.process.pid, signal.SIGKILL)
            started.process.wait()


def set_aside(folder: Path) -> None:
    """Move what a failed or interrupted run left to ``<folder>.failed``, ``.failed-2``, ..."""
    if (folder / EVENTS).exists():
        suffixes = chain([".failed"], (f".failed-{number}" for number in count(2)))
        names = (folder.with_name(folder.name + suffix) for suffix in suffixes)
        folder.rename(next(name for name in names if not name.exists()))


def finished_line(run: PlannedRun, runs: Sequence[PlannedRun], *, jobs: int) -> str:
    """The progress line of a run that ended well."""
    summary = _summary(run)
    done = [other for other in runs if other.finished]
    left = [other for other in runs if not other.finished]
    distance = summary["frechet_distance"]
    quality = "no distance" if distance is None else f"Frechet distance {distance:.1f}"
    text = (
        f"finished  {run.name}: {quality} | {run.config.schedule.intervals} cloud rounds, "
        f"{human_bytes(summary['bytes']['edge_cloud'])} over the cloud's links | "
        f"{human_seconds(summary['seconds']['total'])} | {len(done)} of {len(runs)} runs"
    )
    if not left:
        return text
    return f"{text} | about {human_seconds(time_left_s(done, left, jobs=jobs))} left"


def time_left_s(done: Sequence[PlannedRun], left: Sequence[PlannedRun], *, jobs: int) -> float:
    """Seconds for ``left``, from the mean of each method's finished runs, else of all."""
    took = [(run.method.name, float(_summary(run)["seconds"]["total"])) for run in done]
    total = 0.0
    for run in left:
        same = [seconds for name, seconds in took if name == run.method.name]
        total += fmean(same or [seconds for _, seconds in took])
    return total / min(jobs, len(left))


def why_failed(log: Path, run: PlannedRun, code: int) -> str:
    """The message of the run's own verdict, else the last line that it printed."""
    verdict = read_verdict(run.folder / VERDICT)
    if verdict is not None and verdict.exit_code:
        return verdict.message
    printed = last_line(log.read_text("utf-8", "replace")).removeprefix("fedphd: ")
    return f"exit code {code}: {printed}"


def _summary(run: PlannedRun) -> Mapping[str, Any]:
    summary: Mapping[str, Any] = json.loads((run.folder / SUMMARY).read_text("utf-8"))
    return summary
