"""Whether a difference between two methods is one: pairs by seed, and two intervals over them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

# Fewer pairs can be drawn in too few ways to say anything.
LEAST_SEEDS = 3
RESAMPLES = 10_000
LEVEL = 0.95
_SEED = 20_507


@dataclass(frozen=True)
class Paired:
    """A method's distances against another's, over the seeds that both have.

    Attributes:
        num_seeds: that both have, at least 1.
        relative: mean of the method over mean of the other, minus 1.
        interval: of ``relative``, at 95%, by the bootstrap over seeds; None with fewer than three
            seeds, or infinite distances. With so few seeds it is too narrow: five cover about 80%,
            three about three quarters.
        student: the 95% interval by Student's t of the mean logarithm of the ratios, as a relative
            difference; where the logarithms are normal it covers 95% with any number of seeds.
        wins: seeds in which the method has the lower distance.
    """

    num_seeds: int
    relative: float
    interval: tuple[float, float] | None
    student: tuple[float, float] | None
    wins: int

    @classmethod
    def of(cls, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Self | None:
        """From distances by seed; None without a common seed, or where the other's mean is 0."""
        seeds = sorted(ours.keys() & theirs.keys())
        a, b = (np.array([side[seed] for seed in seeds]) for side in (ours, theirs))
        if not seeds or not b.sum():
            return None
        enough = len(seeds) >= LEAST_SEEDS and bool(np.isfinite([a, b]).all())
        interval = _bootstrap(a, b) if enough else None
        student = _student(a, b) if enough and min(*a, *b) > 0 else None
        return cls(len(seeds), float(_relative(a, b)), interval, student, int((a < b).sum()))

    @property
    def text(self) -> str:
        """Such as ``-47% [-55%, -40%; t: -60%, -31%], 5 of 5 seeds``."""
        bounds = ""
        if self.interval:
            both = [self.interval, self.student] if self.student else [self.interval]
            texts = [f"{low:+.0%}, {high:+.0%}" for low, high in both]
            bounds = f" [{'; t: '.join(texts)}]"
        return f"{self.relative:+.0%}{bounds}, {self.wins} of {self.num_seeds} seeds"


def _relative(a: Any, b: Any, axis: int = -1) -> Any:
    return a.mean(axis=axis) / b.mean(axis=axis) - 1


def _bootstrap(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Percentiles of ``_relative`` over seeds drawn with repeats; scipy takes a while to import."""
    from scipy.stats import bootstrap  # type: ignore[import-untyped]

    found = bootstrap(
        (a, b),
        _relative,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def _student(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The interval of the ratio of geometric means, minus 1; ``a`` and ``b`` are positive."""
    from scipy.stats import t

    logs = np.log(a / b)
    half = t.ppf((1 + LEVEL) / 2, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    low, high = np.expm1([logs.mean() - half, logs.mean() + half])
    return float(low), float(high)
