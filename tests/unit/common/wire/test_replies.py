"""Replies pulled from a SuperLink with bounds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import appio_pb2, message_pb2, node_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from support.answers import to
from support.memory import FakeTime

from fedphd.common.wire.grid import StreamingGrid
from fedphd.common.wire.replies import UNREADABLE, GrpcReplies

NUM_VALUES = 3_000_000  # 12 MB: three chunks of Flower's 5 MiB


class Unreadable(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNKNOWN


class FakeStub:
    """A SuperLink's ServerAppIo API: replies are announced, then their objects come."""

    def __init__(self) -> None:
        self.announced: dict[str, tuple[Any, Any]] = {}
        self.objects: dict[str, bytes | None] = {}
        self.pulls: list[str] = []
        self.confirmed: list[str] = []
        # Messages whose replies Flower's servicer fails at, with all that it found beside them.
        self.unreadable: set[str] = set()
        self.looks: list[list[str]] = []

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
        self.looks.append(list(request.message_ids))
        found = [self.announced.pop(i) for i in request.message_ids if i in self.announced]
        if self.unreadable & set(request.message_ids):
            self.unreadable -= set(request.message_ids)
            raise Unreadable
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


def reply(text: str, numel: int = 4, *, asked: Message | None = None) -> Message:
    asked = asked or Message(RecordDict(), 3, "train")
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


def test_a_slow_upload_makes_room_for_a_reply_that_is_there_whole(stub: FakeStub) -> None:
    time, slow = FakeTime(), {}
    for name in "abcd":
        slow[name] = stub.announce(name, reply(name))
        stub.deliver(slow[name][0])
        slow[name] = [(key, stub.contents[key]) for key in slow[name]]
    stub.deliver(*stub.announce("whole", reply("whole")))
    replies, asked = replies_of(stub, time=time), [*"abcd", "whole"]
    assert replies.poll(asked) == []
    time.now_s = 1.1
    [(name, got)] = replies.poll(asked)
    assert (name, text_of(got)) == ("whole", "whole")
    # Who made room comes whole all the same.
    for uploaded in slow.values():
        stub.objects |= dict(uploaded)
    assert sorted(text_of(got) for _, got in replies.poll(list("abcd"))) == list("abcd")  # type: ignore[type-var]


class SlowStub(FakeStub):
    """Half a second passes with each object that is handed out."""

    def __init__(self, time: FakeTime) -> None:
        super().__init__()
        self.time = time

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        response = super().PullObject(request)
        self.time.now_s += 0.5 if response.object_content else 0.0
        return response


def test_replies_that_are_there_whole_do_not_take_one_another_s_room() -> None:
    stub = SlowStub(time := FakeTime())
    names, num_objects = [str(number) for number in range(8)], 0
    for name in names:
        ids = stub.announce(name, reply(name, NUM_VALUES))
        stub.deliver(*ids)
        num_objects += len(ids)
    replies, came = replies_of(stub, time=time), []
    for _ in range(40):
        came += [name for name, _ in replies.poll([n for n in names if n not in came])]
    assert sorted(came) == names
    # Of each the message once more at most, to see that all of it is there.
    assert num_objects < len(stub.pulls) <= num_objects + len(names)


def test_who_has_sent_all_before_the_time_was_over_is_not_late() -> None:
    stub = SlowStub(time := FakeTime())

    class Pushed:
        """What a ``StreamingGrid`` needs of Flower's: messages are asked as "2", "3", ..."""

        def push_messages(self, messages: list[Message]) -> list[str]:
            return [str(message.metadata.dst_node_id) for message in messages]

    replies, asked = replies_of(stub, time=time), to(2, 3, 4, 5)
    grid = StreamingGrid(
        Pushed(),
        replies,
        in_order=True,
        counts=False,
        clock=time.clock,
        sleep=time.sleep,  # type: ignore[arg-type]
    )
    pending = grid.send_and_receive(asked, timeout=600.0)
    for name, message in zip("345", asked[1:], strict=True):
        # The last one's own message never comes; the others' weights are the same as its.
        ids = stub.announce(name, reply(name, NUM_VALUES, asked=message))
        stub.deliver(*(ids if name != "5" else ids[:-1]))
    failed = {r.metadata.src_node_id: r.error.reason for r in pending if r.has_error()}
    assert failed == dict.fromkeys((2, 5), "no reply within 600 s")
    assert time.now_s < 620


