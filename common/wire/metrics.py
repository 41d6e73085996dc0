"""Figures of training on their way from a client's optimiser steps to the run's summary.

This is the one place that names them. A new one is a field of ``MetricValues`` and
``TrainMetrics``, a value in ``client/steps.py``, and where people are to see it a word in
``deploy/launch/render.py``.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from fedphd.common.wire.payload import MOST, MOST_OF_CLIENT, Payload


class Mean(Payload):
    """A weighted mean, as a sum and a weight so that means add up; no weight: nobody measured."""

    total: float = Field(0.0, ge=-MOST, le=MOST)
    weight: float = Field(0.0, ge=0, le=MOST)

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        # It would pass every check of a mean's value, and count once it is added to another.
        if self.total and not self.weight:
            raise ValueError(f"a mean of nothing has the sum {self.total}; expected 0")
        return self

    @property
    def value(self) -> float | None:
        """The mean; None if nobody measured."""
        return self.total / self.weight if self.weight else None

    def __add__(self, other: Self) -> Self:
        return type(self)(total=self.total + other.total, weight=self.weight + other.weight)

    def weighing(self, weight: float) -> Self:
        """The same mean with another weight; still nothing if nobody measured."""
        if self.value is None:
            return self
        return type(self)(total=self.value * weight, weight=weight)


def _not_negative(mean: Mean) -> Mean:
    if mean.total < 0:
        raise ValueError(f"the mean of values that are never negative has the sum {mean.total}")
    return mean


PositiveMean = Annotated[Mean, AfterValidator(_not_negative)]


class MetricValues(BaseModel):
    """The values of ``TrainMetrics``, as events and the summary show them; None: not measured.

    Attributes:
        loss: of the objective alone, without the method's term and the sparsity penalty.
        sparsity_penalty: the group penalty before its factor lambda; 0 where it was off.
        objective_term: what the method added to the loss (FedProx, MOON).
        gradient_norm: 2-norm of the gradient of all that is minimised, before it is clipped.
        validation_loss: of the weights that were received, over held out images.
    """

    loss: float | None = None
    sparsity_penalty: float | None = None
    objective_term: float | None = None
    gradient_norm: float | None = None
    validation_loss: float | None = None


class TrainMetrics(Payload):
    """``MetricValues`` as means: over optimiser steps, then clients, then edge rounds and edges."""

    loss: Mean = Mean()
    sparsity_penalty: PositiveMean = Mean()
    objective_term: PositiveMean = Mean()
    gradient_norm: PositiveMean = Mean()
    validation_loss: PositiveMean = Mean()

    @classmethod
    def of_steps(cls, steps: Sequence[dict[str, float]], **once: float | None) -> Self:
        """A client's means over its steps, each with weight 1.

        Values by field name: ``steps`` has the same names in every step, ``once`` those that a
        round has once; None was not measured.
        """
        means = {name: math.fsum(step[name] for step in steps) / len(steps) for name in steps[0]}
        found = means | {name: value for name, value in once.items() if value is not None}
        return cls(**{name: Mean(total=value, weight=1.0) for name, value in found.items()})

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """The means over all ``parts`` together, each by its weight."""
        sums = {name: Mean() for name in cls.model_fields}
        for part in parts:
            sums = {name: mean + part.means()[name] for name, mean in sums.items()}
        return cls(**sums)

    def weighing(self, weight: float) -> Self:
        """The same means, each with ``weight``, such as a client's number of images."""
        return type(self)(**{n: mean.weighing(weight) for n, mean in self.means().items()})

    def per(self, num: int) -> Self:
        """The same means with weights that are ``num`` times smaller."""
        means = self.means().items()
        return type(self)(**{name: mean.weighing(mean.weight / num) for name, mean in means})

    def means(self) -> dict[str, Mean]:
        """All means by name."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def values(self) -> dict[str, float | None]:
        """All values by name, the fields of ``MetricValues``; None where nobody measured."""
        return {name: mean.value for name, mean in self.means().items()}

    def is_of_one_client(self) -> bool:
        """Whether these can be what one client sends: each measured once or not, none absurd."""
        means = self.means().values()
        return all(m.weight in (0.0, 1.0) and abs(m.total) <= MOST_OF_CLIENT for m in means)
