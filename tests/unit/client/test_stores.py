"""Where a trainer's state outlives its process, and which one a task starts from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict
from safetensors.torch import save_file
from support.disk import files_limited_to
from support.training import train_task

from fedphd.client.local_state import OWN_WEIGHTS
from fedphd.client.stores import ContextStore
from fedphd.client.trainer import Trainer
from fedphd.common.config.run import ModelConfig, TrainingConfig
from fedphd.common.errors import FedPhDError
from fedphd.common.stores import FileStore, StateStore
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.messages import TrainTask

LAYOUT = TensorLayout(("weight",), ((3,),))
SMALL = ModelConfig(block_out_channels=(8, 8), attention_head_dim=8, norm_num_groups=4)


def task(interval: int = 1, *resumed: int, run: str = "a") -> TrainTask:
    """An order of a run that went on after those intervals when it was resumed."""
    names = {"run_name": run, "resumed": resumed}
    return train_task(SMALL, interval=interval, training=TrainingConfig(), **names)


def new_trainer() -> Trainer:
    return Trainer(client_id="client-7", device="cpu")


def trained(steps: int) -> Trainer:
    trainer = new_trainer()
    own = torch.tensor([1.0, 2.0, float(steps)])
    trainer.load_state_dict({"steps": steps, "layout": LAYOUT.to_json(), OWN_WEIGHTS: own})
    return trainer


def place(kind: str, records: RecordDict, folder: Path) -> StateStore:
    return ContextStore(records) if kind == "context" else FileStore(folder / "a" / "state.st")


def take_round(store: StateStore, order: TrainTask, trainer: Trainer | None = None) -> int:
    """One training round that adds a step; returns the steps that it started from."""
    trainer = trainer or new_trainer()
    store.restore(trainer, order)
    before = int(str(trainer.state_dict()["steps"]))
    trainer.load_state_dict(trained(before + 1).state_dict())
    store.store(trainer, order)
    return before


@pytest.mark.parametrize("kind", ["context", "file"])
def test_another_process_goes_on_from_the_state_that_was_stored_last(
    kind: str, tmp_path: Path
) -> None:
    records = RecordDict()
    for steps in (4, 9):
        place(kind, records, tmp_path).store(trained(steps), task())
    after = new_trainer()
    place(kind, records, tmp_path).restore(after, task())
    state = after.state_dict()
    assert state["steps"] == 9
    assert state["layout"] == LAYOUT.to_json()
    assert torch.equal(torch.as_tensor(state[OWN_WEIGHTS]), torch.tensor([1.0, 2.0, 9.0]))


@pytest.mark.parametrize("kind", ["context", "file"])
def test_a_client_of_another_run_starts_afresh(kind: str, tmp_path: Path) -> None:
    records = RecordDict()
    place(kind, records, tmp_path).store(trained(4), task(run="another"))
    trainer = trained(3)
    place(kind, records, tmp_path).restore(trainer, task())
    assert trainer.state_dict() == {"steps": 0}


def test_intervals_that_come_again_start_from_the_state_before_them(tmp_path: Path) -> None:
    def round_of(interval: int, *resumed: int) -> int:
        return take_round(place("file", RecordDict(), tmp_path), task(interval, *resumed))

    assert [round_of(1), round_of(1), round_of(2), round_of(2)] == [0, 1, 2, 3]
    # The run was killed within interval 2: two steps were taken before it.
    assert [round_of(2, 1), round_of(2, 1)] == [2, 3]
    # And again, and then after interval 2, which does not come a third time.
    assert [round_of(2, 1, 1), round_of(2, 1, 1), round_of(3, 1, 1, 2)] == [2, 3, 4]
    assert round_of(3, 1, 1, 2, 2) == 4


def test_who_was_away_when_an_interval_came_again_does_not_go_on_from_its_lost_work(
    tmp_path: Path,
) -> None:
    def round_of(interval: int, *resumed: int) -> int:
        return take_round(place("file", RecordDict(), tmp_path), task(interval, *resumed))

    assert [round_of(1), round_of(2)] == [0, 1]
    # Interval 2 was lost, and came again while this client was away.
    assert [round_of(3, 1), round_of(4, 1)] == [1, 2]
    # Nothing was lost in between.
    assert round_of(6, 1, 4) == 3


def test_an_edge_that_is_late_does_not_make_a_state_look_older_than_it_is(tmp_path: Path) -> None:
    def round_of(interval: int, *resumed: int) -> int:
        return take_round(place("file", RecordDict(), tmp_path), task(interval, *resumed))

    assert [round_of(3), round_of(4), round_of(3), round_of(4)] == [0, 1, 2, 3]
    # Interval 4 is lost: what is left is the state of before its first round.
    assert round_of(4, 3) == 1


def test_work_stays_lost_when_the_run_is_resumed_again_later(tmp_path: Path) -> None:
    def round_of(interval: int, *resumed: int) -> int:
        return take_round(place("file", RecordDict(), tmp_path), task(interval, *resumed))

    assert [round_of(1), round_of(2)] == [0, 1]
    # While this client was away interval 2 was lost, and later interval 5.
    assert round_of(6, 1, 4) == 1


def test_an_older_copy_of_the_run_takes_back_what_came_after_it(tmp_path: Path) -> None:
    def round_of(interval: int, *resumed: int) -> int:
        return take_round(place("file", RecordDict(), tmp_path), task(interval, *resumed))

    assert [round_of(1), round_of(6, 1, 5)] == [0, 1]
    # Its folder was put back as it was after interval 4, and has been resumed as often since.
    assert round_of(6, 1, 4) == 1


def test_a_first_interval_that_comes_again_starts_afresh(tmp_path: Path) -> None:
    # What an earlier run left in the same folder is not the state before this one.
    for interval in (1, 2):
        take_round(place("file", RecordDict(), tmp_path), task(interval, run="earlier"))
    assert take_round(place("file", RecordDict(), tmp_path), task(1)) == 0
    assert take_round(place("file", RecordDict(), tmp_path), task(1, 0)) == 0


def test_what_was_trained_too_far_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = place("file", RecordDict(), tmp_path)
    for interval in (1, 2, 3):
        take_round(store, task(interval))
    with caplog.at_level(logging.WARNING):
        # An older checkpoint was put back: the state of before interval 2 is gone.
        assert take_round(store, task(2, 1)) == 2
    assert "goes on after interval 1, but the state that is kept has seen interval 2" in caplog.text


def test_state_that_an_earlier_version_stored_is_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a" / "state.st"
    path.parent.mkdir()
    # The second value was the attempt's number.
    scalars = {"steps": 4, "of": ["a", 1, 1]}
    save_file({}, path, metadata={"json": json.dumps(scalars)})
    with caplog.at_level(logging.WARNING):
        assert take_round(place("file", RecordDict(), tmp_path), task(2)) == 0
    assert "client-7: the stored training state does not say where it comes from" in caplog.text
    # Who is new has nothing to say.
    caplog.clear()
    take_round(FileStore(tmp_path / "new.st"), task())
    assert not caplog.text


def test_a_resident_trainer_is_read_only_when_it_must(tmp_path: Path) -> None:
    path, trainer = tmp_path / "state.st", new_trainer()
    store = FileStore(path, resident=True)
    assert [take_round(store, task(i), trainer) for i in (1, 1, 2)] == [0, 1, 2]
    path.unlink()
    # In memory still.
    assert take_round(store, task(2), trainer) == 3
    assert take_round(store, task(2, 1), trainer) == 2
    again, fresh = FileStore(path, resident=True), new_trainer()
    assert take_round(again, task(3, 1), fresh) == 3


def test_a_resident_trainer_goes_on_from_its_file_after_half_a_round(tmp_path: Path) -> None:
    store, trainer = FileStore(tmp_path / "state.st", resident=True), new_trainer()
    take_round(store, task(1), trainer)
    # What ended it was none of our errors, such as a GPU without memory.
    store.restore(trainer, task(2))
    trainer.load_state_dict(trained(7).state_dict())
    store.forget()
    assert take_round(store, task(2), trainer) == 1


def test_a_resident_trainer_goes_on_from_its_file_where_nothing_could_be_stored(
    tmp_path: Path,
) -> None:
    store, trainer = FileStore(tmp_path / "state.st", resident=True), new_trainer()
    take_round(store, task(1), trainer)
    with pytest.raises(FedPhDError, match="cannot be written to"), files_limited_to(10):
        take_round(store, task(2), trainer)
    assert take_round(store, task(2), trainer) == 1


def test_a_file_leaves_no_vector_in_flowers_records(tmp_path: Path) -> None:
    records = RecordDict()
    place("file", records, tmp_path).store(trained(4), task())
    assert not records.array_records
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["state.st"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a" / "state.st"
    place("file", RecordDict(), tmp_path).store(trained(4), task())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FedPhDError, match=rf"client-7 cannot be read from {path}: .*; remove it"):
        place("file", RecordDict(), tmp_path).restore(trained(4), task())


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(FedPhDError, match=r"client-7 cannot be written to .*a/state.st: .*FLWR_H"):
        place("file", RecordDict(), tmp_path).store(trained(4), task())


def test_a_full_disk_leaves_the_state_that_was_stored_last(tmp_path: Path) -> None:
    place("file", RecordDict(), tmp_path).store(trained(4), task())
    with files_limited_to(64), pytest.raises(FedPhDError, match="File too large"):
        place("file", RecordDict(), tmp_path).store(trained(9), task())
    after = new_trainer()
    place("file", RecordDict(), tmp_path).restore(after, task())
    assert after.state_dict()["steps"] == 4
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["state.st"]
