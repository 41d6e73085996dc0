"""Messages on the wire: what goes in comes out, and nothing malformed gets past the reader."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from support.payloads import LAYOUT, NETWORK, PAYLOADS, TRAIN_REPLY

from fedphd.common.errors import ReplyError
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.failures import NoAnswerError
from fedphd.common.wire.messages import (
    Ack,
    HelloReply,
    IntervalTask,
    TrainReply,
    UNetSpec,
)
from fedphd.common.wire.payload import Payload
from fedphd.common.wire.records import (
    check_reply_weights,
    check_variate,
    read_array,
    read_payload,
    read_variate,
    read_weights,
    to_array,
    to_records,
)


def asked() -> Message:
    return Message(RecordDict(), 3, "train")


def message(records: RecordDict) -> Message:
    """A reply with these records, after its trip through Flower's serialised arrays."""
    return Message(records, reply_to=asked())


def npy(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def array(data: bytes) -> Array:
    return Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: type(payload).__name__)
@pytest.mark.parametrize("with_weights", [False, True])
def test_round_trip(payload: Payload, with_weights: bool) -> None:
    weights = torch.tensor([1.5, -0.0, 3e-45, 7.0]) if with_weights else None
    reply = message(to_records(payload, weights))
    assert read_payload(reply, type(payload)) == payload
    if weights is None:
        with pytest.raises(ReplyError, match="carries no weights"):
            read_weights(reply)
    else:
        got = read_weights(reply)
        assert got.dtype == torch.float32
        assert got.numpy().tobytes() == weights.numpy().tobytes()


def test_sums_travel_in_double_precision() -> None:
    sums = torch.tensor([1 / 3, -0.0, 1e300], dtype=torch.float64)
    reply = message(to_records(Ack(name="a"), sums))
    got = read_weights(reply, "float64")
    assert got.dtype == torch.float64
    assert got.numpy().tobytes() == sums.numpy().tobytes()
    with pytest.raises(ReplyError, match="a flat float32 array"):
        read_weights(reply)
    with pytest.raises(ReplyError, match="a flat float64 array"):
        read_weights(message(to_records(Ack(name="a"), sums.float())), "float64")


def test_what_a_peer_of_another_version_asks_for_is_named() -> None:
    """Such as a codec that this one does not have."""
    (task,) = [payload for payload in PAYLOADS if isinstance(payload, IntervalTask)]
    values = json.loads(task.model_dump_json())
    values["plan"]["wire"]["cloud_up"] = "int2"
    text = {"payload": json.dumps(values)}
    with pytest.raises(ReplyError, match=r"malformed IntervalTask: .*cloud_up: .*, not 'int2'"):
        read_payload(message(RecordDict({"fedphd": ConfigRecord(text)})), IntervalTask)


def test_scalars_are_one_json_text_and_weights_one_array() -> None:
    records = to_records(TRAIN_REPLY, torch.zeros(3))
    [(_, scalars)] = records.config_records.items()
    [(_, text)] = scalars.items()
    assert json.loads(str(text))["steps"] == 4
    [(_, arrays)] = records.array_records.items()
    [(_, weights)] = arrays.items()
    assert (weights.dtype, tuple(weights.shape)) == ("float32", (3,))


def test_an_array_is_in_a_record_itself_so_that_it_is_hashed_once_for_all_messages() -> None:
    weights = to_array(torch.zeros(3))
    [(_, arrays)] = to_records(TRAIN_REPLY, weights).array_records.items()
    assert next(iter(arrays.values())) is weights


def test_variate_travels_beside_the_weights() -> None:
    reply = message(to_records(TRAIN_REPLY, torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])))
    assert read_weights(reply).tolist() == [0.0, 0.0, 0.0]
    assert read_variate(reply).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ReplyError, match="carries no control variate"):
        read_variate(message(to_records(TRAIN_REPLY, torch.zeros(3))))


