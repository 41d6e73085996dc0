"""The streaming grid: one reply per message, each bounded, as they come, and every byte counted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from weakref import ref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from support.answers import answer_later, echo, failing, silent, sources, to
from support.memory import RUN_ID, FakeTime, MemoryGrid, streaming

from fedphd.common.wire.failures import kind_of
from fedphd.common.wire.grid import PlainReplies, StreamingGrid, streaming_grid
from fedphd.common.wire.traffic import Traffic


@pytest.mark.parametrize("in_order", [False, True])
def test_exactly_one_reply_per_message(in_order: bool) -> None:
    nodes = {2: echo, 3: failing, 4: silent, 5: echo}
    time = FakeTime()
    grid = streaming(MemoryGrid(dict(nodes)), time=time, in_order=in_order)
    # Twice to the same node, and once to one that is not there at all.
    replies = list(grid.send_and_receive(to(2, 3, 4, 5, 2, 6), timeout=1.0))
    assert sorted(sources(replies)) == [2, 2, 3, 4, 5, 6]
    assert sorted(sources([r for r in replies if r.has_error()])) == [3, 4, 6]


@pytest.mark.parametrize("in_order", [False, True])
def test_a_reply_that_was_worked_on_is_kept_by_nobody(in_order: bool) -> None:
    memory = MemoryGrid({number: echo for number in range(2, 6)})
    grid = StreamingGrid(memory, PlainReplies(memory), in_order=in_order)
    replies = grid.send_and_receive(to(2, 3, 4, 5), timeout=1.0)
    done = []
    for _ in range(4):
        done.append(ref(next(replies)))
        assert [one() for one in done] == [None] * len(done)


def test_no_messages_no_replies() -> None:
    assert list(streaming(MemoryGrid({2: echo})).send_and_receive([], timeout=1.0)) == []


def test_messages_are_sent_at_once_but_replies_come_lazily() -> None:
    memory = MemoryGrid({2: silent, 3: silent})
    time = FakeTime({0.5: answer_later(memory, 3), 2.0: answer_later(memory, 2)})
    replies = streaming(memory, time=time, in_order=False).send_and_receive(to(2, 3), timeout=9.0)
    assert len(memory.pushed) == 2
    assert time.now_s == 0.0
    assert next(replies).metadata.src_node_id == 3
    assert 0.5 <= time.now_s < 0.8, "waited for the other reply, too"
    assert next(replies).metadata.src_node_id == 2
    assert 2.0 <= time.now_s < 2.3


def test_waits_grow_with_the_time_waited_and_begin_anew_after_a_reply() -> None:
    memory = MemoryGrid({2: silent, 3: silent})
    time = FakeTime({10.0: answer_later(memory, 2)})
    list(streaming(memory, time=time, in_order=False).send_and_receive(to(2, 3), timeout=11))
    before_s, waited_s = 0.0, []
    for slept_s in time.slept_s:
        waited_s.append((before_s, slept_s))
        before_s += slept_s
    assert time.slept_s[:5] == pytest.approx([0.02, 0.02, 0.02, 0.03, 0.045])
    assert {slept_s for before_s, slept_s in waited_s if 0.2 < before_s < 5.0} == {0.1}
    # 2% of the time waited.
    last_s, last = next(pair for pair in waited_s if pair[0] > 9.5)
    assert last == pytest.approx(0.02 * last_s)
    assert next(slept_s for before_s, slept_s in waited_s if before_s >= 10.0) == 0.02


def test_time_out_is_an_error_reply_of_the_asked_node() -> None:
    time = FakeTime()
    grid = streaming(MemoryGrid({2: echo, 3: silent}), time=time, in_order=False)
    first, late = grid.send_and_receive(to(2, 3), timeout=2.5)
    assert not first.has_error()
    assert late.error.reason == "no reply within 2.5 s"
    assert kind_of(late.error) == "late"
    assert late.metadata.src_node_id == 3
    assert 2.5 <= time.now_s <= 2.75 + 1e-9


def test_reply_after_the_time_out_is_not_yielded() -> None:
    memory = MemoryGrid({2: silent})
    time = FakeTime({3.0: answer_later(memory, 2)})
    grid = streaming(memory, time=time)
    assert [r.has_error() for r in grid.send_and_receive(to(2), timeout=1.0)] == [True]


def test_time_spent_on_a_reply_does_not_cost_the_others() -> None:
    time = FakeTime()
    grid = streaming(MemoryGrid({2: echo, 3: echo}), time=time, in_order=False)
    replies = []
    for reply in grid.send_and_receive(to(2, 3), timeout=1.0):
        time.now_s += 5.0
        replies.append(reply)
    assert [reply.has_error() for reply in replies] == [False, False]


def test_error_of_a_node_keeps_code_and_reason() -> None:
    def refuses(message: Message) -> Message:
        reply = Message(Error(203, "out of memory"), reply_to=message)
        # Flower's own error replies come from the SuperLink.
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    [reply] = streaming(MemoryGrid({7: refuses})).send_and_receive(to(7), timeout=1.0)
    assert (reply.error.code, reply.error.reason) == (203, "out of memory")
    assert kind_of(reply.error) == "error"
    assert reply.metadata.src_node_id == 7


def test_node_that_is_gone_is_said_shortly() -> None:
    def gone(message: Message) -> Message:
        return Message(Error(ErrorCode.NODE_UNAVAILABLE, "Error: a long text"), reply_to=message)

    [reply] = streaming(MemoryGrid({7: gone})).send_and_receive(to(7), timeout=1.0)
    reason = "no heartbeat from it: its process or its network is gone"
    assert (reply.error.code, reply.error.reason) == (ErrorCode.NODE_UNAVAILABLE, reason)
    assert kind_of(reply.error) == "gone"


def test_exception_of_a_node_is_its_reason() -> None:
    [reply] = streaming(MemoryGrid({7: failing})).send_and_receive(to(7), timeout=1.0)
    assert reply.error.reason == "ValueError: no data"


def test_reply_in_another_nodes_name_is_an_error_of_the_asked_one() -> None:
    def pretends(message: Message) -> Message:
        reply = echo(message)
        reply.metadata.__dict__["_src_node_id"] = 3
        return reply

    grid = streaming(MemoryGrid({2: pretends, 3: echo}))
    first, second = grid.send_and_receive(to(2, 3), timeout=1.0)
    assert first.error.reason == "its reply names node 3 as its source"
    assert kind_of(first.error) == "malformed"
    assert first.metadata.src_node_id == 2
    assert not second.has_error()


def test_in_order_yields_in_the_order_of_the_messages() -> None:
    memory = MemoryGrid({2: silent, 3: echo, 4: silent})
    time = FakeTime({0.5: answer_later(memory, 4), 1.0: answer_later(memory, 2)})
    replies = list(streaming(memory, time=time, in_order=True).send_and_receive(to(2, 3, 4)))
    assert sources(replies) == [2, 3, 4]
    time = FakeTime({0.5: answer_later(memory, 4), 1.0: answer_later(memory, 2)})
    memory.pushed.clear()
    replies = list(streaming(memory, time=time, in_order=False).send_and_receive(to(2, 3, 4)))
    assert sources(replies) == [3, 4, 2]


@pytest.mark.parametrize(
    ("as_set", "asked", "expected"),
    [
        (False, None, [3, 2]),
        (False, True, [2, 3]),
        (True, None, [2, 3]),
        (True, False, [3, 2]),
    ],
)
def test_a_call_may_ask_for_another_order_than_the_grid_is_set_to(
    as_set: bool, asked: bool | None, expected: list[int]
) -> None:
    memory = MemoryGrid({2: silent, 3: echo})
    time = FakeTime({0.5: answer_later(memory, 2)})
    grid = streaming(memory, time=time, in_order=as_set)
    assert sources(list(grid.send_and_receive(to(2, 3), in_order=asked))) == expected
    assert grid.in_order is as_set


def test_in_order_a_late_first_one_does_not_cost_the_others() -> None:
    grid = streaming(MemoryGrid({2: silent, 3: echo, 4: silent}), time=FakeTime(), in_order=True)
    replies = list(grid.send_and_receive(to(2, 3, 4), timeout=1.0))
    assert sources(replies) == [2, 3, 4]
    assert [reply.has_error() for reply in replies] == [True, False, True]


def test_refused_messages_are_errors_and_cost_no_wait() -> None:
    memory = MemoryGrid({2: echo, 3: echo, 4: echo})
    memory.refused = {2, 4}
    time = FakeTime()
    replies = list(streaming(memory, time=time, in_order=False).send_and_receive(to(2, 3, 4)))
    by_source = {reply.metadata.src_node_id: reply for reply in replies}
    assert not by_source[3].has_error()
    assert by_source[2].error.reason == "its SuperLink refused the message"
    assert by_source[4].error.reason == "its SuperLink refused the message"
    assert time.now_s == 0.0


def test_refused_messages_are_not_counted() -> None:
    memory = MemoryGrid({2: echo})
    memory.refused = {2}
    grid = streaming(memory)
    list(grid.send_and_receive([weighty(2, 1000)]))
    assert grid.traffic == Traffic()


@pytest.mark.parametrize("in_order", [False, True])
def test_push_that_returns_no_ids_refuses_all(in_order: bool) -> None:
    class Full(MemoryGrid):
        def push_messages(self, messages: object) -> list[str]:
            return []  # Flower's answer to RESOURCE_EXHAUSTED

    grid = streaming(Full({2: echo, 3: echo}), time=FakeTime(), in_order=in_order)
    replies = list(grid.send_and_receive(to(2, 3), timeout=60.0))
    assert sources(replies) == [2, 3]
    assert {r.error.reason for r in replies} == {"its SuperLink refused the message"}


def test_more_messages_than_fit_one_push() -> None:
    memory = MemoryGrid({n: echo for n in range(2, 72)})
    made: list[int] = []

    def messages() -> object:
        for node_id in range(2, 72):
            made.append(node_id)
            # Those of earlier batches are on their way before the last ones are made.
            assert len(memory.pushed) >= (len(made) - 1) // 32 * 32
            yield from to(node_id)

    replies = list(streaming(memory).send_and_receive(messages()))  # type: ignore[arg-type]
    assert sources(replies) == list(range(2, 72))


def test_what_stays_in_the_process_is_neither_counted_nor_hashed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = MemoryGrid({2: echo})
    counting = StreamingGrid(memory, PlainReplies(memory))
    list(counting.send_and_receive([weighty(2, 1000)]))
    assert counting.traffic.sent_bytes > 1000
    monkeypatch.setattr("fedphd.common.wire.internals.hashlib", None)
    grid = StreamingGrid(memory, PlainReplies(memory), counts=False)
    assert sources(list(grid.send_and_receive([weighty(2, 1000)]))) == [2]
    assert grid.traffic == Traffic()


def test_messages_that_take_their_time_are_sent_one_by_one() -> None:
    memory = MemoryGrid({2: echo, 3: echo})
    grid = streaming(memory)

    def messages() -> Iterator[Message]:
        yield from to(2)
        assert [m.metadata.dst_node_id for m in memory.pushed] == [2]
        # The same grid is used to find out what the next one is.
        assert sources(list(grid.send_and_receive(to(3)))) == [3]
        yield from to(3)

    assert sources(list(grid.send_and_receive(messages()))) == [2, 3]


def test_who_was_sent_a_message_is_given_up_where_the_next_one_cannot_be_made() -> None:
    memory = MemoryGrid({2: echo})
    grid = streaming(memory)

    def messages() -> Iterator[Message]:
        yield from to(2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        grid.send_and_receive(messages())
    # Its reply is freed, not kept for nobody.
    [late] = grid.late_replies()
    assert late.message.metadata.dst_node_id == 2


@pytest.mark.parametrize(
    ("timeout", "ttl"), [(60.0, 12 * 3600), (86400.0, 25 * 3600), (None, 12 * 3600)]
)
def test_a_message_is_kept_as_long_as_its_reply_may_take(timeout: float | None, ttl: float) -> None:
    grid = streaming(memory := MemoryGrid({2: echo}))
    assert len(list(grid.send_and_receive(to(2), timeout=timeout))) == 1
    assert memory.pushed[0].metadata.ttl == ttl


def object_sizes(message: Message) -> dict[str, int]:
    """Serialised bytes of everything that a message of ``weighty`` consists of."""
    records = message.content
    [config] = records.config_records.values()
    [arrays] = records.array_records.values()
    [array] = arrays.values()
    chunks = [chunk for _, chunk in array.slice_array()]
    parts = [message, records, config, arrays, array, *chunks]
    return {part.object_id: len(part.deflate()) for part in parts}


def weighty(node_id: int, numel: int) -> Message:
    arrays = ArrayRecord({"w": Array(np.arange(numel, dtype=np.float32))})
    records = RecordDict({"c": ConfigRecord({"n": 3}), "a": arrays})
    return Message(records, node_id, "train")


def test_traffic_is_the_serialised_size_of_each_message() -> None:
    grid = streaming(MemoryGrid({2: echo, 3: echo}))
    messages = [weighty(2, 1000), weighty(3, 1000)]
    replies = list(grid.send_and_receive(messages))
    sent = sum(sum(object_sizes(message).values()) for message in messages)
    received = sum(sum(object_sizes(reply).values()) for reply in replies)
    assert grid.traffic == Traffic(sent_bytes=sent, received_bytes=received)
    # Two messages of 4 bytes per value, and the rest is small.
    assert 8000 < sent < 8000 + 2500


def test_traffic_does_not_count_what_came_too_late_and_counts_both_of_the_same() -> None:
    one = streaming(MemoryGrid({2: echo}))
    list(one.send_and_receive([weighty(2, 5000)]))
    shared = weighty(2, 5000).content
    both = streaming(MemoryGrid({2: echo, 3: silent}), time=FakeTime())
    list(both.send_and_receive([Message(shared, n, "train") for n in (2, 3)], timeout=1.0))
    assert both.traffic.sent_bytes == pytest.approx(2 * one.traffic.sent_bytes, abs=4)
    assert both.traffic.received_bytes == pytest.approx(one.traffic.received_bytes, abs=4)


def test_what_a_plan_brings_is_passed_on() -> None:
    memory = MemoryGrid({2: echo})
    replies = PlainReplies(memory)
    grid = StreamingGrid(memory, replies)
    grid.configure(in_order=True, upload_stall_s=3.0)
    assert (grid.in_order, replies.stall_s) == (True, 3.0)
    assert grid.run.run_id == RUN_ID
    assert list(grid.get_node_ids()) == [2]


def test_grid_without_grpc_gets_plain_replies() -> None:
    grid = streaming_grid(MemoryGrid({2: echo}), upload_stall_s=1.0, in_order=False)
    [reply] = grid.send_and_receive(to(2), timeout=1.0)
    assert not reply.has_error()
    ids = list(grid.push_messages(to(2)))
    assert sources(list(grid.pull_messages(ids))) == [2]


def test_replies_of_threads_all_arrive() -> None:
    memory = MemoryGrid({n: partial(echo) for n in range(2, 12)}, threaded=True)
    replies = list(streaming(memory, in_order=False).send_and_receive(to(*range(2, 12))))
    assert sorted(sources(replies)) == list(range(2, 12))
