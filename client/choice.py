"""A client's choice of the edge that it trains with in an edge round."""

from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from fedphd.common import homogeneity
from fedphd.common.errors import ConfigError
from fedphd.common.rng import derive_seed, numpy_generator
from fedphd.common.wire.offers import Choose


def choose_edge(asked: Choose, *, client_id: str, label_counts: Sequence[int]) -> str:
    """Draw the edge to train with; returns its id.

    The draw depends on what ``asked`` offers and on (run seed, client id, interval, round) only,
    not on the order of the offers, so every edge that asks gets the same answer. ``label_counts``
    are this client's images per class, shape (num_classes,).

    Raises:
        ConfigError: the client's labels run over another number of classes than the target.
    """
    chances = choice_probabilities(asked, client_id=client_id, label_counts=label_counts)
    edges = list(chances)
    if len(edges) == 1:
        return edges[0]
    rng = numpy_generator("choice", asked.seed, client_id, asked.interval, asked.edge_round)
    return edges[int(rng.choice(len(edges), p=list(chances.values())))]


def choice_probabilities(
    asked: Choose, *, client_id: str, label_counts: Sequence[int]
) -> dict[str, float]:
    """How likely a client chooses each edge: by ``edge_id``, in their order.

    Arguments and errors are those of ``choose_edge``.
    """
    if len(label_counts) != len(asked.target):
        raise ConfigError(
            f"client {client_id} counts labels of {len(label_counts)} classes, but the run's "
            f"target has {len(asked.target)} shares; make num_classes of the run and the data agree"
        ).for_peers()
    offers = sorted(asked.offers, key=attrgetter("edge_id"))
    names = [offer.edge_id for offer in offers]
    counts = np.asarray(label_counts, dtype=np.float64)
    num_samples = float(counts.sum())
    edges = [(offer.label_distribution, offer.num_samples) for offer in offers]
    there = (edges, counts / max(num_samples, 1.0), num_samples, asked.target)
    a, b, epsilon = asked.factor, asked.offset, asked.epsilon
    match asked.policy:
        case "homogeneity":
            chances = homogeneity.selection_probabilities(*there, a=a, b=b, epsilon=epsilon)
        case "best_homogeneity":
            chances = homogeneity.best_homogeneity_probabilities(*there, a=a)
        case "balanced":
            chances = homogeneity.balanced_probabilities(*there, a=a)
        case "min_kl":
            chances = homogeneity.min_kl_probabilities(*there)
        case "random":
            chances = np.full(len(names), 1.0 / len(names))
        case "static":
            chances = _home(names, asked.seed, client_id)
    return dict(zip(names, chances.tolist(), strict=True))


def _home(edge_ids: list[str], run_seed: int, client_id: str) -> homogeneity.Vector:
    """Probability 1 for the same one of these edges at all times.

    Every (client, edge) has a rank of its own by the run's seed, so clients spread over the
    edges, and where an edge is missing only its own clients go elsewhere.
    """
    ranks = [derive_seed("static", run_seed, client_id, edge_id) for edge_id in edge_ids]
    return np.array([float(rank == max(ranks)) for rank in ranks])
