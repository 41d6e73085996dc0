"""Where a trainer's state outlives its process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict
from support.disk import files_limited_to

from fedphd.client.local_state import OWN_WEIGHTS
from fedphd.client.stores import ContextStore, FileStore, StateStore
from fedphd.client.trainer import Trainer
from fedphd.common.errors import FedPhDError
from fedphd.common.unet.layout import TensorLayout

LAYOUT = TensorLayout(("weight",), ((3,),))


def trained(steps: int) -> Trainer:
    trainer = Trainer(client_id="client-7", device="cpu")
    own = torch.tensor([1.0, 2.0, float(steps)])
    trainer.load_state_dict({"steps": steps, "layout": LAYOUT.to_json(), OWN_WEIGHTS: own})
    return trainer


def place(kind: str, records: RecordDict, folder: Path) -> StateStore:
    return (
        ContextStore(records) if kind == "context" else FileStore(records, folder / "a" / "state")
    )


@pytest.mark.parametrize("kind", ["context", "file"])
def test_another_process_goes_on_from_the_state_that_was_stored_last(
    kind: str, tmp_path: Path
) -> None:
    records = RecordDict()
    for steps in (4, 9):
        place(kind, records, tmp_path).store(trained(steps))
    after = Trainer(client_id="client-7", device="cpu")
    place(kind, records, tmp_path).restore(after)
    state = after.state_dict()
    assert state["steps"] == 9
    assert state["layout"] == LAYOUT.to_json()
    assert torch.equal(torch.as_tensor(state[OWN_WEIGHTS]), torch.tensor([1.0, 2.0, 9.0]))


@pytest.mark.parametrize("kind", ["context", "file"])
def test_a_new_client_starts_afresh(kind: str, tmp_path: Path) -> None:
    # The file of an earlier run with the same node is not this client's.
    place("file", RecordDict(), tmp_path).store(trained(4))
    trainer = trained(3)
    place(kind, RecordDict(), tmp_path).restore(trainer)
    assert trainer.state_dict() == {"steps": 0}


def test_a_file_leaves_no_vector_in_flowers_records(tmp_path: Path) -> None:
    records = RecordDict()
    place("file", records, tmp_path).store(trained(4))
    assert not records.array_records
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["state"]


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_file_that_cannot_be_read_is_named(damage: str, tmp_path: Path) -> None:
    records, path = RecordDict(), tmp_path / "a" / "state"
    place("file", records, tmp_path).store(trained(4))
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FedPhDError, match=rf"client-7 cannot be read from {path}"):
        place("file", records, tmp_path).restore(trained(4))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    records = RecordDict()
    with pytest.raises(FedPhDError, match=r"client-7 cannot be written to .*a/state: .*FLWR_HOME"):
        place("file", records, tmp_path).store(trained(4))
    # The next message starts from what was stored last, not from a file that never came.
    assert len(records) == 0


def test_a_full_disk_leaves_the_state_that_was_stored_last(tmp_path: Path) -> None:
    records = RecordDict()
    place("file", records, tmp_path).store(trained(4))
    with files_limited_to(64), pytest.raises(FedPhDError, match="File too large"):
        place("file", records, tmp_path).store(trained(9))
    after = Trainer(client_id="client-7", device="cpu")
    place("file", records, tmp_path).restore(after)
    assert after.state_dict()["steps"] == 4
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["state"]
