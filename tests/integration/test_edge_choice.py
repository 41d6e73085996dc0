"""Clients choose among two edges in one process: every policy, and how live the counts are."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from support.federation import FIRST_CLIENT, TINY, Federation, one_at_a_time, run_simulated
from support.memory import Handler, MemoryGrid

from fedphd.client.app import ClientRuntime, build_app
from fedphd.client.resident import OfferBoard
from fedphd.common.config.roles import ClientConfig
from fedphd.common.config.run import SelectionPolicy
from fedphd.common.rng import sample_participants
from fedphd.common.wire.messages import TRAIN, TrainTask
from fedphd.common.wire.offers import CHOOSE, Choose
from fedphd.common.wire.records import read_payload

NUM_CLIENTS, PARTS, EDGES = 5, 60, {"edge-0", "edge-1"}
# Images of the first clients when the digits are cut into so many parts.
SIZES = (31, 31, 32, 31, 30)
SHORT: dict[str, Any] = {
    **TINY,
    "training.local_unit": "steps",
    "training.local_amount": 1,
    "schedule.intervals": 1,
    "schedule.edge_rounds": 3,
    "schedule.query_batch": 1,
    "schedule.min_clients": NUM_CLIENTS,
    "reproducible": False,
}


def node(number: int, *, train_s: float = 0.0) -> Handler:
    """A simulated client, whose training takes some seconds longer."""
    partition = {"num_partitions": PARTS, "partition_id": number}
    values = {"client_id": f"client-{number}", "device": "cpu", "data": {"partition": partition}}
    runtime = ClientRuntime(ClientConfig.model_validate(values))
    app = build_app(lambda context: runtime)
    context = Context(1, number, {}, RecordDict(), {})

    def answer(message: Message) -> Message:
        if message.metadata.message_type == TRAIN:
            time.sleep(train_s)
        return app(message, context)

    return one_at_a_time(answer)


def simulate(folder: Path, *, train_s: float = 0.0, **overrides: Any) -> MemoryGrid:
    """A run over two virtual edges; the grid tells what was sent."""
    nodes = {FIRST_CLIENT + n: node(n, train_s=train_s) for n in range(NUM_CLIENTS)}
    grid = MemoryGrid(nodes, threaded=True)
    run_simulated(grid, folder, {**SHORT, **overrides})
    return grid


def trained_at(*grids: MemoryGrid) -> dict[tuple[int, int], str]:
    """The edge of each (edge round, node) that trained."""
    sent = [m for grid in grids for m in grid.pushed if m.metadata.message_type == TRAIN]
    tasks = [(read_payload(m, TrainTask), m.metadata.dst_node_id) for m in sent]
    return {(task.edge_round, node_id): task.edge_id for task, node_id in tasks}


def asked(grid: MemoryGrid) -> dict[tuple[int, int], Choose]:
    """The question to each (edge round, node)."""
    sent = [m for m in grid.pushed if m.metadata.message_type == CHOOSE]
    questions = [(read_payload(m, Choose), m.metadata.dst_node_id) for m in sent]
    return {(choose.edge_round, node_id): choose for choose, node_id in questions}


def check_live(seen: dict[tuple[int, int], Choose], edges: dict[tuple[int, int], str]) -> None:
    """Every client saw what all before it had brought, up to the one just before it."""
    expected = dict.fromkeys(sorted(EDGES), 0.0)
    names = {f"client-{n}": n for n in range(NUM_CLIENTS)}
    for edge_round in (1, 2, 3):
        order = sample_participants(names, fraction=1.0, seed=0, interval=1, edge_round=edge_round)
        for number in (names[name] for name in order):
            key = (edge_round, FIRST_CLIENT + number)
            figures = {offer.edge_id: offer.num_samples for offer in seen[key].offers}
            assert figures == expected, key
            expected[edges[key]] += SIZES[number]
    assert min(expected.values()) > 0


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("policy", get_args(SelectionPolicy))
def test_each_policy_runs_over_two_virtual_edges(tmp_path: Path, policy: str) -> None:
    grid = simulate(tmp_path, **{"selection.policy": policy})
    assert {choose.policy for choose in asked(grid).values()} == {policy}
    edges = trained_at(grid)
    assert len(edges) == 3 * NUM_CLIENTS, "every client trains once in every round"
    per_client = {n: {e for (_, m), e in edges.items() if m == n} for _, n in edges}
    loads = Counter(edges.values())
    if policy == "static":
        assert all(len(homes) == 1 for homes in per_client.values())
    elif policy in {"best_homogeneity", "balanced"}:
        # 15 trainings of like size: nobody lets an edge get two clients ahead.
        assert sorted(loads.values()) == [7, 8]
    elif policy == "min_kl":
        assert max(loads.values()) >= 14, "nearest to the target is the edge that has most"
    else:
        assert set(loads) == EDGES


def test_virtual_edges_show_who_attached_just_before(tmp_path: Path) -> None:
    grid = simulate(tmp_path, **{"selection.policy": "balanced"})
    check_live(asked(grid), trained_at(grid))


class WatchedBoard(OfferBoard):
    """Keeps what a resident client saw when it chose."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Choose] = []

    def merge(self, asked: Choose, **how: Any) -> Choose:
        """As ever, and remember it."""
        merged = super().merge(asked, **how)
        self.seen.append(merged)
        return merged


def test_resident_clients_see_who_attached_just_before(tmp_path: Path) -> None:
    values = {
        **SHORT,
        "selection.policy": "balanced",
        "waits.offer_s": 60.0,
        "waits.query_s": 120.0,
    }
    federation = Federation(tmp_path, values, num_clients=NUM_CLIENTS, parts=PARTS)
    boards = [WatchedBoard() for _ in federation.clients]
    for client, board in zip(federation.clients, boards, strict=True):
        client.board = board
        for address in federation.addresses:
            board.set_connected(address, True)
    assert federation.run().exit_code == 0
    seen: dict[tuple[int, int], Choose] = {}
    for number, board in enumerate(boards):
        for merged in board.seen:
            offers = tuple(sorted(merged.offers, key=lambda offer: offer.edge_id))
            key = (merged.edge_round, FIRST_CLIENT + number)
            other = seen.setdefault(key, merged.model_copy(update={"offers": offers}))
            assert other.offers == offers, "both edges' questions show the client the same"
    check_live(seen, trained_at(*federation.edge_grids))


def test_idle_virtual_edge_waits_for_the_others_training(tmp_path: Path) -> None:
    """It asks for the next round at once, and an answer needs the other edge's offer."""
    overrides = {
        "selection.policy": "min_kl",
        "schedule.edge_rounds": 2,
        "waits.query_s": 1.0,
        "waits.offer_s": 0.9,
    }
    grid = simulate(tmp_path, train_s=2.0, **overrides)
    assert len(trained_at(grid)) == 2 * NUM_CLIENTS
    assert "no reply within" not in (tmp_path / "metrics.jsonl").read_text()
