"""Whatever bytes a peer sends, its readers return something checked or raise ReplyError."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import MANY, bad_arrays, bad_records, raw_array, scalars, spoiled
from support.memory import FakeTime, MemoryGrid, streaming
from support.payloads import PAYLOADS

from fedphd.common.config.run import FederationConfig, ModelConfig
from fedphd.common.errors import FedPhDError, ReplyError
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.messages import Ack, HelloReply, StatisticsTask, UNetSpec
from fedphd.common.wire.payload import MOST_CHARACTERS, shown
from fedphd.common.wire.records import (
    check_reply_weights,
    check_variate,
    read_array,
    read_payload,
    read_variate,
    read_weights,
    to_records,
)
from fedphd.common.wire.roster import Roster

LAYOUT = TensorLayout(("a", "b"), ((2, 2), (3,)))
WEIGHTS = torch.arange(7.0)


def message(records: RecordDict) -> Message:
    return Message(records, reply_to=Message(RecordDict(), 3, "train"))


@MANY
@given(st.data(), st.sampled_from(PAYLOADS))
def test_spoiled_scalars_are_refused_or_finite(data: st.DataObject, payload: Any) -> None:
    content = data.draw(spoiled(payload.model_dump(mode="json")))
    got, refusal = None, ""
    try:
        got = read_payload(message(scalars(content)), type(payload))
    except ReplyError as error:
        refusal = str(error)
    assert len(refusal) < 2 * MOST_CHARACTERS
    if got is None:
        return
    # What passes can be sent on: it has no NaN, no unknown key, no other type.
    again = type(payload).model_validate_json(got.model_dump_json())
    # The U-Net's description is read where it is built (tests/unit/client/test_hostile.py).
    apart: Any = {"network": {"unet"}}
    assert again.model_dump(exclude=apart) == got.model_dump(exclude=apart)


@MANY
@given(bad_records(), st.sampled_from(PAYLOADS))
def test_other_records_are_refused(records: RecordDict, payload: Any) -> None:
    with pytest.raises(ReplyError):
        read_payload(message(records), type(payload))


@MANY
@given(bad_arrays(WEIGHTS))
def test_bad_arrays_are_refused(array: Array) -> None:
    records = to_records(Ack(name="a"), array)
    spec = UNetSpec(unet={}, layout=LAYOUT.to_json())
    with pytest.raises(ReplyError):
        check_reply_weights(read_weights(message(records)), spec, LAYOUT)
    records["weights"] = type(records["weights"])({"weights": array, "variate": array})  # type: ignore[call-arg,arg-type]
    with pytest.raises(ReplyError):
        check_variate(read_variate(message(records)), LAYOUT)


@MANY
@given(st.binary(max_size=300), st.integers(0, 80))
def test_any_bytes_are_an_array_or_refused(data: bytes, kept: int) -> None:
    head = Array(WEIGHTS.numpy()).data[:kept]
    try:
        got = read_array(raw_array(head + data))
    except ReplyError:
        return
    assert got.dtype == torch.float32
    assert 4 * got.numel() <= len(data) + kept


@MANY
@given(st.data())
def test_other_layouts_are_refused(data: st.DataObject) -> None:
    pairs = json.loads(LAYOUT.to_json())
    spoiled_pairs = data.draw(spoiled(pairs))
    spec = UNetSpec(unet={}, layout=json.dumps(spoiled_pairs))
    if json.dumps(spoiled_pairs) == json.dumps(pairs):
        return
    with pytest.raises(ReplyError):
        check_reply_weights(WEIGHTS, spec, LAYOUT)


CUT = Cut(LAYOUT, (((0,), None), (None,)), {"a": 0.5})


@MANY
@given(st.data())
def test_spoiled_cuts_are_refused_or_lead_to_finite_weights(data: st.DataObject) -> None:
    text = json.dumps(data.draw(spoiled(json.loads(CUT.to_json()))))
    expected = TensorLayout(("a", "b"), ((1, 2), (3,)))
    try:
        got = Cut.from_json(text).apply_flat(WEIGHTS, expected, power=-2)
    except FedPhDError:
        return
    assert got.isfinite().all()


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 0.0, -1.0, 1.5, math.nan, "1"])
def test_factors_that_would_ruin_a_clients_moments_are_refused(scale: Any) -> None:
    content = json.loads(CUT.to_json()) | {"scales": {"a": scale}}
    with pytest.raises(ReplyError, match=r"malformed cut: (scales\.a|Invalid|)"):
        Cut.from_json(json.dumps(content))


def test_what_people_read_is_short_and_plain() -> None:
    assert shown("no reply") == "no reply"
    assert shown("\x1b[2Jgone\n") == " [2Jgone "
    assert shown("x" * 10**6) == "x" * MOST_CHARACTERS + "..."
    reply = Message(Error(5, "\x1b" + "x" * 10**6), reply_to=Message(RecordDict(), 3, "train"))
    with pytest.raises(ReplyError) as raised:
        read_payload(reply, Ack)
    assert len(str(raised.value)) < 2 * MOST_CHARACTERS
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (FederationConfig, "num_classes", 10**10),
        (FederationConfig, "diffusion", {"num_train_timesteps": 10**12}),
        (ModelConfig, "layers_per_block", 10**9),
        (ModelConfig, "block_out_channels", [8] * 9),
        (ModelConfig, "block_out_channels", [8, 2**40]),
        (StatisticsTask, "num_classes", 10**10),
    ],
)
def test_sizes_that_would_be_allocated_are_bounded(kind: Any, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}.*\n.*should (be less|have at most)|{key}\\.1"):
        kind.model_validate_json(json.dumps({key: value}))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"name": "' + "a" * (1 << 20) + '"}', r"Ack of 1\.0 MB beside its arrays; at most 1"),
        ('{"name": "a"' + ',"b":0,"c":0' * 1000 + "}", "malformed Ack: "),
        (
            '{"name": "a", ' + ", ".join(f'"{n}": 0' for n in range(1001)) + "}",
            "malformed Ack: 1001 of its values are wrong",
        ),
    ],
)
def test_what_is_wrong_with_long_scalars_is_not_listed(text: str, why: str) -> None:
    # Pydantic's list takes a hundred times the memory of what is wrong.
    with pytest.raises(ReplyError, match=why):
        read_payload(message(RecordDict({"fedphd": ConfigRecord({"payload": text})})), Ack)


def test_features_whose_products_would_not_fit_are_refused() -> None:
    [task] = [payload for payload in PAYLOADS if isinstance(payload, StatisticsTask)]
    content = task.model_dump(mode="json")
    content["extractor"]["num_features"] = 65536
    with pytest.raises(ReplyError, match=r"extractor.num_features: .*less than or equal to 4096"):
        read_payload(message(scalars(content)), StatisticsTask)


class Twice(MemoryGrid):
    """A grid that brings every reply twice, and beside it one that answers nothing."""

    def pull_messages(self, message_ids: Any) -> list[Message]:
        found = list(super().pull_messages(message_ids))
        stray = message(to_records(Ack(name="stray")))
        return [reply for one in found for reply in (one, one, stray)]


@pytest.mark.parametrize("in_order", [True, False])
def test_second_replies_and_strays_find_nobody_who_waits(in_order: bool) -> None:
    def node(asked: Message) -> Message:
        return Message(to_records(Ack(name="a")), reply_to=asked)

    grid = streaming(Twice({2: node, 3: node}), time=FakeTime(), in_order=in_order)
    asked = [Message(RecordDict(), node_id, "query") for node_id in (2, 3)]
    replies = list(grid.send_and_receive(asked, timeout=3.0))
    assert sorted(reply.metadata.src_node_id for reply in replies) == [2, 3]


HELLO_REPLY = HelloReply(kind="edge", name="edge-0", clients={"client-0": 10, "client-1": 20})


@MANY
@given(st.data())
def test_only_a_sound_greeting_joins(data: st.DataObject) -> None:
    content = data.draw(spoiled(HELLO_REPLY.model_dump(mode="json")))
    told: list[tuple[str, str, str]] = []
    grid = streaming(MemoryGrid({2: lambda m: Message(scalars(content), reply_to=m)}))
    roster = Roster(
        grid, asking="cloud", kind="edge", hello_s=1.0, retry_s=60.0, max_samples=1000,
        on_change=lambda *change: told.append(change),
    )  # fmt: skip
    for peer in roster.refresh().values():
        assert all(name.isascii() and 0 < len(name) <= 64 for name in (peer.name, *peer.clients))
        assert all(0 < count <= 1000 for count in peer.clients.values())
    # An edge that joins also says whom it serves.
    (_, change, detail), *more = told
    assert change == ("joined" if roster.peers else "refused")
    assert [kind for _, kind, _ in more] == (["serves"] if roster.peers else [])
    assert len(detail) < 2 * MOST_CHARACTERS


@pytest.mark.parametrize("name", ["", "\x1b[2J", "x" * 65])
def test_edge_that_lists_a_client_without_a_proper_name_is_refused(name: str) -> None:
    reply = HelloReply(kind="edge", name="edge-0", clients={name: 10})
    grid = streaming(MemoryGrid({2: lambda m: Message(to_records(reply), reply_to=m)}))
    roster = Roster(grid, asking="cloud", kind="edge", hello_s=1.0, retry_s=60.0, max_samples=99)
    assert roster.refresh() == {}
