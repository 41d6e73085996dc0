"""How even label distributions are, and what follows from it: edge choice and cloud weights.

One function per equation of arXiv:2507.06449, in float64. A label distribution is an array of
shares, shape (num_classes,). Sums are of at most some hundred terms, so figures agree with the
paper's formulas to about 1e-12 relative, with counts of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Offer:
    """What an edge holds in an interval so far, as a client sees it when it chooses.

    Attributes:
        edge_id: stable name of the edge.
        label_distribution: label shares, shape (num_classes,).
        num_samples: samples that trained there in this interval.
    """

    edge_id: str
    label_distribution: tuple[float, ...]
    num_samples: float


def homogeneity_score(q: ArrayLike, target: ArrayLike) -> float:
    """Statistical homogeneity: ``2 - ||q - target||_2`` (the SH score of arXiv:2507.06449).

    Args:
        q: label distribution, shape (num_classes,).
        target: label distribution to be near, shape (num_classes,).

    Returns:
        2 for ``q == target``, never less than ``2 - sqrt(2)`` for shares that sum to 1.

    Raises:
        ValueError: an argument is not a vector of finite numbers >= 0, or lengths differ.
    """
    shares = _non_negative("q", q)
    wanted = _non_negative("target", target)
    _same_length("q", shares, "target", wanted)
    return 2.0 - float(np.linalg.norm(shares - wanted))


def merge(q_e: ArrayLike, n_e: float, q_n: ArrayLike, n_n: float) -> Vector:
    """Label distribution of an edge with a client: ``(n_e q_e + n_n q_n) / (n_e + n_n)``.

    Args:
        q_e: the edge's label distribution, shape (num_classes,).
        n_e: the edge's number of samples in this interval.
        q_n: the client's label distribution, shape (num_classes,).
        n_n: the client's number of samples.

    Returns:
        Shape (num_classes,), float64. Without any sample (``n_e + n_n == 0``) the edge stays
        what it was: a copy of ``q_e``.

    Raises:
        ValueError: an argument is negative, not finite or no vector, or lengths differ.
    """
    edge = _non_negative("q_e", q_e)
    client = _non_negative("q_n", q_n)
    _same_length("q_e", edge, "q_n", client)
    counts = _non_negative("n_e, n_n", [n_e, n_n])
    of_edge, of_client = _normalised(counts, otherwise=np.array([1.0, 0.0]))
    merged: Vector = of_edge * edge + of_client * client
    return merged


def selection_probabilities(
    edges: Sequence[tuple[ArrayLike, float]],
    q_n: ArrayLike,
    n_n: float,
    target: ArrayLike,
    *,
    a: float,
    b: float = 0.0,
    epsilon: float = 1e-8,
) -> Vector:
    """How likely a client chooses each edge (Eq. 9 of arXiv:2507.06449).

    ``s_e = max(a * homogeneity_score(merge(q_e, n_e, q_n, n_n), target) - n_e + b, 0) + epsilon``
    and ``p_e = s_e / sum(s)``.

    Args:
        edges: (label distribution, number of samples) of each edge.
        q_n: the client's label distribution, shape (num_classes,).
        n_n: the client's number of samples.
        target: label distribution to be near, shape (num_classes,).
        a: worth of one unit of homogeneity, in samples.
        b: offset, in samples.
        epsilon: least score of an edge, in samples; when all scores are cut off at 0 it makes
            the choice uniform (so does 0, as its limit).

    Returns:
        Shape (num_edges,), float64, sums to 1.

    Raises:
        ValueError: no edge, a negative or non-finite argument (``b`` may be negative), or
            lengths differ.
    """
    if len(edges) == 0:
        raise ValueError("edges is empty; there must be one to choose")
    a, b, epsilon = _scalar("a", a), _scalar("b", b), _scalar("epsilon", epsilon)
    if epsilon < 0:
        raise ValueError(f"epsilon = {epsilon} is negative")
    merged = [homogeneity_score(merge(q_e, n_e, q_n, n_n), target) for q_e, n_e in edges]
    counts = np.array([float(n_e) for _, n_e in edges])
    scores = np.maximum(a * np.array(merged) - counts + b, 0.0) + epsilon
    return _normalised(scores, otherwise=np.full(len(edges), 1.0 / len(edges)))


def aggregation_weights(
    num_samples: ArrayLike, scores: ArrayLike, *, a: float, b: float = 0.0
) -> Vector:
    """The cloud's weights of its edges (Eq. 10 of arXiv:2507.06449).

    ``w_e = max(n_e + a * score_e + b, 0)``, normalised to sum to 1.

    Args:
        num_samples: samples n_e of each edge, shape (num_edges,).
        scores: homogeneity score of each edge, shape (num_edges,).
        a: worth of one unit of homogeneity, in samples.
        b: offset, in samples.

    Returns:
        Shape (num_edges,), float64, sums to 1. Where all weights are cut off at 0 they are
        proportional to ``num_samples``; where these are all 0 too, they are uniform.

    Raises:
        ValueError: no edge, a non-finite argument, a negative count, or lengths differ.
    """
    counts = _non_negative("num_samples", num_samples)
    marks = _vector("scores", scores)
    _same_length("num_samples", counts, "scores", marks)
    weights = np.maximum(counts + _scalar("a", a) * marks + _scalar("b", b), 0.0)
    by_samples = _normalised(counts, otherwise=np.full(len(counts), 1.0 / len(counts)))
    return _normalised(weights, otherwise=by_samples)


def _normalised(values: Vector, *, otherwise: Vector) -> Vector:
    """``values / sum``, or ``otherwise`` where all values are 0."""
    largest = values.max()
    if largest == 0.0:
        return otherwise
    # Scaled first, so that the sum of counts near the largest float stays finite.
    scaled = values / largest
    shares: Vector = scaled / scaled.sum()
    return shares


def _vector(name: str, values: ArrayLike) -> Vector:
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} = {values!r} is not a vector of numbers: {error}") from error
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} has shape {vector.shape}; a vector of at least one is expected")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} = {vector.tolist()} has a value that is not finite")
    return vector


def _non_negative(name: str, values: ArrayLike) -> Vector:
    vector = _vector(name, values)
    if (vector < 0).any():
        raise ValueError(f"{name} = {vector.tolist()} has a negative value")
    return vector


def _scalar(name: str, value: float) -> float:
    return float(_vector(name, [value])[0])


def _same_length(name: str, first: Vector, other: str, second: Vector) -> None:
    if len(first) != len(second):
        raise ValueError(f"{name} has {len(first)} values, but {other} has {len(second)}")
