"""How even label distributions are, and what follows from it: edge choice and cloud weights.

One function per equation of arXiv:2507.06449, in float64. A label distribution is an array of
shares, shape (num_classes,). Sums are of at most some hundred terms, so figures agree with the
paper's formulas to about 1e-12 relative, with counts of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]

# Scores nearer to one another than this share of the largest are equal.
_TIE = 1e-9


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
    counts = _counts(edges)
    a, b, epsilon = _scalar("a", a), _scalar("b", b), _scalar("epsilon", epsilon)
    if epsilon < 0:
        raise ValueError(f"epsilon = {epsilon} is negative")
    merged = [homogeneity_score(merge(q_e, n_e, q_n, n_n), target) for q_e, n_e in edges]
    scores = np.maximum(a * np.array(merged) - counts + b, 0.0) + epsilon
    return _normalised(scores, otherwise=np.full(len(edges), 1.0 / len(edges)))


def best_homogeneity_probabilities(
    edges: Sequence[tuple[ArrayLike, float]],
    q_n: ArrayLike,
    n_n: float,
    target: ArrayLike,
    *,
    a: float,
) -> Vector:
    """The choice of the edge with the best score of Eq. 9 of arXiv:2507.06449, never cut off.

    ``s_e = a * homogeneity_score(merge(q_e, n_e, q_n, n_n), target) - n_e``; the edges with the
    largest score share the choice evenly. Only differences of scores count, so the rule goes on
    telling edges apart when all counts have outgrown ``2 a``, where ``selection_probabilities``
    turns uniform. An offset or a least score would change nothing.

    Args:
        edges, q_n, n_n, target, a: as for ``selection_probabilities``.

    Returns:
        Shape (num_edges,), float64, sums to 1.

    Raises:
        ValueError: as for ``selection_probabilities``.
    """
    counts = _counts(edges)
    merged = [homogeneity_score(merge(q_e, n_e, q_n, n_n), target) for q_e, n_e in edges]
    return _shared_by_the_best(_scalar("a", a) * np.array(merged) - counts)


def balanced_probabilities(
    edges: Sequence[tuple[ArrayLike, float]],
    q_n: ArrayLike,
    n_n: float,
    target: ArrayLike,
    *,
    a: float,
) -> Vector:
    """The choice of the edge whose imbalance the client makes up for, at an even load.

    ``c_e = n_e * (a * <q_e - target, q_n - target> + n_n)``; the edges with the least cost share
    the choice evenly. It is the greedy step down ``sum_e n_e^2 (a ||q_e - target||^2 + n_n)``,
    whose increase by the client is ``2 n_n c_e`` and a term that all edges have in common: the
    squared imbalance in samples, and the squared load. An edge without samples costs 0; a
    cost is below 0 where the client's labels are those that the edge lacks. Only differences
    of costs count, which grow with the counts, so the rule never saturates.

    Args:
        edges, q_n, n_n, target: as for ``selection_probabilities``.
        a: weight of the labels against the load, in samples; with 0 only the load counts.

    Returns:
        Shape (num_edges,), float64, sums to 1.

    Raises:
        ValueError: as for ``selection_probabilities``.
    """
    counts = _counts(edges)
    wanted = _non_negative("target", target)
    client = _non_negative("q_n", q_n)
    _same_length("q_n", client, "target", wanted)
    held = [_non_negative("q_e", q_e) for q_e, _ in edges]
    for shares in held:
        _same_length("q_e", shares, "target", wanted)
    alike = np.array([float((shares - wanted) @ (client - wanted)) for shares in held])
    # Scaled, so that the products of counts near the largest float stay finite.
    loads = _normalised(counts, otherwise=counts)
    return _shared_by_the_best(-loads * (_scalar("a", a) * alike + _scalar("n_n", n_n)))


def kl_divergence(q: ArrayLike, target: ArrayLike) -> float:
    """Kullback-Leibler divergence ``sum_k q_k ln(q_k / target_k)``, in nats.

    A class that ``q`` lacks adds 0, one that only ``q`` has makes it infinite.

    Args:
        q: label distribution, shape (num_classes,).
        target: label distribution to be near, shape (num_classes,).

    Raises:
        ValueError: an argument is not a vector of finite numbers >= 0, or lengths differ.
    """
    shares = _non_negative("q", q)
    wanted = _non_negative("target", target)
    _same_length("q", shares, "target", wanted)
    present = shares > 0
    if (wanted[present] == 0).any():
        return math.inf
    return float(np.sum(shares[present] * np.log(shares[present] / wanted[present])))


def min_kl_probabilities(
    edges: Sequence[tuple[ArrayLike, float]], q_n: ArrayLike, n_n: float, target: ArrayLike
) -> Vector:
    """The choice of the edge that is nearest to the target with the client's data.

    The edges with the least ``kl_divergence(merge(q_e, n_e, q_n, n_n), target)`` share the
    choice evenly. Nothing holds against a full edge: what SHARE (ICDCS 2021) minimises over all
    edges at once, every client here minimises for itself.

    Args:
        edges, q_n, n_n, target: as for ``selection_probabilities``.

    Returns:
        Shape (num_edges,), float64, sums to 1.

    Raises:
        ValueError: as for ``selection_probabilities``.
    """
    _counts(edges)
    merged = [kl_divergence(merge(q_e, n_e, q_n, n_n), target) for q_e, n_e in edges]
    return _shared_by_the_best(-np.array(merged))


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


def _counts(edges: Sequence[tuple[ArrayLike, float]]) -> Vector:
    """The edges' numbers of samples, shape (num_edges,)."""
    if len(edges) == 0:
        raise ValueError("edges is empty; there must be one to choose")
    return _non_negative("n_e", [n_e for _, n_e in edges])


def _shared_by_the_best(scores: Vector) -> Vector:
    """1 over the number of the largest ``scores`` for each of these, and 0 for the others."""
    finite = scores[np.isfinite(scores)]
    # Equal scores differ by rounding: of counts that were summed in another order.
    slack = _TIE * float(np.abs(finite).max(initial=0.0))
    best = np.isclose(scores, scores.max(), rtol=0.0, atol=slack)
    shares: Vector = best / best.sum()
    return shares


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
