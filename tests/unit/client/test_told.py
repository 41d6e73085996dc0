"""What edges get to know when a client fails: nothing of its files, which its own log names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from PIL import Image
from support.client_app import question, task
from support.tiny import write_toml

from fedphd.client.resident import STATE, Resident
from fedphd.client.steps import LocalRound
from fedphd.common.config.roles import ClientConfig, load_config
from fedphd.common.errors import (
    ConfigError,
    FedPhDError,
    ParticipantsError,
    ReplyError,
    code_for_peers,
    telling,
    told_of,
)
from fedphd.common.events import Verdict
from fedphd.common.wire.messages import FINISH, TRAIN, Finish
from fedphd.common.wire.offers import CHOOSE, Offer
from fedphd.common.wire.records import to_records
from fedphd.deploy.apps.stock import client_app

WARD = "ward-7"
ORDER, WEIGHTS = task()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a client of an image folder."""
    folder = tmp_path / WARD / "images"
    for number in range(4):
        place = folder / str(number % 2) / f"mrs-smith-{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 50 * number, dtype=np.uint8)).save(place)
    return write_toml(
        tmp_path / "client.toml",
        {
            "data.source": str(folder), "data.format": "imagefolder", "device": "cpu",
            "num_threads": 1, "node.insecure": True, "state_dir": str(tmp_path / WARD / "state"),
        },
    )  # fmt: skip


def resident(path: Path) -> Callable[[Message], Message]:
    """The answers of a client's own process."""
    config = load_config(ClientConfig, path)
    client = Resident(config, stop=threading.Event())
    return client.nodes[config.edges[0]]._answer


def stock(path: Path) -> Callable[[Message], Message]:
    """The answers where Flower's own node runs."""
    node_config = {"config": str(path)}
    context = Context(
        run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config={}
    )  # type: ignore[arg-type]
    return lambda message: client_app(message, context)


OFFER = Offer(edge_id="edge-0", label_distribution=(1.0,), num_samples=0.0)
CHOICE = question(OFFER, num_edges=1, target=(1.0,))


