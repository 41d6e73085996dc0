"""``flwr run .`` in the project's folder, as Flower's users start it and change its settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import Processes, free_port
from support.tiny import TINY, events

from fedphd.common.config.text import flower_pairs, settings_text
from fedphd.deploy.simulation.run_config import NAMED

PROJECT = Path(__file__).parents[2]
NUM_NODES = 3

Run = Callable[[dict[str, Any]], str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flwr")


@pytest.fixture(scope="module")
def flwr_run(folder: Path) -> Iterator[Run]:
    """Runs ``flwr run . --stream`` with settings on a SuperLink of the test's own."""
    with Processes(folder) as processes:
        control = f"127.0.0.1:{free_port()}"
        link = processes.start_flower(
            "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
            "--control-api-address", control, "--serverappio-api-address", "127.0.0.1:0",
        )  # fmt: skip
        home = folder / "flower-home"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{control}"\n'
            "insecure = true\n"
        )

        def run(settings: dict[str, Any]) -> str:
            settings = {"out_dir": str(folder / "runs"), **settings}
            program = processes.start_flower(
                "flwr", "run", ".", "--stream",
                "--run-config", flower_pairs(settings),
                "--federation-config",
                f"num-supernodes={NUM_NODES} client-resources-num-cpus=1",
                folder=PROJECT,
            )  # fmt: skip
            program.wait_exit()
            assert link.process.poll() is None, link.text
            return program.text

        yield run


def test_an_unknown_key_is_refused_with_its_name(flwr_run: Run, folder: Path) -> None:
    text = flwr_run({"schedule.intervalz": 3})
    assert "Key 'schedule.intervalz' is not present" in text
    assert "Successfully started run" not in text
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_a_wrong_value_is_refused_before_the_start(flwr_run: Run, folder: Path) -> None:
    text = flwr_run({"schedule.intervals": "many"})
    assert "fedphd: refused before the start: --run-config: 1 setting(s) refused" in text
    reason = "schedule.intervals = 'many': input should be a valid integer (cloud rounds)"
    assert reason in text
    # What Flower says last, without the tracebacks of what it met.
    assert text.rstrip().endswith(reason)
    assert "Traceback" not in text
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_an_unknown_setting_is_refused_with_its_name(flwr_run: Run, folder: Path) -> None:
    text = flwr_run({"settings": "schedule.intervalz=3 ema.decay=0.9"})
    assert "fedphd: refused before the start: --run-config: 1 setting(s) refused" in text
    assert "schedule.intervalz: unknown key; did you mean 'intervals'?" in text
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_it_runs_to_the_end(flwr_run: Run, folder: Path) -> None:
    keys = {key: value for key, value in TINY.items() if key in NAMED}
    others = {key: value for key, value in TINY.items() if key not in NAMED}
    own = {"schedule.intervals": 2, "data.partition.classes_per_partition": 4}
    text = flwr_run({**keys, **own, "settings": settings_text(others)})
    (run_dir,) = (folder / "runs").glob("2*")
    assert f"finished; everything is in {run_dir}" in text
    assert "conv_in" in (run_dir / "report.html").read_text("utf-8")
    finished = [e for e in events(run_dir / "metrics.jsonl") if e["event"] == "interval"]
    assert [event["interval"] for event in finished] == [1, 2]
    assert finished[-1]["clients"] == [f"client-{number}" for number in range(NUM_NODES)]
    config = json.loads((run_dir / "config.json").read_text("utf-8"))
    assert config["model"]["block_out_channels"] == TINY["model.block_out_channels"]
    assert config["evaluation"]["classifier_epochs"] == 1
