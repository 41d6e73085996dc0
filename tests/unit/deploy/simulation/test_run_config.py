"""What a run configuration of ``flwr run`` means, and what is refused."""

from __future__ import annotations

import pytest
from support.memory import MemoryGrid

from fedphd.common.errors import ConfigError, StartError
from fedphd.deploy.apps import roles
from fedphd.deploy.simulation.run_config import client_config, cloud_config, default_run_config

DEFAULTS = default_run_config()


def test_unset_keys_are_as_in_the_preset() -> None:
    config = cloud_config({**DEFAULTS, "preset": "cifar10", "schedule.intervals": 300}, 10)
    assert config.model.block_out_channels == (128, 256, 256, 256)
    assert config.schedule.intervals == 300
    assert config.schedule.participation == 0.4


def test_a_run_waits_for_all_simulated_nodes_unless_told_otherwise() -> None:
    assert cloud_config({**DEFAULTS, "preset": "cifar10"}, 10).schedule.min_clients == 10
    config = cloud_config({**DEFAULTS, "schedule.min_clients": 4}, 10)
    assert config.schedule.min_clients == 4


def test_more_clients_than_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_clients = 20, but 10 nodes .*num-supernodes=20"):
        cloud_config({**DEFAULTS, "schedule.min_clients": 20}, 10)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"preset": "nope"}, "preset = 'nope': unknown; choose one of digits, cifar10, celeba"),
        ({"schedule.intervals": "many"}, "--run-config: 1 .*\n  schedule.intervals = 'many'"),
        ({"model.block_out_channels": "[30, 64]"}, "width 30, which norm_num_groups = 8"),
        ({"topology": "ring"}, "topology = 'ring': input should be 'hierarchical' or 'flat'"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cloud_config({**DEFAULTS, **values}, 10)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data.partition.kind": "odd"}, "--run-config: 1 .*\n  data.partition.kind = 'odd'"),
        ({"data.partition.alpha": 0.0}, "data.partition.alpha = 0.0: input should be greater"),
    ],
)
def test_a_wrong_value_of_the_clients_is_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        client_config({**DEFAULTS, **values}, 0, 10)


def test_nodes_are_counted_when_no_more_come() -> None:
    grid = MemoryGrid({})
    growing = iter([{}, {1: None}, {1: None, 2: None}, {1: None, 2: None}])

    def sleep(seconds: float) -> None:
        grid.nodes = next(growing)  # type: ignore[assignment]

    assert roles.count_nodes(grid, sleep=sleep) == 2


def test_a_simulation_without_nodes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "NODES_S", 0.0)
    with pytest.raises(StartError, match="no node"):
        roles.count_nodes(MemoryGrid({}), sleep=lambda seconds: None)
