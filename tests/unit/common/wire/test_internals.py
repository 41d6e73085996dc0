"""What grids and nodes need of Flower's messages: read from their objects, their sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedphd.common.errors import ReplyError
from fedphd.common.wire.internals import MOST_PARTS, cut_up, inflated, message_bytes

NUM_VALUES = 3_000_000  # 12 MB: three chunks of Flower's 5 MiB


def reply(text: str, numel: int = 4) -> Message:
    asked = Message(RecordDict(), 3, "train")
    weights = ArrayRecord({"w": Array(np.arange(numel, dtype=np.float32))})
    return Message(RecordDict({"c": ConfigRecord({"t": text}), "w": weights}), reply_to=asked)


def two_arrays() -> Message:
    """An array that repeats a chunk, and another one that has the same chunk."""
    zeros, some = np.zeros(NUM_VALUES, np.float32), np.arange(NUM_VALUES, dtype=np.float32)
    arrays = {"zeros": Array(zeros), "again": Array(zeros.copy()), "some": Array(some)}
    return Message(RecordDict({"w": ArrayRecord(arrays)}), 3, "train")


def test_chunks_of_ours_are_those_of_flower() -> None:
    theirs, ours = two_arrays(), two_arrays()
    ours.metadata.__dict__ |= theirs.metadata.__dict__
    cut_up(ours)
    expected = {key: item.deflate() for key, item in get_all_nested_objects(theirs).items()}
    assert {key: item.deflate() for key, item in get_all_nested_objects(ours).items()} == expected
    assert message_bytes(ours, {}) == sum(len(content) for content in expected.values())
    assert ours.object_id == theirs.object_id


def test_arrays_are_read_as_flower_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = two_arrays()
    contents = {key: item.deflate() for key, item in get_all_nested_objects(sent).items()}
    total = sum(len(content) for content in contents.values())
    got = inflated(sent.object_id, dict(contents))
    for name, array in sent.content.array_records["w"].items():
        assert got.content.array_records["w"][name] == array
    # To be sent on, or counted, without being hashed again.
    monkeypatch.setattr("fedphd.common.wire.internals.hashlib", None)
    assert message_bytes(got, {}) == total
    assert list(get_all_nested_objects(got)) == list(contents)


def test_array_of_objects_that_are_no_chunks_is_refused() -> None:
    sent = two_arrays()
    contents = {key: item.deflate() for key, item in get_all_nested_objects(sent).items()}
    chunk = next(iter(contents))
    contents[chunk] = b"ConfigRecord  2\x00{}"
    with pytest.raises(ReplyError, match="a ConfigRecord in place of an array's chunk"):
        inflated(sent.object_id, contents)


def test_an_array_that_names_a_chunk_without_end_is_refused() -> None:
    sent = two_arrays()
    contents = {key: item.deflate() for key, item in get_all_nested_objects(sent).items()}
    # Two of the three are the same array.
    plain = 2 * len(sent.content.array_records["w"]["some"].data)
    assert inflated(sent.object_id, dict(contents), most_bytes=plain).has_content()
    once, often = b'"arraychunk_ids": [0, 1, 2]', b'"arraychunk_ids": [0, 1, 2, 0]'
    contents = {key: content.replace(once, often) for key, content in contents.items()}
    with pytest.raises(ReplyError, match="its arrays are larger than a reply may be"):
        inflated(sent.object_id, contents, most_bytes=plain)


@pytest.mark.parametrize(("num_arrays", "each"), [(1, MOST_PARTS + 1), (3, MOST_PARTS // 2)])
def test_arrays_that_name_a_chunk_too_often_are_refused_before_they_are_made(
    num_arrays: int, each: int
) -> None:
    empty = {f"a{n}": Array(np.zeros((0, n), np.float32)) for n in range(num_arrays)}
    sent = Message(RecordDict({"w": ArrayRecord(empty)}), 1, "train")
    contents = {key: item.deflate() for key, item in get_all_nested_objects(sent).items()}
    numbers = [0] * each
    for key, content in contents.items():
        once = json.dumps({"arraychunk_ids": [0]})[1:-1].encode()
        often = json.dumps({"arraychunk_ids": numbers})[1:-1].encode()
        contents[key] = content.replace(once, often)
    with pytest.raises(ReplyError, match=f"its arrays have more than {MOST_PARTS} chunks"):
        inflated(sent.object_id, contents)


def test_message_bytes_counts_every_object_and_serialises_shared_ones_once() -> None:
    message = reply("hello", NUM_VALUES)
    sizes: dict[str, int] = {}
    total = message_bytes(message, sizes)
    # Message, records, config, arrays, array, and 12,000,128 bytes in chunks of 5 MiB.
    assert len(sizes) == 5 + 3
    assert total == sum(sizes.values())
    assert 12_000_128 < total < 12_000_128 + 4000
    twin = Message(message.content, 9, "train")
    before = dict(sizes)
    again = message_bytes(twin, sizes)
    assert len(set(sizes) - set(before)) == 1, "only the envelope differs"
    assert again == pytest.approx(total, abs=200)


def test_what_a_peer_sent_fails_with_our_error_and_its_cause() -> None:
    with pytest.raises(ReplyError, match=r"^cannot be read: \w+: ") as raised:
        inflated("id", {"id": b"junk"})
    assert raised.value.__cause__ is not None
