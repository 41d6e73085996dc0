"""Trackers that follow a run: TensorBoard, MLflow, Weights & Biases.

None of them can stop a run, nor hold it up: each works in a thread of its own, and one that fails
is left out from then on.
"""

import importlib
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fedphd.common.config.text import flattened
from fedphd.common.config.tracking import BackendName, TrackingConfig
from fedphd.common.errors import FedPhDError

# How long the end of a run waits for a tracker to take what it has not taken yet.
CLOSE_S: Final = 30.0
# How long a library itself waits for its server.
_LIBRARY_S: Final = 20.0
_PICTURE: Final = "samples"
_LONGEST_REASON: Final = 200


class Tracker(ABC):
    """One place where a run is followed. A thread of its own makes it and calls it, in order."""

    @abstractmethod
    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Take values by name, of the interval ``step``, which may lie before the last one."""

    @abstractmethod
    def picture(self, path: Path, step: int) -> None:
        """Take the grid of samples in the PNG file ``path``, of the interval ``step``."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """Take leave of the run, which has done all its intervals or may go on later."""


@dataclass(frozen=True)
class Followed:
    """The run that is followed.

    Attributes:
        name: drawn once, the same when a run goes on.
        out_dir: folder in which each run has its folder.
        settings: that define the training, nested.
        resumed: after which interval it goes on; None: it begins.
    """

    name: str
    run_dir: Path
    out_dir: Path
    settings: Mapping[str, Any]
    resumed: int | None = None


class TensorBoard(Tracker):
    """Files in the run's folder."""

    def __init__(self, run: Followed, config: TrackingConfig) -> None:
        # What was drawn of intervals that come again is hidden.
        purged = None if run.resumed is None else run.resumed + 1
        self._board = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=purged)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, path: Path, step: int) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image)
        self._board.add_image(
            _PICTURE, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC"
        )

    def close(self, *, finished: bool) -> None:
        self._board.close()


class MLflow(Tracker):
    """A run of an MLflow experiment, on a server or in a data base file."""

    # Of the interface that writes many at once.
    _MOST_PARAMS: Final = 100
    _LONGEST: Final = 500

    def __init__(self, run: Followed, config: TrackingConfig) -> None:
        # No calls home; and the end of a run should not wait long for a server that is gone.
        for key, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        }.items():
            os.environ.setdefault(key, value)
        # Any: an extra, which the type checker need not have.
        mlflow: Any = importlib.import_module("mlflow")
        self._kinds: Any = importlib.import_module("mlflow.entities")
        given = config.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
        folder = run.out_dir.resolve()
        self._client = mlflow.MlflowClient(given or f"sqlite:///{folder / 'mlflow.db'}")
        found = self._client.get_experiment_by_name(config.project)
        # Where MLflow keeps its files by itself is the current folder.
        files = None if given else (folder / "mlflow-files").as_uri()
        experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(config.project, artifact_location=files)
        )
        same = f"tags.`fedphd.run` = '{run.name}'"
        if before := self._client.search_runs([experiment], same, max_results=1):
            self._run = before[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        made = self._client.create_run(
            experiment, tags={"fedphd.run": run.name}, run_name=run.run_dir.name
        )
        self._run = made.info.run_id
        params = [self._kinds.Param(k, str(v)[: self._LONGEST]) for k, v in flattened(run.settings)]
        for start in range(0, len(params), self._MOST_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + self._MOST_PARAMS])

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        now_ms = round(time.time() * 1000)
        metrics = [self._kinds.Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def picture(self, path: Path, step: int) -> None:
        self._client.log_artifact(self._run, str(path), _PICTURE)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


class WandB(Tracker):
    """A run of a Weights & Biases project; as ``WANDB_MODE`` says, online or in files."""

    def __init__(self, run: Followed, config: TrackingConfig) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb: Any = importlib.import_module("wandb")
        self._image = wandb.Image
        self._run = wandb.init(
            project=config.project,
            id=run.name,
            name=run.run_dir.name,
            resume="allow",
            dir=str(run.run_dir),
            config=dict(run.settings),
            # Numbers and samples, and nothing of the machine: no output, code, host, load.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                # It waits for minutes otherwise, at the process's end too.
                init_timeout=_LIBRARY_S,
                finish_timeout=_LIBRARY_S,
                finish_timeout_raises=True,
            ),
        )
        # Its own steps only go forward, but a validation loss is told with the next interval.
        self._run.define_metric("*", step_metric="interval")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "interval": step})

    def picture(self, path: Path, step: int) -> None:
        self._run.log({_PICTURE: self._image(str(path)), "interval": step})

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


KINDS: Final[Mapping[BackendName, Callable[[Followed, TrackingConfig], Tracker]]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


class Trackers:
    """All trackers of a run.

    Args:
        opened: what makes each tracker, by name; called in the tracker's thread.
        warn: is told, in a sentence, of each tracker that failed, once.
        close_s: how many seconds the end waits for all of them.
    """

    def __init__(
        self,
        opened: Mapping[str, Callable[[], Tracker]],
        warn: Callable[[str], None],
        close_s: float = CLOSE_S,
    ) -> None:
        self._lines = [_Line(name, make, warn) for name, make in opened.items()]
        self._close_s = close_s

    @classmethod
    def of(cls, config: TrackingConfig, run: Followed, warn: Callable[[str], None]) -> "Trackers":
        """Those that ``config`` names."""
        for name in config.backends:
            # In this thread, since two that import parts of a package at the same time may see it
            # half made. What fails here fails again in the tracker's own.
            with suppress(Exception):
                importlib.import_module(name)
        return cls({name: partial(KINDS[name], run, config) for name in config.backends}, warn)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """As ``Tracker.numbers``, of all; returns at once."""
        taken = dict(values)
        self._tell(lambda tracker: tracker.numbers(taken, step))

    def picture(self, path: Path, step: int) -> None:
        """As ``Tracker.picture``, of all; returns at once. The file stays as it is."""
        self._tell(lambda tracker: tracker.picture(path, step))

    def close(self, *, finished: bool) -> None:
        """As ``Tracker.close``, of all; waits until they are done, or ``close_s`` have passed."""
        self._tell(lambda tracker: tracker.close(finished=finished))
        until_s = time.monotonic() + self._close_s
        for line in self._lines:
            line.put(None)
        for line in self._lines:
            line.wait(until_s)

    def _tell(self, job: Callable[[Tracker], None]) -> None:
        for line in self._lines:
            line.put(job)


class _Line:
    """What waits to be told to one tracker, and the thread that tells it."""

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name, self._make, self._warn = name, make, warn
        self._jobs: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._failed = False
        # A process that is told to end does not wait for it.
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[Tracker], None] | None) -> None:
        """Let the tracker be told; None is the last."""
        if not self._failed:
            self._jobs.put(job)

    def wait(self, until_s: float) -> None:
        self._thread.join(max(0.0, until_s - time.monotonic()))
        if self._thread.is_alive():
            self._fail("at the run's end it had not taken everything")

    def _run(self) -> None:
        try:
            tracker = self._make()
            while job := self._jobs.get():
                job(tracker)
        # Whatever a library raises, the run goes on.
        except Exception as error:
            self._fail(f"{type(error).__name__}: {shorten(str(error), _LONGEST_REASON)}")

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            # A log that cannot be written ends the run where that matters.
            with suppress(FedPhDError):
                self._warn(f"tracking: {self._name} failed, the run goes on without it ({why})")
