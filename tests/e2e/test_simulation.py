"""Flower's simulation and real processes: the same settings give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import Processes
from support.same import Outcome, assert_same, run

EDGES = ("edge-0", "edge-1")
INTERVALS = EDGE_ROUNDS = (1, 2)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with Processes(tmp_path_factory.mktemp("simulated")) as processes:
        return run(processes, "simulate", "first")


def test_simulation_equals_processes_to_the_bit(simulated: Outcome, local_run: Outcome) -> None:
    assert_same(simulated, local_run)


@pytest.mark.slow
def test_simulation_repeats_to_the_bit(simulated: Outcome, tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        assert_same(simulated, run(processes, "simulate", "second"))


def test_the_runs_that_are_equal_have_draws_that_could_differ(simulated: Outcome) -> None:
    rounds = {key: event["clients"] for key, event in simulated.rounds.items()}
    assert sorted(rounds) == [(e, i, r) for e in EDGES for i in INTERVALS for r in EDGE_ROUNDS]
    # 0.6 of 3 clients, so 2 of them; and not always the same ones.
    pairs = [[n for e in EDGES for n in rounds[e, i, r]] for i in INTERVALS for r in EDGE_ROUNDS]
    assert [len(set(pair)) for pair in pairs] == [2, 2, 2, 2]
    assert len({frozenset(pair) for pair in pairs}) > 1
    # A client that trains at either edge drew, and did not just belong to one.
    visited = {edge: {n for key, names in rounds.items() if key[0] == edge for n in names}
               for edge in EDGES}  # fmt: skip
    assert visited["edge-0"] & visited["edge-1"]


def test_simulation_names_the_flwr_command(simulated: Outcome) -> None:
    assert "running   flwr run " in simulated.text
    assert "--federation-config 'num-supernodes=3 " in simulated.text
    assert len(simulated.rounds) == 2 * 2 * 2
