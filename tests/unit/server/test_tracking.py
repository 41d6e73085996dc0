"""Trackers: each gets everything in order, and none can stop a run or hold it up."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.config.tracking import TrackingConfig
from fedphd.common.errors import ConfigError
from fedphd.deploy.cli.main import app
from fedphd.server.tracking import Followed, MLflow, TensorBoard, Tracker, Trackers, WandB

NO_EXTRA = "the extra of that name is not installed"
SETTINGS = {"seed": 0, "model": {"widths": [8, 16]}, **{f"many{i}": i for i in range(120)}}


class Kept(Tracker):
    """Keeps what it is told; raises ``error`` at the second call, or waits for ``gate``."""

    def __init__(
        self, *, error: Exception | None = None, gate: threading.Event | None = None
    ) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._error, self._gate = error, gate

    def _take(self, *what: Any) -> None:
        if self._gate is not None:
            self._gate.wait()
        if self._error is not None and self.told:
            raise self._error
        self.told.append(what)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._take(dict(values), step)

    def picture(self, path: Path, step: int) -> None:
        self._take(path.name, step)

    def close(self, *, finished: bool) -> None:
        self._take(finished)


def tell(trackers: Trackers, *, finished: bool = True) -> None:
    trackers.numbers({"loss": 0.5}, 1)
    trackers.numbers({"validation": 0.25}, 0)
    trackers.picture(Path("grid.png"), 1)
    trackers.close(finished=finished)


def test_all_get_everything_in_order() -> None:
    first, second, said = Kept(), Kept(), []
    tell(Trackers({"a": lambda: first, "b": lambda: second}, said.append), finished=False)
    expected = [({"loss": 0.5}, 1), ({"validation": 0.25}, 0), ("grid.png", 1), (False,)]
    assert first.told == second.told == expected
    assert said == []


def test_one_that_fails_is_left_out_and_named_once() -> None:
    whole, broken, said = Kept(), Kept(error=OSError("no route")), []
    tell(Trackers({"a": lambda: whole, "b": lambda: broken}, said.append))
    assert len(whole.told) == 4
    assert len(broken.told) == 1
    assert said == ["tracking: b failed, the run goes on without it (OSError: no route)"]


def test_one_that_cannot_be_made_is_named() -> None:
    def refused() -> Tracker:
        raise ValueError("no key")

    said: list[str] = []
    tell(Trackers({"b": refused}, said.append))
    assert said == ["tracking: b failed, the run goes on without it (ValueError: no key)"]


def test_one_that_hangs_holds_up_neither_the_run_nor_its_end() -> None:
    gate, said = threading.Event(), []
    hanging = Kept(gate=gate)
    started_s = time.monotonic()
    tell(Trackers({"b": lambda: hanging, "c": Kept}, said.append, close_s=2.0))
    assert time.monotonic() - started_s < 20
    gate.set()
    assert len(said) == 1
    assert "b failed" in said[0]
    assert "had not taken everything" in said[0]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    pixels = np.arange(36, dtype=np.uint8).reshape(6, 6)
    Image.fromarray(pixels).save(tmp_path / "grid.png")
    return tmp_path / "grid.png"


def followed(tmp_path: Path, resumed: int | None = None) -> Followed:
    (tmp_path / "run").mkdir(exist_ok=True)
    return Followed("abc1", tmp_path / "run", tmp_path, SETTINGS, resumed)


def follow(tracker: Tracker, grid: Path, *, finished: bool = True) -> None:
    tracker.numbers({"interval/loss": 0.5, "edge_weight/edge-0": 1}, 2)
    tracker.numbers({"interval/validation_loss": 0.25}, 1)
    tracker.picture(grid, 2)
    tracker.close(finished=finished)


def test_tensorboard_has_numbers_and_pictures(tmp_path: Path, grid: Path) -> None:
    follow(TensorBoard(followed(tmp_path), TrackingConfig()), grid)
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("interval/loss")] == [(2, 0.5)]
    (picture,) = board.Images("samples")
    assert (picture.step, picture.width, picture.height) == (2, 6, 6)


# MLflow's own use of SQLAlchemy and of files.
@pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")
def test_mlflow_has_one_run_that_goes_on(
    tmp_path: Path, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason=NO_EXTRA)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = TrackingConfig(backends=("mlflow",), project="trial")
    follow(MLflow(followed(tmp_path), config), grid, finished=False)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("trial").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("KILLED", "run")
    assert run.data.params["model.widths"] == "[8, 16]"
    assert len(run.data.params) == 122
    again = MLflow(followed(tmp_path, resumed=2), config)
    again.numbers({"interval/loss": 0.125}, 3)
    again.close(finished=True)
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "interval/loss")
    assert [(point.step, point.value) for point in history] == [(2, 0.5), (3, 0.125)]
    (validation,) = client.get_metric_history(run.info.run_id, "interval/validation_loss")
    assert (validation.step, validation.value) == (1, 0.25)
    assert [f.path for f in client.list_artifacts(run.info.run_id, "samples")] == [
        "samples/grid.png"
    ]
    assert (tmp_path / "mlflow-files").is_dir()


def test_wandb_keeps_a_run_in_files_where_it_is_offline(
    tmp_path: Path, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason=NO_EXTRA)
    monkeypatch.setenv("WANDB_MODE", "offline")
    follow(WandB(followed(tmp_path), TrackingConfig(backends=("wandb",))), grid)
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/run-abc1.wandb")
    content = file.read_bytes()
    for text in (b"interval/loss", b"interval/validation_loss", b"edge_weight/edge-0", b"fedphd"):
        assert text in content, text
    (picture,) = file.parent.rglob("samples_*.png")
    assert picture.read_bytes() == grid.read_bytes()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tracking.backends": ["mlfow"]}, r"tracking.backends.0 = 'mlfow': input should be"),
        ({"tracking.backends": ["wandb", "wandb"]}, "names one twice"),
        ({"tracking.mlflow_uri": "http://x"}, "add 'mlflow' to backends, or unset mlflow_uri"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_config(CloudConfig, None, settings)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_extra_is_refused_before_the_start(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    arguments = ["simulate", "--dry-run", "--set", f'tracking.backends=["tensorboard", "{name}"]']
    refused = CliRunner().invoke(app, arguments).exception
    assert isinstance(refused, ConfigError)
    needs = f"needs packages that are not installed, {name}: pip install 'fedphd[{name}]'"
    assert needs in str(refused)
