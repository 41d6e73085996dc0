"""The bound on updates and the trimmed mean, by hand and over drawn values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import MANY

from fedphd.common.robust import (
    UpdateBound,
    UsualNorms,
    can_trim,
    excess,
    medians,
    norm_of,
    num_trimmed,
    trimmed_mean,
    update_norm,
)


def play(bound: UpdateBound[str], **norms: float) -> tuple[list[str], list[str], dict[str, str]]:
    """A round's replies in order: used at once, used at the end, and dropped with the reason."""
    bound.start()
    at_once = [name for key, norm in norms.items() for name in bound.offer((norm,), key)]
    used, dropped = bound.finish()
    return at_once, used, dict(dropped)


def test_norms_by_hand() -> None:
    sent, reply = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 2.0, -1.0])
    # (3, 0, -4)
    assert update_norm(reply, sent) == 5.0
    assert norm_of(torch.tensor([3.0, 4.0])) == 5.0
    assert update_norm(torch.full((4,), 1e12), torch.zeros(4)) == pytest.approx(2e12)
    # Squares that float32 cannot hold.
    for size in (1e25, 1e-25):
        assert norm_of(torch.full((4,), size)) == pytest.approx(2 * size)
    # Over more values than are worked on at a time: 1,200,000 ones.
    assert norm_of(torch.ones(1_200_000)) == pytest.approx(math.sqrt(1_200_000))
    assert norm_of(torch.zeros(0)) == 0.0


def test_median_is_the_lower_of_the_two_in_the_middle() -> None:
    assert medians([(3.0,), (1.0,), (2.0,)]) == (2.0,)
    assert medians([(4.0, 1.0), (1.0, 2.0), (3.0, 7.0), (2.0, 5.0)]) == (2.0, 2.0)


def test_reason_says_how_much() -> None:
    assert excess((10.0,), (1.0,), 10.0) is None
    assert excess((30.0, 1.0), (2.0, 1.0), 10.0) == (
        "its change of the weights, per optimiser step, has the norm 30, 15 times the median 2 of "
        "its round; at most 10 times is allowed (aggregation.max_update_ratio)"
    )
    assert (
        "of the control variate has the norm 50, 25 times 2, the largest median of a round so far;"
    ) in str(excess((1.0, 50.0), (1.0, 2.0), 10.0))
    assert excess((5.0,), (0.0,), 10.0) is None, "most replies are what was sent"


def test_first_round_is_measured_from_its_third_reply_on() -> None:
    bound = UpdateBound[str](10.0)
    bound.start()
    assert bound.offer((1.0,), "a") == []
    assert bound.offer((50.0,), "b") == []
    assert bound.num_held == 2
    # The median of 1, 50 and 2 is 2: b is held back.
    assert bound.offer((2.0,), "c") == ["a", "c"]
    assert bound.offer((3.0,), "d") == ["d"]
    assert bound.num_held == 1
    used, [(name, why)] = bound.finish()
    assert (used, name) == ([], "b")
    assert "25 times the median 2 of its round" in why
    assert bound.num_held == 0


def test_later_rounds_use_at_once_what_the_last_one_lets_pass() -> None:
    bound = UpdateBound[str](10.0)
    play(bound, a=1.0, b=2.0, c=3.0)
    at_once, used, dropped = play(bound, a=500.0, b=2.0, c=1.0, d=20.0)
    # 10 times the last median, 2.
    assert at_once == ["b", "c", "d"]
    assert used == []
    assert list(dropped) == ["a"]


def test_what_exceeds_the_last_median_but_not_its_own_is_used() -> None:
    bound = UpdateBound[str](10.0)
    play(bound, a=1.0, b=1.0, c=1.0)
    # All updates have grown, as a learning rate that warms up makes them grow.
    assert play(bound, a=30.0, b=40.0, c=50.0) == ([], ["a", "b", "c"], {})
    assert play(bound, a=30.0, b=40.0, c=50.0) == (["a", "b", "c"], [], {})


def test_two_replies_cannot_tell_which_is_wrong() -> None:
    bound = UpdateBound[str](10.0)
    assert play(bound, a=1.0, b=1e9) == ([], ["a", "b"], {})
    play(bound, a=1.0, b=1.0, c=1.0)
    assert play(bound, a=1.0, b=1e9) == (["a"], ["b"], {})
    assert play(bound, a=1.0, b=2.0, c=30.0)[2].keys() == {"c"}, "measured by the last full round"


def play_variates(bound: UpdateBound[str], *norms: float, sent: float = 0.0) -> list[str]:
    """A round in which only the changes of the variates differ; returns who is dropped."""
    bound.start(sent)
    for place, norm in enumerate(norms):
        bound.offer((1.0, norm), f"{place}")
    return [name for name, _ in bound.finish()[1]]


def test_who_trains_for_the_first_time_may_send_all_of_its_variate() -> None:
    bound = UpdateBound[str](10.0)
    assert play_variates(bound, 0.4, 0.5, 0.6) == []
    # The others' gradients have hardly changed.
    assert play_variates(bound, 0.02, 0.5, 0.01, 0.02) == []
    assert play_variates(bound, 0.02, 0.5, 5.1, 0.02) == ["2"], "10 times 0.5, of the first round"


