"""How evenly each policy of edge choice spreads labels and load.

Without training, under a minute: the digits in 20 parts of two classes, 8 clients per edge
round, 25 intervals of 5 edge rounds. Every client chooses by the project's own code; asked one by
one, or all of an edge round at once.

    python tests/benchmarks/edge_choice.py

Columns, means over the seeds: homogeneity score (2 is best) of an edge's clients of a round, and of
what it holds at an interval's end, over the edges that have any; draws in which the rule
prefers no edge although their offers differ; most clients of an edge in a round over the mean;
the same of samples in an interval; edge rounds in which an edge has no client. A score per
round means little where the load is uneven: one edge that has everybody has all labels.

The distances that the policies lead to are measured by ``fedphd compare`` with the methods in
``edge_choice.toml``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, get_args

import numpy as np

from fedphd.client.choice import choice_probabilities, choose_edge
from fedphd.common.config.data import DataConfig, PartitionConfig
from fedphd.common.config.run import SelectionConfig, SelectionPolicy
from fedphd.common.data.images import LabelledImages
from fedphd.common.homogeneity import homogeneity_score
from fedphd.common.rng import sample_participants
from fedphd.common.wire.offers import EVERY_EDGE, Choose, Offer

NUM_CLIENTS, NUM_CLASSES, PARTICIPATION = 20, 10, 0.4
INTERVALS, EDGE_ROUNDS = 25, 5
TARGET = (1.0 / NUM_CLASSES,) * NUM_CLASSES
POLICIES: tuple[SelectionPolicy, ...] = get_args(SelectionPolicy)

Clients = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Setting:
    """One row: a policy, and who knows what when it chooses."""

    policy: SelectionPolicy
    query_batch: int
    num_edges: int
    factor: float
    seed: int


@dataclass
class Balance:
    """What one simulated run came to; a value per edge round, edge or interval."""

    round_scores: list[float] = field(default_factory=list)
    interval_scores: list[float] = field(default_factory=list)
    round_loads: list[float] = field(default_factory=list)
    interval_loads: list[float] = field(default_factory=list)
    idle: list[bool] = field(default_factory=list)
    indifferent: list[bool] = field(default_factory=list)

    def row(self) -> tuple[float, ...]:
        """The means, in the order of the table's columns."""
        columns: tuple[Sequence[float], ...] = (
            self.round_scores, self.interval_scores, self.indifferent, self.round_loads,
            self.interval_loads, self.idle,
        )  # fmt: skip
        return tuple(float(np.mean(column)) for column in columns)


def label_counts(seed: int) -> Clients:
    """Images per class of each client."""
    counts = {}
    for number in range(NUM_CLIENTS):
        part = PartitionConfig(num_partitions=NUM_CLIENTS, partition_id=number, seed=seed)
        labels = LabelledImages(DataConfig(partition=part)).labels
        counts[f"client-{number}"] = tuple(np.bincount(labels, minlength=NUM_CLASSES).tolist())
    return counts


def simulate(setting: Setting, clients: Clients) -> Balance:
    """All choices of a run."""
    balance = Balance()
    for interval in range(1, INTERVALS + 1):
        names = [f"edge-{n}" for n in range(setting.num_edges)]
        edges = {name: Offer.empty(name, TARGET) for name in names}
        for edge_round in range(1, EDGE_ROUNDS + 1):
            attached = play_round(setting, clients, edges, interval, edge_round, balance)
            loads = [len(names) for names in attached.values()]
            balance.round_loads.append(max(loads) / float(np.mean(loads)))
            balance.idle.append(min(loads) == 0)
            balance.round_scores += scores(total(clients, names) for names in attached.values())
        held = [edge.num_samples for edge in edges.values()]
        balance.interval_loads.append(max(held) / float(np.mean(held)))
        balance.interval_scores += scores(
            np.array(edge.label_distribution) * edge.num_samples for edge in edges.values()
        )
    return balance


def play_round(
    setting: Setting,
    clients: Clients,
    edges: dict[str, Offer],
    interval: int,
    edge_round: int,
    balance: Balance,
) -> dict[str, list[str]]:
    """Ask a round's clients in batches; those of a batch see the same offers."""
    attached: dict[str, list[str]] = {edge_id: [] for edge_id in edges}
    names = sample_participants(
        clients, fraction=PARTICIPATION, seed=setting.seed, interval=interval, edge_round=edge_round
    )
    mean_samples = float(np.mean([sum(counts) for counts in clients.values()]))
    for start in range(0, len(names), setting.query_batch):
        batch = names[start : start + setting.query_batch]
        asked = Choose(
            asking=EVERY_EDGE, num_edges=len(edges), interval=interval, edge_round=edge_round,
            offers=tuple(edges.values()), target=TARGET, policy=setting.policy,
            factor=setting.factor * mean_samples, offset=0.0, epsilon=SelectionConfig().epsilon,
            seed=setting.seed, offer_wait_s=0.0, synchronised=True,
        )  # fmt: skip
        differ = len({(o.label_distribution, o.num_samples) for o in asked.offers}) > 1
        for name in batch:
            client: dict[str, Any] = {"client_id": name, "label_counts": clients[name]}
            chances = list(choice_probabilities(asked, **client).values())
            balance.indifferent.append(differ and float(np.ptp(chances)) < 1e-9)
            chosen = choose_edge(asked, **client)
            attached[chosen].append(name)
            edges[chosen] = edges[chosen].with_client(clients[name])
    return attached


def total(clients: Clients, names: Iterable[str]) -> np.ndarray[Any, Any]:
    """Images per class of some clients together, shape (num_classes,)."""
    counts = np.zeros(NUM_CLASSES)
    for name in names:
        counts += clients[name]
    return counts


def scores(counts: Iterable[np.ndarray[Any, Any]]) -> Iterator[float]:
    """Homogeneity scores of those that hold any image."""
    return (homogeneity_score(held / held.sum(), TARGET) for held in counts if held.sum() > 0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, NUM_CLIENTS])
    parser.add_argument("--edges", nargs="+", type=int, default=[2, 5])
    parser.add_argument("--factors", nargs="+", type=float, default=[4.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    clients = {seed: label_counts(seed) for seed in args.seeds}
    print(
        f"{'policy':<17} {'asked':<8} {'edges':>5} {'factor':>6} | {'round':>6} {'interval':>8} "
        f"{'indifferent':>11} {'load':>5} {'load/int.':>9} {'idle':>5}"
    )
    for edges, batch, factor, policy in product(
        args.edges, args.batches, args.factors, args.policies
    ):
        settings = [Setting(policy, batch, edges, factor, seed) for seed in args.seeds]
        rows = [simulate(setting, clients[setting.seed]).row() for setting in settings]
        score, held, indifferent, load, interval_load, idle = np.mean(rows, axis=0)
        line = (
            f"{policy:<17} {'1 by 1' if batch == 1 else f'{batch} each':<8} {edges:>5} "
            f"{factor:>6g} | {score:>6.3f} {held:>8.3f} {indifferent:>11.0%} {load:>5.2f} "
            f"{interval_load:>9.2f} {idle:>5.0%}"
        )
        print(line, flush=True)


if __name__ == "__main__":
    main()
