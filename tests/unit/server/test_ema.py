"""The moving average of the global weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from support.edges import Cloud, FakeEdge, run_config

from fedphd.common.errors import FedPhDError
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.records import weights_record
from fedphd.server.ema import Ema
from fedphd.server.strategy import FedPhD


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 2), value), "b": torch.full((3,), -value)}


def test_until_the_first_update_it_is_the_initial_weights_in_its_own_memory() -> None:
    initial = weights(4.0)
    ema = Ema(initial, decay=0.9)
    initial["a"].zero_()
    assert ema.state["a"].tolist() == [[4, 4], [4, 4]]
    assert ema.state["b"].tolist() == [-4, -4, -4]


def test_once_warmed_up_it_decays_by_the_number_of_steps() -> None:
    ema = Ema(weights(1.0), decay=0.9, steps=81.0)
    ema.update(weights(3.0), mean_steps=2.0)
    # 0.9 ** 2 = 0.81 of 1 and 0.19 of 3.
    torch.testing.assert_close(ema.state, weights(0.81 * 1 + 0.19 * 3))
    ema.update(weights(3.0), mean_steps=0.5)
    torch.testing.assert_close(ema.state, weights(3 - 1.62 * 0.9**0.5))
    assert ema.steps == 83.5


def test_warm_up_ends_where_the_decay_is_reached() -> None:
    # (10 * 0.9 - 1) / 0.1 = 80 steps.
    assert Ema({}, decay=0.9).warmup_ends == pytest.approx(80)
    assert Ema({}, decay=0.9, steps=79.0).retained(1.0) == pytest.approx(80 / 89)
    assert Ema({}, decay=0.9, steps=80.0).retained(1.0) == pytest.approx(0.9)
    assert Ema({}, decay=0.9, steps=79.0).retained(2.0) == pytest.approx(80 / 89 * 0.9)
    # (4 * 0.9 - 1) / 0.1 = 26.
    assert Ema({}, decay=0.9, warmup=4, steps=25.0).retained(2.0) == pytest.approx(26 / 29 * 0.9)


def test_it_is_the_average_of_diffusers() -> None:
    theirs = EMAModel([torch.nn.Parameter(torch.tensor(7.0))], decay=0.9)
    ours = Ema({"a": torch.tensor(7.0)}, decay=0.9)
    for value in range(100):
        weight = torch.tensor(float(value) ** 0.5)
        theirs.step([torch.nn.Parameter(weight)])
        ours.update({"a": weight}, mean_steps=1.0)
        torch.testing.assert_close(ours.state["a"], theirs.shadow_params[0])


def test_without_warm_up_only_the_first_step_is_dropped() -> None:
    ema = Ema({}, decay=0.9, warmup=1)
    assert (ema.retained(3.0), ema.warmup_ends) == (0.0, 0.0)
    assert Ema({}, decay=0.9, warmup=1, steps=1.0).retained(2.0) == pytest.approx(0.81)


def test_its_span_is_a_share_of_the_training_until_the_decay_is_reached() -> None:
    # The latest step, n = 18, has decay 19 / 28, so the average covers 28 / 9 steps.
    assert Ema({}, decay=0.9, steps=19.0).span == pytest.approx(28 / 9)
    assert Ema({}, decay=0.9, steps=1000.0).span == pytest.approx(10)
    assert Ema({}, decay=0.9, steps=1.0).span == 1


def test_the_first_update_drops_the_random_initial_weights() -> None:
    ema = Ema(weights(100.0), decay=0.995)
    ema.update(weights(3.0), mean_steps=8.0)
    torch.testing.assert_close(ema.state, weights(3.0), rtol=0, atol=0)


@pytest.mark.parametrize(("start", "steps"), [(1, 5), (70, 30), (200, 7)])
def test_an_interval_decays_like_its_steps_one_by_one(start: int, steps: int) -> None:
    one_by_one = math.prod(min(0.9, (1 + n) / (10 + n)) for n in range(start, start + steps))
    assert Ema({}, decay=0.9, steps=start).retained(steps) == pytest.approx(one_by_one)


def test_an_interval_decays_like_its_two_parts() -> None:
    whole = Ema({}, decay=0.9, steps=60.0).retained(40.25)
    parts = Ema({}, decay=0.9, steps=60.0).retained(7.75) * Ema(
        {}, decay=0.9, steps=67.75
    ).retained(32.5)
    assert whole == pytest.approx(parts)


def test_no_steps_change_nothing() -> None:
    ema = Ema(weights(1.0), decay=0.9)
    ema.update(weights(3.0), mean_steps=0.0)
    torch.testing.assert_close(ema.state, weights(1.0), rtol=0, atol=0)


def test_decay_0_follows_the_weights() -> None:
    ema = Ema(weights(1.0), decay=0.0, steps=5.0)
    ema.update(weights(3.0), mean_steps=1.0)
    torch.testing.assert_close(ema.state, weights(3.0))


def test_the_given_weights_stay_as_they_are() -> None:
    given = weights(3.0)
    ema = Ema(weights(1.0), decay=0.9)
    ema.update(given, mean_steps=4.0)
    ema.update(weights(8.0), mean_steps=4.0)
    torch.testing.assert_close(given, weights(3.0), rtol=0, atol=0)


def test_it_is_cut_with_the_weights() -> None:
    ema = Ema({"a": torch.arange(4.0).view(2, 2), "b": torch.arange(3.0)}, decay=0.9)
    layout = TensorLayout(("a", "b"), ((2, 2), (3,)))
    ema.cut(Cut(layout, (((1,), None), ((0, 2),))))
    assert ema.state["a"].tolist() == [[2, 3]]
    assert ema.state["b"].tolist() == [0, 2]
    ema.update({"a": torch.ones(1, 2), "b": torch.ones(2)}, mean_steps=1.0)


def test_after_pruning_it_holds_the_averages_of_the_channels_that_stay() -> None:
    """The same run without pruning gives the average that the cut must have been made from."""

    def after_two_intervals(**pruning: Any) -> FedPhD:
        cloud = Cloud(
            FakeEdge("e"),
            config=run_config(schedule={"intervals": 3}, ema={"decay": 0.5}, pruning=pruning),
        )
        weights = weights_record(cloud.strategy.weights())
        cloud.strategy.start(cloud.grid, weights, num_rounds=2, timeout=5.0)
        return cloud.strategy

    dense = after_two_intervals(mode="none")
    # Two edge rounds an interval.
    pruned = after_two_intervals(mode="scheduled", ratio=0.5, sparse_rounds=4)
    assert pruned.cut is not None
    averages = pruned.cut.apply(dense.ema.state)
    raw = pruned.cut.apply(dense.unet.state_dict())
    state = pruned.ema.state
    assert list(state) == list(averages)
    for name, tensor in state.items():
        assert torch.equal(tensor, averages[name]), name
        # Each interval adds 1 to every raw weight, and the average follows it from behind.
        assert (raw[name] - tensor).min() > 0, name
    assert pruned.ema.steps == 8


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(FedPhDError, match=r"tensor a has shape \(2, 1\); expected \(2, 2\)"):
        Ema(weights(1.0), decay=0.9).update(
            {"a": torch.ones(2, 1), "b": torch.ones(3)}, mean_steps=1.0
        )


@pytest.mark.parametrize("mean_steps", [-1.0, math.nan, math.inf])
def test_an_impossible_number_of_steps_is_refused(mean_steps: float) -> None:
    with pytest.raises(FedPhDError, match=f"mean_steps = {mean_steps}"):
        Ema(weights(1.0), decay=0.9).update(weights(3.0), mean_steps=mean_steps)