def test_what_flower_cannot_read_is_lost_and_costs_the_others_one_look(stub: FakeStub) -> None:
    stub.unreadable = {"bad", "worse"}
    replies = replies_of(stub)
    unreadable = UNREADABLE
    assert replies.poll(["slow", "bad"]) == [], "the look that failed has lost it already"
    stub.deliver(*stub.announce("slow", reply("slow")))
    found = dict(replies.poll(["worse", "slow"]))
    assert found["worse"] == unreadable
    assert text_of(found["slow"]) == "slow"
    assert stub.looks == [["slow", "bad"], ["slow"], ["bad"], ["worse"], ["slow"]]
    stub.unreadable = {"late"}
    assert replies.discard(["late"]) == [("late", False)]
    alone = FakeStub()
    alone.unreadable = {"bad"}
    assert replies_of(alone).poll(["bad"]) == [("bad", unreadable)]


def test_a_superlink_that_is_gone_is_no_lost_reply(stub: FakeStub) -> None:
    stub.unreadable = {"asked"}
    stub_error = Unreadable()
    stub_error.code = lambda: grpc.StatusCode.UNAVAILABLE  # type: ignore[method-assign]

    def gone(request: Any) -> Any:
        raise stub_error

    stub.PullMessages = gone  # type: ignore[method-assign]
    with pytest.raises(grpc.RpcError):
        replies_of(stub).poll(["asked"])


def test_a_reply_may_be_as_large_as_the_weights_and_a_variate(
    stub: FakeStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedphd.common.wire.replies._BESIDE_BYTES", 10_000)
    ids = stub.announce("asked", reply("large", NUM_VALUES))
    stub.deliver(*ids)
    replies = replies_of(stub)
    replies.expect(NUM_VALUES // 2 - 10_000)
    assert replies.poll(["asked"]) == [("asked", "its reply is larger than 12 MB")]
    assert stub.confirmed == [message_id_of(ids)]
    stub.deliver(*stub.announce("asked", reply("fits", NUM_VALUES)))
    replies.expect(NUM_VALUES // 2)
    [(_, got)] = replies.poll(["asked"])
    assert text_of(got) == "fits"


def test_a_reply_of_countless_objects_is_not_pulled(stub: FakeStub) -> None:
    ids = stub.announce("asked", reply("hello"))
    _, tree = stub.announced["asked"]
    parts = [message_pb2.ObjectTree(object_id=str(number)) for number in range(5001)]
    tree.children.extend(parts)
    replies = replies_of(stub)
    assert replies.poll(["asked"]) == [
        ("asked", f"its reply has {5001 + len(ids)} parts; at most 5000 are taken")
    ]
    assert stub.pulls == []
    assert stub.confirmed == [message_id_of(ids)]


def test_of_what_is_not_wanted_yet_only_failures_come(stub: FakeStub) -> None:
    stub.deliver(*stub.announce("first", reply("first")))
    stub.deliver(*stub.announce("second", reply("second")))
    failure = Message(Error(1, "gone"), reply_to=Message(RecordDict(), 3, "train"))
    stub.announce("third", failure)
    replies, asked = replies_of(stub), ["first", "second", "third"]
    found = dict(replies.poll(asked, ["first"]))
    assert found.keys() == {"first", "third"}
    assert isinstance(error := found["third"], Message)
    assert error.error.reason == "gone"
    [(name, got)] = replies.poll(["second"])
    assert (name, text_of(got)) == ("second", "second")
