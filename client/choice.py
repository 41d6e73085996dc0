"""A client's choice of the edge that it trains with in an edge round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fedphd.common.errors import ConfigError, ReplyError
from fedphd.common.homogeneity import Offer, selection_probabilities
from fedphd.common.rng import numpy_generator

_SUM_TOLERANCE = 1e-6


def choose_edge(
    offers: Sequence[Offer],
    *,
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
    """Draw the edge to train with by Eq. 9 of arXiv:2507.06449.

    The draw depends on the offers' content and on (run seed, client, interval, round) only, not
    on the order of the offers, so every edge that asks gets the same answer.

    Args:
        offers: one per edge.
        label_counts: this client's images per class, shape (num_classes,).
        target: label distribution to be near, shape (num_classes,).
        factor: worth of one unit of homogeneity, in samples.
        offset: offset, in samples.
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
    counts = np.asarray(label_counts, dtype=np.float64)
    num_samples = float(counts.sum())
    probabilities = selection_probabilities(
        [(offer.label_distribution, offer.num_samples) for offer in ordered],
        counts / max(num_samples, 1.0),
        num_samples,
        target,
        a=factor,
        b=offset,
        epsilon=epsilon,
    )
    rng = numpy_generator("choice", run_seed, client_id, interval, edge_round)
    return ordered[int(rng.choice(len(ordered), p=probabilities))].edge_id


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
