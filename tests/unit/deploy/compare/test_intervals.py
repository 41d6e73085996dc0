"""Paired differences, with values worked out by hand."""

from __future__ import annotations

import pytest

from fedphd.deploy.compare.intervals import Paired


def test_only_common_seeds_count() -> None:
    pair = Paired.of({0: 5.0, 1: 9.0, 7: 1.0}, {0: 10.0, 1: 10.0, 8: 99.0})
    assert pair is not None
    assert (pair.num_seeds, pair.wins, pair.interval) == (2, 2, None)
    assert pair.relative == pytest.approx(-0.3)
    assert pair.text == "-30%, 2 of 2 seeds"


def test_what_cannot_be_compared_has_no_pair() -> None:
    assert Paired.of({0: 5.0}, {1: 5.0}) is None
    assert Paired.of({0: 5.0}, {0: 0.0}) is None


def test_an_interval_holds_what_redrawn_seeds_give() -> None:
    # Every draw of these pairs has means between the extreme seeds': 0.5 and 0.9.
    pair = Paired.of({0: 5.0, 1: 7.0, 2: 9.0}, {0: 10.0, 1: 10.0, 2: 10.0})
    assert pair is not None
    # All seeds alike is drawn with 1 in 27, more often than the 2.5% that are left out.
    assert pair.interval == pytest.approx((-0.5, -0.1))
    # Logarithms -0.6931, -0.3567, -0.1054: their mean is -0.3851, and Student's t for two degrees
    # of freedom, 4.3027, times 0.2949 / sqrt(3) is 0.7327.
    assert pair.student == pytest.approx((-0.6730, 0.4156), abs=1e-4)
    assert pair.text == "-30% [-50%, -10%; t: -67%, +42%], 3 of 3 seeds"


def test_ratios_without_a_logarithm_have_one_interval() -> None:
    pair = Paired.of({0: 0.0, 1: 5.0, 2: 5.0}, {0: 10.0, 1: 10.0, 2: 10.0})
    assert pair is not None
    assert pair.student is None
    assert pair.text == "-67% [-100%, -50%], 3 of 3 seeds"
    endless = Paired.of({0: 1.0, 1: 5.0, 2: float("inf")}, {0: 10.0, 1: 10.0, 2: 10.0})
    assert endless is not None
    assert (endless.interval, endless.student) == (None, None)


def test_pairs_are_drawn_together() -> None:
    """Seeds that are hard for both leave the ratio as it is, however far they spread."""
    pair = Paired.of({0: 1.0, 1: 10.0, 2: 100.0}, {0: 2.0, 1: 20.0, 2: 200.0})
    assert pair is not None
    assert pair.interval == pytest.approx((-0.5, -0.5))
