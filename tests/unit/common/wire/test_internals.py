"""What the grids need of Flower's internals: replies pulled with bounds, sizes of messages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import appio_pb2, message_pb2, node_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from support.memory import FakeTime

from fedphd.common.errors import ReplyError
from fedphd.common.wire.internals import GrpcReplies, cut_up, inflated, message_bytes

NUM_VALUES = 3_000_000  # 12 MB: three chunks of Flower's 5 MiB


class FakeStub:
    """A SuperLink's ServerAppIo API: replies are announced, then their objects come."""

    def __init__(self) -> None:
        self.announced: dict[str, tuple[Any, Any]] = {}
        self.objects: dict[str, bytes | None] = {}
        self.pulls: list[str] = []
        self.confirmed: list[str] = []

    def announce(self, asked: str, reply: Message) -> list[str]:
        """Announce a reply to ``asked``; returns its objects, in the order of their upload."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        items = get_all_nested_objects(reply)
        self.contents = {key: item.deflate() for key, item in items.items()}
        self.objects |= dict.fromkeys(items)
        proto = message_to_proto(remove_content_from_message(reply))
        proto.metadata.reply_to_message_id = asked
        self.announced[asked] = (proto, get_object_tree(reply))
        return list(items)

    def deliver(self, *object_ids: str) -> None:
        """Objects whose upload is complete."""
        self.objects |= {key: self.contents[key] for key in object_ids}

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 - gRPC's name
        found = [self.announced.pop(i) for i in request.message_ids if i in self.announced]
        return appio_pb2.PullAppMessagesResponse(
            messages_list=[proto for proto, _ in found],
            message_object_trees=[tree for _, tree in found],
        )

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        self.pulls.append(request.object_id)
        content = self.objects.get(request.object_id)
        return message_pb2.PullObjectResponse(
            object_found=request.object_id in self.objects,
            object_available=content is not None,
            object_content=content or b"",
        )

    def ConfirmMessageReceived(self, request: Any) -> Any:  # noqa: N802
        self.confirmed.append(request.message_object_id)
        return message_pb2.ConfirmMessageReceivedResponse()


@pytest.fixture
def stub() -> FakeStub:
    return FakeStub()


def replies_of(
    stub: FakeStub, *, stall_s: float = 60.0, time: FakeTime | None = None
) -> GrpcReplies:
    grid = SimpleNamespace(_stub=stub, node=node_pb2.Node(node_id=1), run=SimpleNamespace(run_id=7))
    return GrpcReplies(grid, stall_s=stall_s, clock=(time or FakeTime()).clock)


def reply(text: str, numel: int = 4) -> Message:
    asked = Message(RecordDict(), 3, "train")
    weights = ArrayRecord({"w": Array(np.arange(numel, dtype=np.float32))})
    return Message(RecordDict({"c": ConfigRecord({"t": text}), "w": weights}), reply_to=asked)


def message_id_of(object_ids: list[str]) -> str:
    """A message's own object comes last in an upload."""
    return object_ids[-1]


def text_of(message: Message | str) -> object:
    assert isinstance(message, Message)
    return message.content.config_records["c"]["t"]


def test_complete_reply_comes_whole_and_is_confirmed(stub: FakeStub) -> None:
    ids = stub.announce("asked", sent := reply("hello", NUM_VALUES))
    stub.deliver(*ids)
    [(asked, got)] = replies_of(stub).poll(["asked", "other"])
    assert asked == "asked"
    assert isinstance(got, Message)
    assert text_of(got) == "hello"
    assert got.content.array_records["w"]["w"].numpy().tolist()[-1] == NUM_VALUES - 1
    assert got.metadata.message_id == sent.metadata.message_id
    assert stub.confirmed == [sent.metadata.message_id]
    assert sorted(stub.pulls) == sorted(ids)


def test_error_reply_comes_whole(stub: FakeStub) -> None:
    failure = Message(Error(203, "out of memory"), reply_to=Message(RecordDict(), 3, "train"))
    stub.deliver(*stub.announce("asked", failure))
    [(_, got)] = replies_of(stub).poll(["asked"])
    assert isinstance(got, Message)
    assert got.error.reason == "out of memory"


def test_nothing_there_yet(stub: FakeStub) -> None:
    assert replies_of(stub).poll(["asked"]) == []
    assert replies_of(stub).poll([]) == []


def test_objects_are_pulled_as_they_come_and_once_each(stub: FakeStub) -> None:
    ids = stub.announce("asked", reply("hello", NUM_VALUES))
    replies = replies_of(stub)
    for number, object_id in enumerate(ids, start=1):
        assert replies.poll(["asked"]) == []
        assert not replies.moving
        stub.deliver(object_id)
        if number < len(ids):
            replies.poll(["asked"])
            assert replies.moving
            assert stub.pulls.count(object_id) >= 1, "not pulled although it was there"
    [(_, got)] = replies.poll(["asked"])
    assert text_of(got) == "hello"


