"""What a hostile peer may send, as hypothesis strategies: values, payloads, arrays, records."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import settings
from hypothesis import strategies as st

# The same cases in every run, and no limit of time per case: the machine may be busy.
FEW = settings(derandomize=True, deadline=None, max_examples=40)
FEWEST = settings(derandomize=True, deadline=None, max_examples=15)
MANY = settings(derandomize=True, deadline=None, max_examples=200)

ABSURD: list[Any] = [
    -1, 0, 10**18, -(10**18), 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"), True, None, "",
    "1", "\x1b[2J", "x" * 5000, [], {}, [[]], [float("nan")], {"a": {}},
]  # fmt: skip
absurd_values = st.sampled_from(ABSURD) | st.integers() | st.floats() | st.text(max_size=5)


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values within JSON are, however deep."""
    found = [before] if before else []
    inner: Any = ()
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
    return found + [path for key, item in inner for path in paths(item, (*before, key))]


def changed(content: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    """A copy of JSON ``content`` with one place missing, misnamed, doubled or replaced."""
    result = copy.deepcopy(content)
    holder = result
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    if how == "replace":
        holder[key] = value
    elif how == "remove":
        del holder[key]
    elif isinstance(holder, dict):
        held = holder.pop(key) if how == "misname" else holder[key]
        holder[f"{key}_"] = held
    else:
        holder.append(holder[key])
    return result


@st.composite
def spoiled(draw: st.DrawFn, content: Any) -> Any:
    """JSON ``content`` with one thing wrong, or that only looks wrong."""
    path = draw(st.sampled_from(paths(content)))
    how = draw(st.sampled_from(["replace", "replace", "remove", "misname", "extra"]))
    return changed(content, path, how, draw(absurd_values))


def scalars(content: Any) -> RecordDict:
    """Records that hold ``content`` as a message's scalars."""
    return RecordDict({"fedphd": ConfigRecord({"payload": json.dumps(content)})})


def with_array(records: RecordDict, array: Array, name: str = "weights") -> RecordDict:
    """``records`` with an array beside them, or in place of theirs."""
    others = {key: record for key, record in records.items() if key != "weights"}
    return RecordDict({**others, "weights": ArrayRecord({name: array})})


def raw_array(data: bytes) -> Array:
    """An array of these serialised bytes."""
    return Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)


def bad_arrays(weights: torch.Tensor) -> st.SearchStrategy[Array]:
    """Serialised arrays that nobody may take for weights like ``weights``, (numel,), float32."""
    good = Array(weights.numpy())
    numel = len(weights)

    def valued(position: int, value: float) -> Array:
        values = weights.clone()
        values[position] = value
        return Array(values.numpy())

    places = st.integers(0, numel - 1)
    wrong = st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, -1e30, 1.1e12])
    kinds = [np.float64, np.float16, np.int32, np.int64, np.uint8, np.bool_, np.complex64]
    cast = st.sampled_from(kinds).map(lambda kind: Array(weights.numpy().astype(kind)))
    sizes = st.integers(0, 2 * numel).filter(lambda n: n != numel)
    return st.one_of(
        st.builds(valued, places, wrong),
        sizes.map(lambda n: Array(np.zeros(n, np.float32))),
        st.sampled_from([(numel, 1), (1, numel), ()]).map(
            lambda shape: Array(np.zeros(shape, np.float32))
        ),
        cast,
        st.integers(0, len(good.data) - 1).map(lambda end: raw_array(good.data[:end])),
        st.binary(min_size=1, max_size=64).map(lambda more: raw_array(good.data + more)),
        st.binary(max_size=200).map(raw_array),
        # A header that promises 4 petabytes.
        st.just(raw_array(good.data.replace(f"({numel},)".encode(), b"(999999999999999,)"))),
    )


def bad_records() -> st.SearchStrategy[RecordDict]:
    """Records that are no message of this project's."""
    texts = st.text(max_size=20) | st.sampled_from(["{", "[]", "null", "1e999", "[" * 5000])
    values = texts | st.binary(max_size=8) | st.integers(-(2**63), 2**63 - 1) | st.booleans()
    keys = st.sampled_from(["payload", "Payload", ""])
    return st.one_of(
        st.just(RecordDict()),
        st.builds(lambda k, v: RecordDict({"fedphd": ConfigRecord({k: v})}), keys, values),
        st.builds(
            lambda v: RecordDict({"fedphd": MetricRecord({"payload": v})}), st.integers(0, 9)
        ),
    )
