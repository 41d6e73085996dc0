"""Training metrics: weighted means that add up, and keep their bits on the way."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from support.metrics import metrics

from fedphd.common.wire.metrics import Mean, TrainMetrics


def test_a_client_sends_means_over_its_steps() -> None:
    steps = [{"loss": 1.0, "sparsity_penalty": 0.0}, {"loss": 2.0, "sparsity_penalty": 3.0}]
    found = TrainMetrics.of_steps(steps, validation_loss=None)
    assert found.values() == {
        "loss": 1.5, "sparsity_penalty": 1.5, "objective_term": None, "gradient_norm": None,
        "validation_loss": None,
    }  # fmt: skip
    assert found.is_of_one_client()
    assert TrainMetrics.of_steps(steps, validation_loss=0.25).validation_loss.value == 0.25


def test_merging_weighs_each_mean_by_those_who_measured_it() -> None:
    """(10 x 0.2 + 30 x 0.6) / 40 = 0.5; only the second validated."""
    small = metrics(loss=0.2).weighing(10)
    large = metrics(loss=0.6, validation_loss=7.0).weighing(30)
    merged = TrainMetrics.merge([small, large])
    assert merged.loss.value == pytest.approx(0.5)
    assert (merged.loss.weight, merged.validation_loss.weight) == (40, 30)
    assert merged.validation_loss.value == 7.0
    assert TrainMetrics.merge([]).values()["loss"] is None


def test_a_smaller_weight_leaves_the_mean() -> None:
    merged = metrics(40, loss=0.3).per(8)
    assert (merged.loss.value, merged.loss.weight) == (pytest.approx(0.3), 5.0)
    assert metrics().per(8) == TrainMetrics()


CLAIMS = [metrics(2.0, loss=1.0), metrics(loss=1e20), metrics(0.5, loss=1.0)]


@pytest.mark.parametrize("claimed", CLAIMS)
def test_what_no_single_client_sends_is_seen(claimed: TrainMetrics) -> None:
    assert not claimed.is_of_one_client()


def test_what_is_never_negative_is_refused() -> None:
    below = Mean(total=-1.0, weight=1.0)
    assert TrainMetrics(loss=below).loss.value == -1.0
    with pytest.raises(ValidationError, match=r"never negative has the sum -1\.0"):
        TrainMetrics(validation_loss=below)


def test_a_mean_of_nothing_has_no_sum() -> None:
    assert Mean().value is None
    with pytest.raises(ValidationError, match="a mean of nothing has the sum 1"):
        Mean(total=1.0, weight=0.0)