def test_slow_upload_is_not_given_up(stub: FakeStub) -> None:
    time = FakeTime()
    ids = stub.announce("asked", reply("hello", NUM_VALUES))
    replies = replies_of(stub, stall_s=20.0, time=time)
    found: list[tuple[str, Message | str]] = []
    for object_id in ids:
        found += replies.poll(["asked"])
        time.now_s += 15.0
        stub.deliver(object_id)
    found += replies.poll(["asked"])
    assert time.now_s > 60
    [(_, got)] = found
    assert text_of(got) == "hello"


def test_upload_that_stalls_is_given_up_with_the_reason(stub: FakeStub) -> None:
    time = FakeTime()
    time.now_s = 100.0
    ids = stub.announce("asked", reply("hello"))
    stub.deliver(*ids[:2])
    replies = replies_of(stub, stall_s=20.0, time=time)
    assert replies.poll(["asked"]) == []
    time.now_s = 120.0
    assert replies.poll(["asked"]) == []
    time.now_s = 120.1
    assert replies.poll(["asked"]) == [("asked", "its upload stalled for 20 s")]
    assert replies.poll(["asked"]) == []
    assert stub.confirmed == [message_id_of(ids)], "the SuperLink need not keep the rest"


def test_stalled_upload_does_not_hold_up_another(stub: FakeStub) -> None:
    stub.announce("dead", reply("dead"))
    stub.deliver(*stub.announce("alive", reply("alive")))
    [(asked, got)] = replies_of(stub).poll(["dead", "alive"])
    assert (asked, text_of(got)) == ("alive", "alive")


def test_four_replies_are_pulled_at_a_time(stub: FakeStub) -> None:
    first = {name: set(stub.announce(name, reply(name))[:2]) for name in "abcde"}
    replies = replies_of(stub)
    assert replies.poll(list("abcde")) == []
    assert set(stub.pulls) == set().union(*(first[name] for name in "abcd"))
    replies.forget("a")
    assert len(stub.confirmed) == 1, "what came of it may be deleted"
    stub.pulls.clear()
    assert replies.poll(list("bcde")) == []
    assert set(stub.pulls) == set().union(*(first[name] for name in "bcde"))


def test_late_replies_are_deleted_unread(stub: FakeStub) -> None:
    stub.deliver(*stub.announce("late", sent := reply("late")))
    failure = Message(Error(1, "gone"), reply_to=Message(RecordDict(), 3, "train"))
    stub.deliver(*stub.announce("gone", failure))
    done = replies_of(stub).discard(["late", "still working", "gone"])
    assert done == [("late", True), ("gone", False)]
    assert stub.confirmed == [sent.metadata.message_id, failure.metadata.message_id]
    assert stub.pulls == []


def test_object_that_the_server_lost(stub: FakeStub) -> None:
    ids = stub.announce("asked", reply("hello"))
    stub.deliver(*ids)
    del stub.objects[ids[1]]
    assert replies_of(stub).poll(["asked"]) == [("asked", "its reply was lost on the server")]


def test_objects_that_are_not_a_message(stub: FakeStub) -> None:
    records = reply("hello").content
    stub.deliver(*stub.announce("asked", reply("hello")))
    items = get_all_nested_objects(records)
    stub.objects |= {key: item.deflate() for key, item in items.items()}
    proto, _ = stub.announced["asked"]
    stub.announced["asked"] = (proto, get_object_tree(records))
    assert replies_of(stub).poll(["asked"]) == [
        ("asked", "its reply is a RecordDict, not a message")
    ]


def test_objects_that_cannot_be_read(stub: FakeStub) -> None:
    ids = stub.announce("asked", reply("hello"))
    stub.deliver(*ids)
    stub.objects[ids[0]] = b"junk"
    [(asked, why)] = replies_of(stub).poll(["asked"])
    assert asked == "asked"
    assert isinstance(why, str)
    assert why.startswith("its reply cannot be read: ")


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


def test_arrays_are_read_as_flower_reads_them() -> None:
    sent = two_arrays()
    contents = {key: item.deflate() for key, item in get_all_nested_objects(sent).items()}
    total = sum(len(content) for content in contents.values())
    got = inflated(sent.object_id, dict(contents))
    for name, array in sent.content.array_records["w"].items():
        assert got.content.array_records["w"][name] == array
    # To be sent on, or counted, without being hashed again.
    assert message_bytes(got, {}) == total
    assert list(get_all_nested_objects(got)) == list(contents)


def test_array_of_objects_that_are_no_chunks_is_refused() -> None:
    sent = two_arrays()
    contents = {key: item.deflate() for key, item in get_all_nested_objects(sent).items()}
    chunk = next(iter(contents))
    contents[chunk] = b"ConfigRecord  2\x00{}"
    with pytest.raises(ReplyError, match="a ConfigRecord in place of an array's chunk"):
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