@pytest.mark.parametrize("kind", [resident, stock])
def test_edges_are_told_of_no_file(
    path: Path,
    kind: Callable[[Path], Callable[[Message], Message]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = kind(path)
    choice = answer(Message(to_records(CHOICE), 2, CHOOSE))
    assert choice.error.reason == (
        "refused: its labels go beyond the run's num_classes = 1; its own log says more"
    )
    # It has been started; now a picture is spoilt.
    spoilt = path.parent / WARD / "images" / "1" / "mrs-smith-3.png"
    spoilt.write_bytes(b"\x89PNG, and no more")
    order = answer(Message(to_records(ORDER, WEIGHTS), 2, TRAIN))
    assert order.error.reason == "refused: its images cannot be used; its own log says more"
    # The own log has all of it.
    assert f"{WARD}/images" in caplog.text
    assert "cannot be decoded" in caplog.text
    assert [record.exc_info for record in caplog.records if "failed" in record.msg] == [None] * 2


def test_a_clients_own_process_does_not_start_on_a_broken_image(path: Path) -> None:
    spoilt = path.parent / WARD / "images" / "1" / "mrs-smith-3.png"
    spoilt.write_bytes(b"\x89PNG, and no more")
    with pytest.raises(ConfigError, match=r"in \[data\]: .*mrs-smith-3.png', cannot be decoded"):
        resident(path)


def test_a_client_that_never_trained_ends_with_what_kept_it_from_that(path: Path) -> None:
    """The run goes well without it, and nobody else would tell."""
    config, stop = load_config(ClientConfig, path), threading.Event()
    client = Resident(config, stop=stop)
    answer, order = client.nodes[config.edges[0]]._answer, to_records(ORDER, WEIGHTS)
    spoilt = path.parent / WARD / "images" / "1" / "mrs-smith-3.png"
    whole = spoilt.read_bytes()
    spoilt.write_bytes(b"\x89PNG, and no more")
    assert answer(Message(order, 2, TRAIN)).has_error()
    answer(Message(to_records(Finish(exit_code=0, message="finished")), 2, FINISH))
    stop.set()
    verdict = client.run()
    assert verdict.exit_code == ConfigError.exit_code
    assert verdict.message.startswith("finished, but this client never trained: ")
    assert str(spoilt) in verdict.message
    # Once it has, the run's end is its own.
    spoilt.write_bytes(whole)
    assert not answer(Message(order, 2, TRAIN)).has_error()
    assert client.run() == Verdict(0, "finished")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("no memory on the GPU"), "no memory on the GPU"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_client_that_never_trained_ends_so_whatever_kept_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    config, stop = load_config(ClientConfig, path), threading.Event()
    client = Resident(config, stop=stop)
    monkeypatch.setattr(LocalRound, "step", fail)
    answer = client.nodes[config.edges[0]]._answer
    assert answer(Message(to_records(ORDER, WEIGHTS), 2, TRAIN)).has_error()
    answer(Message(to_records(Finish(exit_code=0, message="finished")), 2, FINISH))
    stop.set()
    assert client.run() == Verdict(1, f"finished, but this client never trained: {text}")


def test_a_client_whose_labels_do_not_fit_says_so_at_the_end(path: Path) -> None:
    config, stop = load_config(ClientConfig, path), threading.Event()
    client = Resident(config, stop=stop)
    answer = client.nodes[config.edges[0]]._answer
    assert answer(Message(to_records(CHOICE), 2, CHOOSE)).has_error()
    answer(Message(to_records(Finish(exit_code=0, message="finished")), 2, FINISH))
    stop.set()
    verdict = client.run()
    assert (verdict.exit_code, "never trained: " in verdict.message) == (2, True)


def test_a_state_that_cannot_be_read_is_told_without_its_place(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / WARD / "state" / STATE
    state.parent.mkdir()
    state.write_bytes(b"garbage")
    told = resident(path)(Message(to_records(ORDER, WEIGHTS), 2, TRAIN)).error.reason
    assert told == "FedPhDError: its stored state cannot be read; its own log says more"
    assert str(state) in caplog.text


def test_a_node_whose_file_is_missing_does_not_say_where_it_looked(tmp_path: Path) -> None:
    told = stock(tmp_path / WARD / "client.toml")(Message(to_records(CHOICE), 2, CHOOSE))
    assert told.error.reason == "refused: a setting of its own is wrong; its own log says more"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ReplyError("weights: NaN"), "ReplyError: weights: NaN"),
        (ParticipantsError("1 of 2 came"), "ParticipantsError: 1 of 2 came"),
        (ConfigError("/x"), "refused: a setting of its own is wrong; its own log says more"),
        (ConfigError("no cuda").for_peers(), "refused: no cuda"),
        (FedPhDError("/x"), "FedPhDError: its own log says more"),
        (FileNotFoundError(2, "No such file", "/x"), "FileNotFoundError: its own log says more"),
    ],
)
def test_texts_go_as_they_are_only_where_they_are_about_peers(error: Exception, told: str) -> None:
    assert told_of(error) == told


def test_what_was_said_first_is_told() -> None:
    with pytest.raises(ConfigError) as raised, telling("outer"), telling("inner"):
        raise ConfigError("/x")
    assert told_of(raised.value) == "refused: inner; its own log says more"


def test_a_client_that_flower_starts_on_spoilt_data_says_no_more(path: Path) -> None:
    for picture in (path.parent / WARD / "images").glob("*/*.png"):
        picture.unlink()
    told = stock(path)(Message(to_records(CHOICE), 2, CHOOSE)).error.reason
    assert told == "refused: its images cannot be used; its own log says more"


def test_others_are_not_blamed_for_a_wrong_setting() -> None:
    assert code_for_peers(ConfigError("a.pem: cannot be read")) == 1
    assert code_for_peers(ParticipantsError("too few")) == 4