def test_variate_is_checked_like_the_weights() -> None:
    variate = torch.arange(7.0)
    assert check_variate(variate, LAYOUT) is variate
    with pytest.raises(ReplyError, match="control variate: got 6 values; the network has 7"):
        check_variate(variate[:6], LAYOUT)
    variate[5] = math.nan
    with pytest.raises(ReplyError, match=r"control variate: tensor conv\.bias holds nan"):
        check_variate(variate, LAYOUT)


def test_error_reply_gives_code_and_reason() -> None:
    with pytest.raises(ReplyError, match=r"^no reply within 3 s$"):
        read_payload(Message(Error(5, "no reply within 3 s"), reply_to=asked()), Ack)
    # Why there is no answer is said by the side that waited, and never by the peer.
    for error, kind in ((NoAnswerError(5, "x", "late"), "late"), (Error(5, "late"), "error")):
        with pytest.raises(ReplyError) as raised:
            read_payload(Message(error, reply_to=asked()), Ack)
        assert raised.value.kind == kind


@pytest.mark.parametrize(
    ("records", "text"),
    [
        (RecordDict(), "not a FedPhD message: record 'fedphd' is missing"),
        (RecordDict({"fedphd": ConfigRecord({"other": "{}"})}), "record 'payload' is missing"),
        (RecordDict({"fedphd": MetricRecord({"payload": 1})}), "record 'fedphd' is missing"),
        (RecordDict({"fedphd": ConfigRecord({"payload": "{"})}), "malformed Ack: Ack: Invalid"),
        (RecordDict({"fedphd": ConfigRecord({"payload": 3})}), "malformed Ack: Ack: JSON input"),
        (RecordDict({"fedphd": ConfigRecord({"payload": "[]"})}), "malformed Ack: Ack: Input"),
        (RecordDict({"fedphd": ConfigRecord({"payload": "{}"})}), "malformed Ack: name: Field"),
    ],
)
def test_missing_and_malformed_records(records: RecordDict, text: str) -> None:
    with pytest.raises(ReplyError, match=text):
        read_payload(message(records), Ack)


def test_message_without_content_or_error() -> None:
    empty = message(RecordDict())
    empty.__dict__["_content"] = None
    with pytest.raises(ReplyError, match="not a FedPhD message: it has no content"):
        read_payload(empty, Ack)


def loss_of(value: float | None) -> dict[str, Any]:
    return {"metrics": {"loss": {"total": value, "weight": 1.0}}}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"extra": 1}, "malformed TrainReply: extra: Extra inputs"),
        ({"steps": -1}, "steps: .*greater than or equal to 0"),
        ({"steps": 10**13}, "steps: .*less than or equal to"),
        ({"steps": "4"}, "steps: .*valid integer"),
        ({"steps": 4.5}, "steps: .*integer"),
        ({"steps": True}, "steps: .*valid integer"),
        (loss_of(math.nan), "metrics.loss.total: .*finite"),
        (loss_of(math.inf), "metrics.loss.total: .*finite"),
        (loss_of(1e31), "metrics.loss.total: .*less than or equal to"),
        (loss_of(None), "metrics.loss.total: .*valid number"),
        ({"interval": 0}, "interval: .*greater than or equal to 1"),
        ({"network": {"unet": {}}}, "network.layout: Field required"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], text: str) -> None:
    content = TRAIN_REPLY.model_dump(mode="json") | change
    records = RecordDict({"fedphd": ConfigRecord({"payload": json.dumps(content)})})
    with pytest.raises(ReplyError, match=text):
        read_payload(message(records), TrainReply)


def test_another_kind_of_payload_is_refused() -> None:
    with pytest.raises(ReplyError, match="malformed HelloReply"):
        read_payload(message(to_records(Ack(name="client-0"))), HelloReply)


def test_weights_under_another_name_do_not_count() -> None:
    records = to_records(Ack(name="client-0"))
    records["weights"] = ArrayRecord({"other": Array(np.zeros(2, np.float32))})
    with pytest.raises(ReplyError, match="carries no weights"):
        read_weights(message(records))


GOOD = npy(np.arange(6, dtype=np.float32))


