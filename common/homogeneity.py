"""How even label distributions are, and what follows from it: edge choice and cloud weights.

The equations of arXiv:2507.06449 and rules beside them, in float64. As there, q is a label
distribution (shares, shape (num_classes,)) and n a number of samples: q_e, n_e of an edge, q_n,
n_n of the client that chooses. Results agree with the formulas to about 1e-12 relative. All raise
ValueError for what is not finite, shares or counts below 0, unequal lengths, and without an edge.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
Edges = Sequence[tuple[ArrayLike, float]]

# Scores nearer to one another than this share of the largest are equal.
_TIE = 1e-9


def homogeneity_score(q: ArrayLike, target: ArrayLike) -> float:
    """Statistical homogeneity (the SH score of arXiv:2507.06449): 2 where q is the target.

    At least ``2 - sqrt(2)`` for label distributions, shape (num_classes,), that sum to 1.
    """
    q_e, q_t = _shares(q=q, target=target)
    # SH(q) = 2 - ||q - target||_2
    return 2.0 - float(np.linalg.norm(q_e - q_t))


def merge(q_e: ArrayLike, n_e: float, q_n: ArrayLike, n_n: float) -> Vector:
    """Label distribution of an edge with a client, shape (num_classes,), float64.

    Without any sample (``n_e + n_n == 0``) the edge stays what it was: a copy of ``q_e``.
    """
    edge, client = _shares(q_e=q_e, q_n=q_n)
    counts = _non_negative("n_e, n_n", [n_e, n_n])
    of_edge, of_client = _normalised(counts, otherwise=np.array([1.0, 0.0]))
    # (n_e q_e + n_n q_n) / (n_e + n_n)
    merged: Vector = of_edge * edge + of_client * client
    return merged


def selection_probabilities(
    edges: Edges,
    q_n: ArrayLike,
    n_n: float,
    target: ArrayLike,
    *,
    a: float,
    b: float = 0.0,
    epsilon: float = 1e-8,
) -> Vector:
    """How likely a client chooses each edge (Eq. 9 of arXiv:2507.06449).

    Args:
        edges: (q_e, n_e) of each edge.
        target: label distribution to be near; as q_n and q_e of shape (num_classes,).
        a: worth of one unit of homogeneity, in samples.
        b: offset, in samples; may be negative.
        epsilon: least score of an edge, in samples; when all scores are cut off at 0 it makes
            the choice uniform (so does 0, as its limit).

    Returns:
        Shape (num_edges,), float64, sums to 1.
    """
    asked = _checked(edges, q_n, n_n, target)
    least = _non_negative("epsilon", [epsilon])
    # s_e = max(a SH(merge(e, n)) - n_e + b, 0) + epsilon, p_e = s_e / sum(s)
    scores = _finite("a", a) * asked.homogeneity() - asked.n_e + _finite("b", b)
    s_e = np.maximum(scores, 0.0) + least
    return _normalised(s_e, otherwise=_uniform(len(s_e)))


def best_homogeneity_probabilities(
    edges: Edges, q_n: ArrayLike, n_n: float, target: ArrayLike, *, a: float
) -> Vector:
    """The choice of the edge with the best score of Eq. 9 of arXiv:2507.06449, never cut off.

    The edges with the largest score share the choice evenly. Only differences of scores count, so
    the rule still tells edges apart when all counts have outgrown ``2 a``, where
    ``selection_probabilities`` turns uniform. An offset or a least score would change nothing.
    Arguments and result are those of ``selection_probabilities``.
    """
    asked = _checked(edges, q_n, n_n, target)
    # s_e = a SH(merge(e, n)) - n_e
    return _shared_by_the_best(_finite("a", a) * asked.homogeneity() - asked.n_e)


def balanced_probabilities(
    edges: Edges, q_n: ArrayLike, n_n: float, target: ArrayLike, *, a: float
) -> Vector:
    """The choice of the edge whose imbalance the client makes up for, at an even load.

    The edges with the least cost c_e share the choice evenly. It is the greedy step down
    ``sum_e n_e^2 (a ||q_e - target||^2 + n_n)``, whose increase by the client is ``2 n_n c_e`` and
    a term that all edges have in common: the squared imbalance in samples, and the squared load.
    An edge without samples costs 0; a cost is below 0 where the client's labels are those that
    the edge lacks. Only differences of costs count, which grow with the counts, so the rule never
    saturates. Arguments and result are those of ``selection_probabilities``, but ``a`` is the
    weight of the labels against the load, in samples; with 0 only the load counts.
    """
    asked = _checked(edges, q_n, n_n, target)
    alike = np.array([(q_e - asked.target) @ (asked.q_n - asked.target) for q_e in asked.q_e])
    # Scaled, so that the products of counts near the largest float stay finite.
    loads = _normalised(asked.n_e, otherwise=asked.n_e)
    # c_e = n_e (a <q_e - target, q_n - target> + n_n)
    return _shared_by_the_best(-loads * (_finite("a", a) * alike + asked.n_n))


def min_kl_probabilities(edges: Edges, q_n: ArrayLike, n_n: float, target: ArrayLike) -> Vector:
    """The choice of the edge that is nearest to the target with the client's data.

    The edges with the least divergence share the choice evenly. Nothing holds against a full
    edge: what SHARE (ICDCS 2021) minimises over all edges at once, every client here minimises
    for itself. Arguments and result are those of ``selection_probabilities``.
    """
    asked = _checked(edges, q_n, n_n, target)
    # c_e = KL(merge(e, n) || target)
    c_e = [kl_divergence(merged, asked.target) for merged in asked.merged()]
    return _shared_by_the_best(-np.array(c_e))


def kl_divergence(q: ArrayLike, target: ArrayLike) -> float:
    """Kullback-Leibler divergence of label distributions, shape (num_classes,), in nats.

    A class that ``q`` lacks adds 0, one that only ``q`` has makes it infinite.
    """
    q_e, q_t = _shares(q=q, target=target)
    present = q_e > 0
    if (q_t[present] == 0).any():
        return math.inf
    # sum_k q_k ln(q_k / target_k)
    return float(np.sum(q_e[present] * np.log(q_e[present] / q_t[present])))


def aggregation_weights(
    num_samples: ArrayLike, scores: ArrayLike, *, a: float, b: float = 0.0
) -> Vector:
    """The cloud's weights of its edges (Eq. 10 of arXiv:2507.06449).

    Args:
        num_samples: samples n_e of each edge, shape (num_edges,).
        scores: homogeneity score of each edge, shape (num_edges,).
        a, b: as in ``selection_probabilities``.

    Returns:
        Shape (num_edges,), float64, sums to 1. Where all weights are cut off at 0 they are
        proportional to ``num_samples``; where these are all 0 too, they are uniform.
    """
    n_e, sh = _non_negative("num_samples", num_samples), _vector("scores", scores)
    _same_length(num_samples=n_e, scores=sh)
    # w_e = max(n_e + a SH_e + b, 0), normalised
    w_e = np.maximum(n_e + _finite("a", a) * sh + _finite("b", b), 0.0)
    return _normalised(w_e, otherwise=_normalised(n_e, otherwise=_uniform(len(n_e))))


class _Choice(NamedTuple):
    """A client before its edges; everything is checked."""

    q_e: list[Vector]
    n_e: Vector
    q_n: Vector
    n_n: float
    target: Vector

    def merged(self) -> list[Vector]:
        """Each edge with the client."""
        held = zip(self.q_e, self.n_e, strict=True)
        return [merge(q_e, n_e, self.q_n, self.n_n) for q_e, n_e in held]

    def homogeneity(self) -> Vector:
        """SH(merge(e, n)) of each edge, shape (num_edges,)."""
        return np.array([homogeneity_score(q, self.target) for q in self.merged()])


def _checked(edges: Edges, q_n: ArrayLike, n_n: float, target: ArrayLike) -> _Choice:
    if len(edges) == 0:
        raise ValueError("edges is empty; there must be one to choose")
    n_e = _non_negative("n_e", [count for _, count in edges])
    client, wanted = _shares(q_n=q_n, target=target)
    q_e = [_shares(q_e=shares, q_n=client)[0] for shares, _ in edges]
    return _Choice(q_e, n_e, client, float(_non_negative("n_n", [n_n])[0]), wanted)


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


def _uniform(length: int) -> Vector:
    return np.full(length, 1.0 / length)


def _vector(name: str, values: ArrayLike) -> Vector:
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} = {values!r} is not a vector of numbers: {error}") from error
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} has shape {vector.shape}; expected a vector of at least one")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} = {vector.tolist()} has a value that is not finite")
    return vector


def _finite(name: str, value: float) -> float:
    return float(_vector(name, [value])[0])


def _non_negative(name: str, values: ArrayLike) -> Vector:
    vector = _vector(name, values)
    if (vector < 0).any():
        raise ValueError(f"{name} = {vector.tolist()} has a negative value")
    return vector


def _shares(**both: ArrayLike) -> tuple[Vector, Vector]:
    """Two label distributions: vectors of one length, finite and >= 0."""
    first, second = (_non_negative(name, values) for name, values in both.items())
    _same_length(**dict(zip(both, (first, second), strict=True)))
    return first, second


def _same_length(**both: Vector) -> None:
    (name, first), (other, second) = both.items()
    if len(first) != len(second):
        raise ValueError(f"{name} has {len(first)} values, but {other} has {len(second)}")
