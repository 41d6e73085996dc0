"""What a run configuration of ``flwr run`` means, and what is refused."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from support.memory import MemoryGrid

from fedphd.common.config.roles import ClientConfig, CloudConfig
from fedphd.common.config.text import flattened, setting_keys
from fedphd.common.errors import ConfigError, StartError
from fedphd.deploy.apps.roles import count_nodes
from fedphd.deploy.simulation.run_config import (
    NAMED,
    client_config,
    cloud_config,
    default_run_config,
    given_settings,
)

ROOT = Path(__file__).parents[4]
DEFAULTS = default_run_config()


@pytest.mark.parametrize("path", ["pyproject.toml", "deploy/bundle/pyproject.toml"])
def test_both_projects_have_the_keys_of_the_code(path: str) -> None:
    project = tomllib.loads((ROOT / path).read_text("utf-8"))
    assert dict(flattened(project["tool"]["flwr"]["app"]["config"])) == DEFAULTS
    assert len(DEFAULTS) <= 25


def test_every_key_is_a_setting() -> None:
    known = {*setting_keys(CloudConfig), *setting_keys(ClientConfig)}
    assert [key for key in NAMED if key not in known] == []
    assert set(DEFAULTS) - set(NAMED) == {"settings", "role-file"}


def test_settings_take_what_has_no_key_of_its_own() -> None:
    settings = (
        "model.block_out_channels=[32, 64, 64] evaluation.raw_too=true\n"
        'evaluation.reference=null data.label_attributes=["Male", "a b"] '
        'data.attribute_file=list.txt schedule={"min_clients": 4}'
    )
    run_config = {**DEFAULTS, "schedule.intervals": 7, "seed": 3, "settings": settings}
    config = cloud_config(run_config, 10)
    assert config.model.block_out_channels == (32, 64, 64)
    assert config.evaluation.raw_too
    assert config.evaluation.reference is None
    assert (config.schedule.intervals, config.schedule.min_clients, config.seed) == (7, 4, 3)
    data = client_config(run_config, 1, 10).data
    assert data.label_attributes == ("Male", "a b")
    assert data.partition is not None
    assert data.partition.seed == 3


def test_the_clients_see_the_settings_that_have_keys_in_the_text_too() -> None:
    settings = "preset=cifar10 seed=5 device=cpu data.partition.kind=iid"
    client = client_config({**DEFAULTS, "settings": settings}, 1, 10)
    assert (client.device, client.data.source) == ("cpu", "uoft-cs/cifar10")
    assert client.data.partition is not None
    assert (client.data.partition.kind, client.data.partition.seed) == ("iid", 5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            "schedule.intervalz=3",
            "schedule.intervalz: unknown key; did you mean 'schedule.intervals'?",
        ),
        ("sede=3", "sede: unknown key; did you mean 'seed'?"),
        ("data.colour=red", "data.colour is not a setting of the clients' data; known: data.s"),
        ("superlink.address=a:1", "superlink.address: a simulation has no such setting"),
        ("state_dir=here", "settings: state_dir: a simulation has no such setting; leave it out"),
        ("seed=1 quick", "--run-config: settings: quick: write KEY=VALUE, such as"),
        ("ema.decay=2", "ema.decay = 2: input should be less than 1"),
        # Whatever the key holds, and however the setting is written.
        ("seed=0", "settings: seed = 0, but the key seed = 0 is given too; keep one of them"),
        ('pruning={"ratio": 0.5}', "pruning.ratio = 0.5, but the key pruning.ratio = 0.25 is"),
        ("pruning=null", "pruning = None: input should be"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: str, said: str) -> None:
    run_config = {**DEFAULTS, "seed": 0, "pruning.ratio": 0.25, "settings": settings}
    with pytest.raises(ConfigError, match=re.escape(said)):
        cloud_config(run_config, 10)


def test_an_empty_value_says_nothing() -> None:
    assert given_settings(DEFAULTS) == {}
    assert given_settings({**DEFAULTS, "reproducible": False, "seed": 0}) == {
        "reproducible": False, "seed": 0,
    }  # fmt: skip


def test_unset_keys_are_as_in_the_preset() -> None:
    config = cloud_config({**DEFAULTS, "preset": "cifar10", "schedule.intervals": 300}, 10)
    assert config.model.block_out_channels == (128, 256, 256, 256)
    assert config.schedule.intervals == 300
    assert config.schedule.participation == 0.4


def test_a_run_waits_for_all_simulated_nodes_unless_told_otherwise() -> None:
    assert cloud_config({**DEFAULTS, "preset": "cifar10"}, 10).schedule.min_clients == 10
    config = cloud_config({**DEFAULTS, "settings": "schedule.min_clients=4"}, 10)
    assert config.schedule.min_clients == 4


def test_more_clients_than_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_clients = 20, but 10 nodes .*num-supernodes=20"):
        cloud_config({**DEFAULTS, "settings": "schedule.min_clients=20"}, 10)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"preset": "nope"},
            "preset = 'nope': unknown; choose one of digits, cifar10-16, cifar10, celeba",
        ),
        ({"schedule.intervals": "many"}, "--run-config: 1 .*\n  schedule.intervals = 'many'"),
        ({"settings": "model.block_out_channels=[30,64]"}, "width 30, which norm_num_groups = 8"),
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

    assert count_nodes(grid, sleep=sleep) == 2


def test_a_simulation_without_nodes_is_an_error() -> None:
    with pytest.raises(StartError, match="no node after 0 s"):
        count_nodes(MemoryGrid({}), within_s=0.0, sleep=lambda seconds: None)
