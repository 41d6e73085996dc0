"""What methods may spend, worked out by hand."""

from __future__ import annotations

import pytest

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.errors import ConfigError
from fedphd.deploy.compare.budget import (
    RoundBytes,
    Workload,
    evaluation_period,
    method_settings,
    own_work,
)
from fedphd.deploy.compare.methods import read_methods

METHODS = read_methods()
BASE = load_config(
    CloudConfig,
    None,
    {
        "pruning.mode": "none",
        "schedule.intervals": 7,
        "schedule.edge_rounds": 5,
        "schedule.participation": 0.4,
        "training.local_amount": 2,
        "training.batch_size": 30,
    },
)


def config_of(name: str, intervals: int = 7) -> CloudConfig:
    settings = method_settings(METHODS[name], BASE, intervals=intervals)
    common = {"schedule.participation": 0.4, "training.batch_size": 30}
    return load_config(CloudConfig, None, {**common, **settings})


def test_flat_methods_train_in_one_go_what_others_spread_over_edge_rounds() -> None:
    flat, spread = config_of("fedavg"), config_of("fedphd")
    assert (flat.topology, spread.topology) == ("flat", "hierarchical")
    assert (flat.schedule.edge_rounds, flat.training.local_amount) == (1, 10)
    assert (spread.schedule.edge_rounds, spread.training.local_amount) == (5, 2)
    assert flat.schedule.intervals == spread.schedule.intervals == 7


def test_pruning_comes_after_half_of_the_cloud_rounds() -> None:
    # Half of 7, rounded down, times 5 edge rounds.
    assert config_of("fedphd").pruning.sparse_rounds == 15
    assert config_of("fedphd_os").pruning.mode == "one_shot"
    assert config_of("fedphd_dense").pruning.mode == "none"
    assert config_of("fedavg").pruning.mode == "none"
    with pytest.raises(ConfigError, match=r"'fedphd' prunes after half .* there is only 1"):
        method_settings(METHODS["fedphd"], BASE, intervals=1)


def test_pruning_comes_half_way_of_a_method_with_edge_rounds_of_its_own() -> None:
    own = METHODS["fedphd"].settings | {"schedule.edge_rounds": 2}
    method = METHODS["fedphd"].model_copy(update={"settings": own})
    assert method_settings(method, BASE, intervals=7)["pruning.sparse_rounds"] == 6
    assert own_work(method) == ["schedule.edge_rounds"]
    # What the methods of the table set is no amount of training.
    assert not any(map(own_work, METHODS.values()))


def test_methods_do_equal_local_work() -> None:
    # 20 clients, 8 take part; 19 of them hold 90 images (3 steps of 30), one 91 (4 steps).
    sizes = [90] * 19 + [91]
    flat, spread = Workload.of(config_of("fedavg"), sizes), Workload.of(config_of("fedphd"), sizes)
    assert (flat.participants, spread.participants) == (8, 8)
    # 8 clients x 10 epochs = 8 clients x 5 rounds x 2 epochs; times 7 cloud rounds.
    assert flat.local_per_cloud_round == spread.local_per_cloud_round == 80
    assert flat.total_local == spread.total_local == 560
    # 10 passes of (19 * 3 + 4) / 20 = 3.05 steps, or 2 of them.
    assert flat.steps_per_round == pytest.approx(30.5)
    assert spread.steps_per_round == pytest.approx(6.1)
    # 560 passes of 3.05 steps.
    assert flat.total_steps == pytest.approx(1708)
    assert spread.total_steps == pytest.approx(1708)


def test_work_in_steps_does_not_depend_on_the_images() -> None:
    steps = BASE.model_copy(
        update={"training": BASE.training.model_copy(update={"local_unit": "steps"})}
    )
    work = Workload.of(steps, [10, 1000])
    # 0.4 of 2 clients is 0.8: one takes part; 7 x 5 rounds of 2 steps.
    assert (work.participants, work.steps_per_round, work.total_steps) == (1, 2, 70)


@pytest.mark.parametrize(
    ("budget", "rounds"), [(99, 0), (100, 1), (179, 1), (180, 2), (500, 6), (499, 5)]
)
def test_as_many_rounds_as_fit_in_the_bytes(budget: int, rounds: int) -> None:
    # 100 bytes first, 80 each later: 100, 180, 260, 340, 420, 500.
    moved = RoundBytes(first=100, later=80)
    assert moved.total(6) == 500
    assert moved.rounds_within(budget) == rounds


def test_rounds_after_pruning_are_cheaper() -> None:
    moved = RoundBytes(first=100, later=100, pruned=60)
    # Half, rounded down, at 100, the others at 60.
    assert [moved.total(rounds) for rounds in (2, 3, 4, 5)] == [160, 220, 320, 380]
    assert moved.rounds_within(319) == 3
    assert moved.rounds_within(380) == 5
    # One round has no half: 159 bytes are not enough for two.
    assert [moved.rounds_within(num_bytes) for num_bytes in (159, 160)] == [0, 2]
    # Whole weights in the first round, differences afterwards.
    coded = RoundBytes(first=400, later=100, pruned=60)
    assert [coded.total(rounds) for rounds in (2, 3, 4, 5)] == [460, 520, 620, 680]
    assert coded.rounds_within(679) == 4


def test_evaluations_are_about_as_many_whatever_the_rounds() -> None:
    base = load_config(CloudConfig)
    # The preset evaluates every 4 of 12 rounds.
    assert evaluation_period(base, intervals=12) == 4
    assert evaluation_period(base, intervals=24) == 8
    assert evaluation_period(base, intervals=2) == 1
