"""An interval in which no client trained does not count: it is run again, or the run ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from support.clients import NUM_CLIENTS, clients
from support.federation import FIRST_CLIENT, TINY, Federation, one_at_a_time, run_simulated
from support.memory import Handler

from fedphd.common.errors import ParticipantsError
from fedphd.common.unet.checkpoint import load_checkpoint
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.messages import TRAIN, TrainTask
from fedphd.common.wire.offers import CHOOSE, Choose
from fedphd.common.wire.records import read_payload
from fedphd.deploy.launch.runs import Resumed

SETTINGS: dict[str, Any] = {
    "reproducible": True,
    "schedule.intervals": 3,
    "training.local_amount": 1,
    "pruning.mode": "scheduled",
    "pruning.sparse_rounds": 2,
    "waits.offer_s": 60.0,
    "waits.query_s": 120.0,
}
Loses = Callable[[TrainTask], bool]


def losing(answer: Handler, loses: Loses) -> Handler:
    """A client that trains, and whose answer then is lost."""

    def handle(message: Message) -> Message | None:
        is_training = message.metadata.message_type == TRAIN
        lost = is_training and loses(read_payload(message, TrainTask))
        reply = answer(message)
        if lost:
            raise MemoryError("no memory left")
        return reply

    return handle


def federation(folder: Path, loses: Loses = lambda task: False) -> Federation:
    made = Federation(folder, SETTINGS)
    for grid in made.edge_grids:
        grid.nodes = {
            node_id: one_at_a_time(losing(answer, loses)) for node_id, answer in grid.nodes.items()
        }
    return made


def final(folder: Path) -> torch.Tensor:
    state = load_checkpoint(folder / "checkpoint")[0].state_dict()
    return TensorLayout.of(state).pack(state)


def said(federation: Federation) -> list[str]:
    return [event["text"] for event in federation.events("message")]


def test_it_is_run_again_as_if_nothing_had_been(tmp_path: Path) -> None:
    undisturbed = federation(tmp_path / "undisturbed")
    undisturbed.run()
    # Interval 2 is the last before the network is pruned.
    in_vain = (2, 0)
    disturbed = federation(
        tmp_path / "disturbed", lambda task: (task.interval, task.attempt) == in_vain
    )
    assert disturbed.run().exit_code == 0
    assert [event["interval"] for event in disturbed.events("interval")] == [1, 2, 3]
    assert [event["interval"] for event in disturbed.events("pruned")] == [2]
    (text,) = [text for text in said(disturbed) if "it is run again" in text]
    assert text.startswith("no client trained in interval 2 (client-")
    assert "no memory left; and 1 more)" in text
    assert len(disturbed.events("interval")[1]["failures"]) == 4
    assert torch.equal(final(disturbed.run_dir), final(undisturbed.run_dir))


def test_a_run_without_trained_clients_ends_and_can_be_resumed(tmp_path: Path) -> None:
    broken = federation(tmp_path, lambda task: task.interval == 2)
    with pytest.raises(
        ParticipantsError,
        match=r"no client trained in interval 2 \(client-.* 3 times in a row; .* --resume",
    ):
        broken.run()
    assert broken.events("pruned") == []
    attempts = [task.attempt for task in broken.client_tasks() if task.interval == 2]
    assert sorted(set(attempts)) == [0, 1, 2]
    mended = federation(tmp_path)
    assert mended.run(resumed=Resumed(interval=1)).exit_code == 0
    # A number that nobody has seen yet: whoever worked in vain goes back to before.
    assert {task.attempt for task in mended.client_tasks()} == {3}
    federation(tmp_path / "undisturbed").run()
    assert torch.equal(final(mended.run_dir), final(tmp_path / "undisturbed" / "run"))


def test_those_who_failed_may_be_asked_again_when_it_is_run_again(tmp_path: Path) -> None:
    """Virtual edges speak also for clients that they leave alone for a while."""
    asked: list[int] = []

    def loses(task: TrainTask) -> bool:
        asked.append(task.attempt)
        return task.attempt == 0

    grid = clients()
    grid.nodes = {node_id: losing(answer, loses) for node_id, answer in grid.nodes.items()}
    more = {"schedule.min_clients": NUM_CLIENTS, "schedule.intervals": 1, "waits.retry_s": 1.0}
    run_simulated(grid, tmp_path, {**TINY, **more})
    assert set(asked) == {0, 1}


def test_a_client_that_always_fails_does_not_end_a_run_of_few_at_a_time(tmp_path: Path) -> None:
    """Where it was the only one of its round, the next try asks others."""
    broken = Federation(
        tmp_path,
        {**SETTINGS, "schedule.participation": 0.25, "schedule.intervals": 6,
         "pruning.mode": "none"},
    )  # fmt: skip
    for grid in broken.edge_grids:
        answer = grid.nodes[FIRST_CLIENT + 1]
        grid.nodes[FIRST_CLIENT + 1] = one_at_a_time(losing(answer, lambda task: True))
    assert broken.run().exit_code == 0
    assert [event["interval"] for event in broken.events("interval")] == [*range(1, 7)]
    assert [t for t in said(broken) if "it is run again" in t], said(broken)
    assert [t for t in said(broken) if t.startswith("never trained: client-1 (")], said(broken)


def test_simulated_clients_choose_anew(tmp_path: Path) -> None:
    """Virtual edges keep answers of a round for the edges that ask later."""
    asked: list[tuple[int, int]] = []

    def loses(task: TrainTask) -> bool:
        asked.append((task.interval, task.attempt))
        return task.attempt == 0

    grid = clients()
    grid.nodes = {node_id: losing(answer, loses) for node_id, answer in grid.nodes.items()}
    more = {"schedule.min_clients": NUM_CLIENTS, "schedule.intervals": 1, "reproducible": True}
    run_simulated(grid, tmp_path, {**TINY, **more})
    assert sorted(asked) == [(1, 0)] * NUM_CLIENTS + [(1, 1)] * NUM_CLIENTS
    questions = [m for m in grid.pushed if m.metadata.message_type == CHOOSE]
    attempts = [read_payload(message, Choose).attempt for message in questions]
    assert sorted(attempts) == [0] * NUM_CLIENTS + [1] * NUM_CLIENTS
