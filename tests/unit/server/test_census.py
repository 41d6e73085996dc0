"""What the cloud makes of the clients that edges list."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.edges import Cloud, FakeEdge, run_config

from fedphd.common.wire.roster import Peer
from fedphd.server.census import Census


def census(*edges: dict[str, int], most: int = 10_000, trained: tuple[str, ...] = ()) -> Census:
    peers = {str(n): Peer(str(n), n, clients=clients) for n, clients in enumerate(edges)}
    roster: Any = SimpleNamespace(everyone=peers)
    return Census(roster, most_samples=most, trained=trained)


def test_clients_count_once_and_also_when_they_are_gone() -> None:
    counted = census({"a": 1, "b": 1}, {"b": 1, "c": 1}, trained=("a", "gone"))
    assert counted.num_clients == 4
    counted.note_trained(["late", "c"])
    assert counted.num_clients == 5
    assert census().num_clients == 0


def test_usual_clients_by_hand() -> None:
    # Edges' own: 20, 30 and 5; of these 20.
    by_hand = census({"a": 10, "b": 20, "c": 90}, {"d": 30}, {f"x{n}": 5 for n in range(40)})
    assert by_hand.most_images == 200.0
    assert census({"a": 10}, {}, most=70).most_images == 70.0
    assert census(most=70).most_images == 70.0


def test_mean_images_by_hand() -> None:
    assert census({"a": 10, "b": 20}, {"b": 20, "c": 45}).mean_images == 25.0
    # 500 count as 100.
    assert census({"a": 10, "b": 10, "c": 500}).mean_images == 40.0
    assert census().mean_images == 0.0


def test_names_without_number_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedphd.server.census.MOST_NAMES", 3)
    counted = census({"a": 1})
    counted.note_trained(f"invented-{number}" for number in range(10))
    assert counted.num_clients == 4


def test_scaffolds_variate_stays_a_mean_when_clients_come_and_go() -> None:
    """Each client's own variate is 1, which it brings when it first trains: the mean is 1."""
    edge, new = FakeEdge("edge", clients={"0": 10, "1": 10}), {"0", "1"}

    def bring(variate: Any) -> Any:
        return variate * 0 + len(new) / edge.tasks[-1].num_clients

    edge.change = bring
    config = run_config(objective={"method": "scaffold"}, schedule={"intervals": 6})
    world = Cloud(edge, config=config)
    refresh = world.strategy._gather

    def gather() -> None:
        if done := len(world.told):
            # One leaves for good, and another one comes.
            edge.clients = {str(done): 10, str(done + 1): 10}
            new.clear()
            new.add(str(done + 1))
        refresh()

    world.strategy._gather = gather
    world.run()
    assert [task.num_clients for task in edge.tasks] == [2, 3, 4, 5, 6, 7]
    assert world.strategy.variate is not None
    assert world.strategy.variate.unique().tolist() == pytest.approx([1.0])
