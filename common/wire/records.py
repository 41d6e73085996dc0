"""A message's form on Flower's wire, and what is checked of one that arrives.

Its scalars travel as one JSON text, model weights as ONE flat float32 array beside the manifest of
names and shapes that says how to cut it up, SCAFFOLD's control variates as a second such array. So
a message is 5 Flower objects instead of 223 for the digits network, 32 instead of 471 for
CIFAR-10's, each several remote calls; and an average is one addition (tests/benchmarks/packing.py).
"""

import math
import re
from io import BytesIO
from typing import Any, Final, Literal, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.lib import format as npy_format
from pydantic import ValidationError

from fedphd.common.errors import ReplyError
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.failures import kind_of
from fedphd.common.wire.messages import UNetSpec
from fedphd.common.wire.payload import MOST_OF_CLIENT, Payload, shown

_RECORD: Final = "fedphd"
_PAYLOAD: Final = "payload"
_WEIGHTS: Final = "weights"
_VARIATE: Final = "variate"

# Matched as bytes: NumPy's own reader evaluates the header, and fails in many ways on a bad one.
_NPY_HEAD: Final = re.compile(
    rb"\x93NUMPY\x01\x00(?s:..)"
    rb"\{'descr': '(?P<dtype><f[48]|\|u1)', 'fortran_order': False, "
    rb"'shape': \((?P<numel>[0-9]{1,15}),\), \} *\n"
)
_NPY_SHOWN_BYTES: Final = 96
# What Flower calls NumPy's format in an array.
_NUMPY: Final = "numpy.ndarray"
_NPY_CODES: Final = {"float32": "<f4", "float64": "<f8", "uint8": "|u1"}
Dtype = Literal["float32", "float64", "uint8"]

# Of what is wrong with a payload only the first is told, but all of it is listed for that.
_MOST_LISTED: Final = 1000

PayloadT = TypeVar("PayloadT", bound=Payload)


def to_records(
    payload: Payload,
    weights: torch.Tensor | Array | None = None,
    variate: torch.Tensor | Array | None = None,
) -> RecordDict:
    """Convert a message's scalars to Flower records, with the arrays that go beside them.

    Args:
        weights: (numel,), on the CPU; float32, uint8 as a codec packed them, or float64 for sums
            of features. Or an array that is serialised already, as another message brought it: no
            copy.
        variate: a control variate of these weights, or its change; as the weights.
    """
    records = RecordDict({_RECORD: ConfigRecord({_PAYLOAD: payload.model_dump_json()})})
    if weights is not None:
        records[_WEIGHTS] = arrays = weights_record(weights)
        if variate is not None:
            arrays[_VARIATE] = to_array(variate)
    return records


def weights_record(weights: torch.Tensor | Array) -> ArrayRecord:
    """One flat array, as in ``to_records``, as a Flower record."""
    record = ArrayRecord()
    # An ArrayRecord that is given arrays makes copies of them, which are hashed once more each.
    record[_WEIGHTS] = to_array(weights)
    return record


def to_array(values: torch.Tensor | Array) -> Array:
    """Serialise ``values``, (numel,), with one copy, unless they are already."""
    if isinstance(values, Array):
        return values
    flat = values.contiguous().numpy()
    head = BytesIO()
    # What Flower's own ``Array(flat)`` writes, which grows a buffer and copies it.
    npy_format.write_array_header_1_0(head, npy_format.header_data_from_array_1_0(flat))
    data = b"".join((head.getvalue(), flat.data.cast("B")))
    return Array(dtype=str(flat.dtype), shape=flat.shape, stype=_NUMPY, data=data)


def read_payload(message: Message, kind: type[PayloadT]) -> PayloadT:
    """A message's scalars; raises ReplyError for an error reply or a malformed ``kind``."""
    if message.has_error():
        error = message.error
        why = shown(error.reason) if error.reason else f"error {error.code}"
        raise ReplyError(why, kind_of(error))
    if not message.has_content():
        raise ReplyError("not a FedPhD message: it has no content")
    try:
        text = message.content.config_records[_RECORD][_PAYLOAD]
    except KeyError as error:
        raise ReplyError(f"not a FedPhD message: record {error} is missing") from error
    if isinstance(text, str | bytes) and len(text) > kind.most_bytes:
        size, most = len(text) / 1e6, kind.most_bytes / 1e6
        raise ReplyError(f"{kind.__name__} of {size:.1f} MB beside its arrays; at most {most:.1f}")
    try:
        return kind.model_validate_json(text)  # type: ignore[arg-type]
    except ValidationError as error:
        if (wrong := error.error_count()) > _MOST_LISTED:
            raise ReplyError(
                f"malformed {kind.__name__}: {wrong} of its values are wrong"
            ) from None
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or kind.__name__
        # As where a peer of another version names a codec that this one does not have.
        got = f", not {first['input']!r}" if first["type"] == "literal_error" else ""
        what = shown(f"{where}: {first['msg']}{got}")
        raise ReplyError(f"malformed {kind.__name__}: {what}") from error