def test_who_watches_a_run_from_its_middle_begins_with_the_servers_variate() -> None:
    bound = UpdateBound[str](10.0)
    assert play_variates(bound, 0.02, 0.02, 0.5, 1.1, sent=0.1) == ["3"]
    # What attackers add to the server's variate makes no room for more.
    assert play_variates(bound, 0.02, 0.02, 0.5, 1.1, sent=1.0) == ["3"]


def test_usual_norms_by_hand() -> None:
    usual = UsualNorms()
    usual.start(0.5)
    assert usual.finish([(4.0, 0.25), (1.0, 1.0), (2.0, 2.0)]) == (2.0, 1.0)
    assert usual.of([(3.0, 0.25)]) == (3.0, 1.0)
    assert usual.of([(3.0,), (1.0,)]) == (1.0,), "other methods have no variate"


def test_zero_is_no_bound() -> None:
    assert play(UpdateBound[str](0), a=1.0, b=1.0, c=1e30)[0] == ["a", "b", "c"]


def test_interrupted_round_leaves_nothing_behind() -> None:
    bound = UpdateBound[str](10.0)
    bound.start()
    bound.offer((1.0,), "old")
    assert play(bound, a=1.0, b=1.0, c=1.0) == (["a", "b", "c"], [], {})


norm_lists = st.lists(st.floats(0, 1e6), max_size=12)


@MANY
@given(st.lists(norm_lists, min_size=1, max_size=4), st.sampled_from([0.0, 1.5, 10.0]))
def test_every_reply_is_used_or_dropped_once(rounds: list[list[float]], ratio: float) -> None:
    bound = UpdateBound[int](ratio)
    for norms in rounds:
        bound.start()
        at_once = [n for i, norm in enumerate(norms) for n in bound.offer((norm,), i)]
        used, dropped = bound.finish()
        assert sorted([*at_once, *used, *(i for i, _ in dropped)]) == list(range(len(norms)))
        assert len(dropped) <= len(norms) / 2, "half of them are at most the median"
        if len(norms) < 3 or not ratio:
            assert dropped == []
        else:
            [median] = medians([(norm,) for norm in norms])
            assert all(norms[i] > ratio * median for i, _ in dropped)


@MANY
@given(st.lists(st.floats(1.0, 9.0), min_size=1, max_size=12))
def test_without_outliers_the_order_stays(norms: list[float]) -> None:
    bound = UpdateBound[int](10.0)
    for _ in range(2):
        bound.start()
        at_once = [n for i, norm in enumerate(norms) for n in bound.offer((norm,), i)]
        used, dropped = bound.finish()
        assert [*at_once, *used] == list(range(len(norms)))
        assert dropped == []


@pytest.mark.parametrize(
    ("num", "trim", "expected"),
    [(10, 0.1, 1), (30, 0.1, 3), (8, 0.1, 1), (11, 0.1, 2), (5, 0.4, 2)],
)
def test_number_that_is_trimmed_is_rounded_up(num: int, trim: float, expected: int) -> None:
    assert num_trimmed(num, trim) == expected


@pytest.mark.parametrize(
    ("num", "trim", "enough"), [(0, 0.1, False), (2, 0.1, False), (3, 0.1, True), (4, 0.4, False)]
)
def test_something_must_be_left(num: int, trim: float, enough: bool) -> None:
    assert can_trim(num, trim) is enough
    if not enough and num:
        with pytest.raises(ValueError, match="leave nothing to average"):
            trimmed_mean([torch.zeros(1)] * num, trim)


def test_trimmed_mean_by_hand() -> None:
    replies = [
        torch.tensor([1.0, 9.0, -1e12]),
        torch.tensor([2.0, 1.0, 4.0]),
        torch.tensor([6.0, 2.0, 6.0]),
        torch.tensor([1e12, 3.0, 5.0]),
    ]
    # (2 + 6) / 2, (2 + 3) / 2, (4 + 5) / 2
    assert trimmed_mean(replies, 0.25).tolist() == [4.0, 2.5, 4.5]
    # The median of three.
    assert trimmed_mean(replies[:3], 0.1).tolist() == [2.0, 2.0, 4.0]


@MANY
@given(
    st.lists(st.floats(-1.0, 1.0, width=32), min_size=5, max_size=9), st.floats(-1e9, 1e9, width=32)
)
def test_one_reply_cannot_leave_the_range_of_the_others(values: list[float], bad: float) -> None:
    replies = [torch.tensor([value]) for value in (*values, bad)]
    mean = trimmed_mean(replies, 0.1).item()
    assert min(values) - 1e-6 <= mean <= max(values) + 1e-6


def test_trimmed_mean_of_more_than_is_worked_on_at_a_time() -> None:
    numel = 1_200_000
    replies = [torch.full((numel,), value) for value in (1.0, 5.0, 2.0)]
    assert trimmed_mean(replies, 0.1).unique().tolist() == [2.0]
