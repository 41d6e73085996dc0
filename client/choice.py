"""A client's choice of the edge that it trains with in an edge round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fedphd.common.config.run import SelectionPolicy
from fedphd.common.errors import ConfigError, ReplyError
from fedphd.common.homogeneity import (
    Vector,
    balanced_probabilities,
    best_homogeneity_probabilities,
    min_kl_probabilities,
    selection_probabilities,
)
from fedphd.common.rng import derive_seed, numpy_generator
from fedphd.common.wire.offers import Offer

_SUM_TOLERANCE = 1e-6


def choose_edge(
    offers: Sequence[Offer],
    *,
    policy: SelectionPolicy,
    label_counts: Sequence[int],
    target: Sequence[float],
    factor: float,
    offset: float,
    epsilon: float,
    run_seed: int,
    client_id: str,
    interval: int,
    edge_round: int,
) -> str:
    """Draw the edge to train with.

    The draw depends on the offers' content and on (run seed, client id, interval, round) only, not
    on the order of the offers, so every edge that asks gets the same answer.

    Args:
        offers: one per edge.
        policy: the rule; see ``choice_probabilities``.
        label_counts: this client's images per class, shape (num_classes,).
        target: label distribution to be near, shape (num_classes,).
        factor: a of the rule, in samples.
        offset: b of the rule, in samples.
        epsilon: least score of an edge, in samples.
        run_seed: the run's seed.
        client_id: stable name of this client.
        interval: number of the interval.
        edge_round: number of the edge round in the interval.

    Returns:
        ``edge_id`` of the chosen offer.

    Raises:
        ReplyError: there is no offer, one is malformed (names the edge), or the target is.
        ConfigError: the client's labels run over another number of classes than the target.
    """
    ordered = sorted(offers, key=lambda offer: offer.edge_id)
    _check_offers(ordered, client_id, label_counts, target)
    if len(ordered) == 1:
        return ordered[0].edge_id
    probabilities = choice_probabilities(
        ordered,
        policy=policy,
        label_counts=label_counts,
        target=target,
        factor=factor,
        offset=offset,
        epsilon=epsilon,
        run_seed=run_seed,
        client_id=client_id,
    )
    rng = numpy_generator("choice", run_seed, client_id, interval, edge_round)
    return ordered[int(rng.choice(len(ordered), p=probabilities))].edge_id


def choice_probabilities(
    offers: Sequence[Offer],
    *,
    policy: SelectionPolicy,
    label_counts: Sequence[int],
    target: Sequence[float],
    factor: float,
    offset: float,
    epsilon: float,
    run_seed: int,
    client_id: str,
) -> Vector:
    """How likely a client chooses each edge.

    - ``homogeneity``: Eq. 9 of arXiv:2507.06449 (``selection_probabilities``).
    - ``best_homogeneity``, ``balanced``, ``min_kl``: one edge, or its equals evenly
      (``best_homogeneity_probabilities``, ``balanced_probabilities``, ``min_kl_probabilities``).
    - ``random``: every edge alike.
    - ``static``: always the same one of these edges. Every (client, edge) has a rank of its own
      by the run's seed, so clients spread over the edges, and where an edge is missing only
      its own clients go elsewhere.

    Args:
        offers, policy, label_counts, target, factor, offset, epsilon, run_seed, client_id: as for
            ``choose_edge``; the offers are taken to be well-formed.

    Returns:
        Shape (num_offers,), in the order of ``offers``, float64, sums to 1.
    """
    counts = np.asarray(label_counts, dtype=np.float64)
    num_samples = float(counts.sum())
    edges = [(offer.label_distribution, offer.num_samples) for offer in offers]
    asked = (edges, counts / max(num_samples, 1.0), num_samples, target)
    match policy:
        case "homogeneity":
            return selection_probabilities(*asked, a=factor, b=offset, epsilon=epsilon)
        case "best_homogeneity":
            return best_homogeneity_probabilities(*asked, a=factor)
        case "balanced":
            return balanced_probabilities(*asked, a=factor)
        case "min_kl":
            return min_kl_probabilities(*asked)
        case "random":
            return np.full(len(edges), 1.0 / len(edges))
        case "static":
            ranks = [derive_seed("static", run_seed, client_id, o.edge_id) for o in offers]
            return np.array([float(rank == max(ranks)) for rank in ranks])


def _check_offers(
    offers: Sequence[Offer], client_id: str, label_counts: Sequence[int], target: Sequence[float]
) -> None:
    if not offers:
        raise ReplyError("no edge offers itself; at least one offer is needed to choose")
    problem = _problem(target, num_classes=len(target))
    if problem:
        raise ReplyError(f"target {problem}")
    if len(label_counts) != len(target):
        raise ConfigError(
            f"client {client_id} counts labels of {len(label_counts)} classes, but the run's "
            f"target has {len(target)} shares; make num_classes of the run and the data agree"
        )
    for before, offer in pairwise(offers):
        if before.edge_id == offer.edge_id:
            raise ReplyError(f"edge {offer.edge_id} offers itself twice; one offer per edge")
    for offer in offers:
        problem = _problem(offer.label_distribution, num_classes=len(target))
        if problem:
            raise ReplyError(f"offer of edge {offer.edge_id}: label_distribution {problem}")
        if not (math.isfinite(offer.num_samples) and offer.num_samples >= 0):
            raise ReplyError(
                f"offer of edge {offer.edge_id}: num_samples = {offer.num_samples}; expected a "
                "finite number >= 0"
            )


def _problem(distribution: Sequence[float], *, num_classes: int) -> str | None:
    """What keeps ``distribution`` from being shares of ``num_classes`` classes, if anything."""
    shares = np.asarray(distribution, dtype=np.float64)
    if shares.shape != (num_classes,):
        return f"has shape {shares.shape}; expected ({num_classes},)"
    if not (np.isfinite(shares).all() and (shares >= 0).all()):
        return f"is {shares.tolist()}; expected finite shares >= 0"
    if abs(shares.sum() - 1.0) > _SUM_TOLERANCE:
        return f"sums to {shares.sum():g}; expected 1"
    return None