def weights_array(message: Message) -> Array:
    """A message's weights as they came, to send on; raises ReplyError if it has none."""
    return _array_named(message, _WEIGHTS, "weights")


def read_weights(message: Message, dtype: Dtype = "float32") -> torch.Tensor:
    """A message's flat weights, (numel,), as ``read_array``; raises ReplyError if it has none."""
    return read_array(weights_array(message), dtype)


def read_coded(message: Message, codec: Codec, base: torch.Tensor | None = None) -> torch.Tensor:
    """A message's weights, (numel,), float32, from what ``codec`` packed with the same ``base``.

    Raises ReplyError if it has none, or others.
    """
    return codec.unpack(read_weights(message, codec.dtype), base)


def read_variate(message: Message, codec: Codec | None = None) -> torch.Tensor:
    """The control variate, or its change, beside the weights of a message; as ``read_coded``.

    Without a codec it is float32.
    """
    array = _array_named(message, _VARIATE, what := "control variate")
    if codec is None:
        return read_array(array, what=what)
    return codec.unpack(read_array(array, codec.dtype, what), what=what)


def _array_named(message: Message, name: str, what: str) -> Array:
    try:
        return message.content.array_records[_WEIGHTS][name]
    except KeyError as error:
        raise ReplyError(f"carries no {what}") from error


def read_array(array: Array, dtype: Dtype = "float32", what: str = "weights") -> torch.Tensor:
    """View a serialised vector (Flower stores NumPy's ``.npy`` format): read-only, no copy.

    Returns:
        Shape (numel,), of ``dtype``.

    Raises:
        ReplyError: another dtype, number of dimensions or length; names ``what`` it is.
    """
    code = _NPY_CODES[dtype]
    head = _NPY_HEAD.match(array.data)
    if head is None or head["dtype"] != code.encode():
        got = array.data[:_NPY_SHOWN_BYTES]
        raise ReplyError(f"{what}: expected a flat {dtype} array in NumPy's format; got {got!r}")
    numel, offset, width = int(head["numel"]), head.end(), np.dtype(code).itemsize
    if (got_bytes := len(array.data) - offset) != width * numel:
        expected = f"{numel} values of {dtype} take {width * numel} bytes"
        raise ReplyError(f"{what}: {expected}; got {got_bytes}")
    return torch.from_numpy(np.asarray(_Lent(np.frombuffer(array.data, code, offset=offset))))


class _Lent:
    """Lends read-only memory to torch, which has no read-only tensors and would warn.

    Whoever gets the tensor must not write to it; ``owner`` keeps the bytes alive.
    """

    def __init__(self, owner: np.ndarray[Any, Any]) -> None:
        self.owner = owner
        address, _ = owner.__array_interface__["data"]
        self.__array_interface__ = {**owner.__array_interface__, "data": (address, False)}


def check_reply_weights(
    weights: torch.Tensor, network: UNetSpec, expected: TensorLayout
) -> torch.Tensor:
    """Check weights, (numel,), float32, that came back as ``network`` against what was sent out.

    Raises:
        ReplyError: names the first tensor that differs from ``expected`` or is not finite; or a
            value is so large that sums of it may overflow.
    """
    if problem := expected.mismatch(network.tensor_layout()) or _bad_values(weights, expected):
        raise ReplyError(shown(problem))
    return weights


def check_variate(variate: torch.Tensor, expected: TensorLayout) -> torch.Tensor:
    """Check a control variate, (numel,), float32; raises ReplyError as ``check_reply_weights``."""
    if problem := _bad_values(variate, expected):
        raise ReplyError(f"control variate: {problem}")
    return variate


def _bad_values(flat: torch.Tensor, expected: TensorLayout) -> str | None:
    if flat.numel() != expected.numel:
        return f"got {flat.numel()} values; the network has {expected.numel}"
    # One pass: it is NaN or infinite if a value is.
    least, most = torch.aminmax(flat) if flat.numel() else (flat.sum(), flat.sum())
    largest = max(-least.item(), most.item())
    if not math.isfinite(largest):
        return expected.first_non_finite(flat)
    # Finite values near the largest float become infinite when they are summed by images.
    if largest > MOST_OF_CLIENT:
        return f"a value has the size {largest:g}; at most {MOST_OF_CLIENT:g} is allowed"
    return None
