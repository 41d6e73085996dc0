"""A comparison of two methods on tiny settings, in a folder of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedphd.deploy.compare.plan import CommonSettings
from fedphd.deploy.launch.client_data import CLASSES, SOURCE
from fedphd.deploy.simulation.run_config import SimulatedClients


@pytest.fixture
def common(tmp_path: Path) -> CommonSettings:
    values = {
        "schedule.intervals": 2,
        "schedule.edge_rounds": 3,
        "training.local_amount": 2,
        "evaluation.every_intervals": 1,
    }
    clients = SimulatedClients({SOURCE: "digits", CLASSES: 2})
    return CommonSettings(None, values, clients, tmp_path / "out")