def headed(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(4)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (npy(np.zeros(3)), "a flat float32 array .*<f8"),
        (npy(np.zeros(3, ">f4")), "a flat float32 array .*>f4"),
        (npy(np.zeros(3, np.float16)), "a flat float32 array .*<f2"),
        (npy(np.zeros((2, 3), np.float32)), r"a flat float32 array .*\(2, 3\)"),
        (npy(np.float32(1)), r"a flat float32 array .*'shape': \(\)"),
        (
            npy(np.array([{}], dtype=object), allow_pickle=True),
            r"a flat float32 array .*\|O",
        ),
        (b"", "a flat float32 array .*got b''"),
        (b"junk" * 50, "a flat float32 array"),
        (GOOD[:20], "a flat float32 array"),
        (GOOD[:-1], "6 values of float32 take 24 bytes; got 23"),
        (GOOD + b"\0", "6 values of float32 take 24 bytes; got 25"),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n"), "a flat"),
        (
            headed("{'descr': '<f4', 'fortran_order': False, 'shape': (9**9,), }\n"),
            "a flat",
        ),
        (headed("{'descr"), "a flat"),
        (headed("(" * 400), "a flat"),
    ],
)
def test_other_arrays_are_refused(data: bytes, text: str) -> None:
    with pytest.raises(ReplyError, match=text):
        read_array(array(data))


@pytest.mark.parametrize("numel", [0, 1, 6, 100_000])
def test_arrays_are_viewed_in_place(numel: int) -> None:
    values = np.arange(numel, dtype=np.float32)
    data = npy(values)
    got = read_array(array(data))
    assert got.tolist() == values.tolist()
    if numel:
        start = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        assert start < got.data_ptr() < start + len(data)


def test_view_keeps_its_bytes_alive() -> None:
    got = read_array(array(npy(np.arange(1000, dtype=np.float32))))
    _ = [bytes(4128) for _ in range(200)]
    assert got.tolist() == list(range(1000))


def network(layout: TensorLayout | str) -> UNetSpec:
    return UNetSpec(unet={}, layout=layout if isinstance(layout, str) else layout.to_json())


def test_right_weights_pass() -> None:
    weights = torch.arange(7.0)
    assert check_reply_weights(weights, NETWORK, LAYOUT) is weights


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (TensorLayout(("conv.weight", "conv.bias"), ((2, 2), (4,))),
         r"tensor conv.bias has shape \(4,\); expected \(3,\)"),
        (TensorLayout(("conv.weight",), ((2, 2),)),
         r"tensor conv.bias is missing; expected shape \(3,\)"),
        (TensorLayout(("conv.weight", "conv.bias", "x"), ((2, 2), (3,), ())),
         "tensor x is unexpected"),
        (TensorLayout(("conv.bias", "conv.weight"), ((3,), (2, 2))), "tensors are in another"),
        ("[[1, 2]]", "layout of the weights is malformed: expected a list"),
        ("nonsense", "layout of the weights is malformed"),
    ],
)  # fmt: skip
def test_other_layouts_are_refused(layout: TensorLayout | str, text: str) -> None:
    with pytest.raises(ReplyError, match=text):
        check_reply_weights(torch.zeros(7), network(layout), LAYOUT)


def test_other_number_of_values_is_refused() -> None:
    with pytest.raises(ReplyError, match="got 8 values; the network has 7"):
        check_reply_weights(torch.zeros(8), NETWORK, LAYOUT)


@pytest.mark.parametrize(
    ("position", "value", "text"),
    [
        (0, math.nan, "tensor conv.weight holds nan"),
        (3, math.inf, "tensor conv.weight holds inf"),
        (4, -math.inf, "tensor conv.bias holds -inf"),
    ],
)
def test_values_that_are_not_finite_name_their_tensor(
    position: int, value: float, text: str
) -> None:
    weights = torch.zeros(7)
    weights[position] = value
    with pytest.raises(ReplyError, match=text):
        check_reply_weights(weights, NETWORK, LAYOUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_array_is_what_flower_makes_of_it(dtype: torch.dtype) -> None:
    values = torch.arange(7).to(dtype)
    assert to_array(values) == Array(values.numpy())
    assert to_array(values[::2]) == Array(values[::2].numpy())
