"""How long an exchange waits: time-outs, quorums, windows, and what comes too late."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
from flwr.app import Message, RecordDict
from support.answers import answer_later, echo, failing, silent, sources, to
from support.memory import FakeTime, MemoryGrid, streaming

from fedphd.common.wire.exchange import Quorum
from fedphd.common.wire.failures import kind_of
from fedphd.common.wire.grid import PlainReplies, StreamingGrid


def test_lost_replies_say_why_and_are_forgotten_when_late() -> None:
    class Lossy(PlainReplies):
        forgotten: list[str] = []  # noqa: RUF012 - one per test

        def poll(
            self, message_ids: list[str], wanted: Collection[str] | None = None
        ) -> list[tuple[str, Message | str]]:
            return [(i, "its upload stalled") for i in message_ids if i == first]

        def forget(self, message_id: str) -> None:
            self.forgotten.append(message_id)

    memory, time = MemoryGrid({2: silent, 3: silent}), FakeTime()
    replies = Lossy(memory)
    grid = StreamingGrid(memory, replies, clock=time.clock, sleep=time.sleep)
    pending = grid.send_and_receive(to(2, 3), timeout=1.0)
    first, second = (message.metadata.message_id for message in memory.pushed)
    failed = [r.error for r in pending]
    assert [error.reason for error in failed] == ["its upload stalled", "no reply within 1 s"]
    assert [kind_of(error) for error in failed] == ["lost", "late"]
    assert replies.forgotten == [second]


def test_in_order_a_failure_of_another_is_known_early_and_told_in_its_turn() -> None:
    class Gone(PlainReplies):
        """A node is gone while the first one works, and back before that one is done."""

        def poll(
            self, message_ids: list[str], wanted: Collection[str] | None = None
        ) -> list[tuple[str, Message | str]]:
            gone = [(second, "gone")] if 1.0 <= time.now_s < 2.0 and second in message_ids else []
            return [*super().poll(message_ids, wanted), *gone]

    memory = MemoryGrid({2: silent, 3: silent})
    time = FakeTime({5.0: answer_later(memory, 2)})
    grid = StreamingGrid(memory, Gone(memory), in_order=True, clock=time.clock, sleep=time.sleep)
    pending = grid.send_and_receive(to(2, 3), timeout=100.0)
    second = memory.pushed[1].metadata.message_id
    first, gone = pending
    assert (first.metadata.src_node_id, first.has_error()) == (2, False)
    assert (gone.metadata.src_node_id, gone.error.reason) == (3, "gone")
    assert time.now_s == pytest.approx(5.0, abs=0.3)


def test_nobody_waits_any_more_for_what_a_failed_exchange_has_asked() -> None:
    memory, time = MemoryGrid({2: echo, 3: silent, 4: echo}), FakeTime()
    grid = streaming(memory, time=time)
    exchange = grid.send_and_receive(to(2, 3, 4), timeout=9.0)
    next(exchange)
    exchange.close()
    time.sleep(1.0)
    # The third has answered, the second is yet to.
    assert [late.message.metadata.dst_node_id for late in grid.late_replies()] == [4]
    answer_later(memory, 3)()
    assert [late.message.metadata.dst_node_id for late in grid.late_replies()] == [3]
    assert grid.late_replies() == []


class Queue(PlainReplies):
    """A message waits for 50 s in this process, and is answered 9 s later."""

    begun_s = 50.0

    def has_begun(self, message_id: str) -> bool:
        return self.clock() >= self.begun_s

    clock: Callable[[], float]


def test_time_counts_from_when_a_message_leaves_this_process() -> None:
    memory = MemoryGrid({2: silent, 3: silent})
    time, replies = FakeTime({59.0: answer_later(memory, 2)}), Queue(memory)
    replies.clock = time.clock
    grid = StreamingGrid(memory, replies, clock=time.clock, sleep=time.sleep)
    first, second = grid.send_and_receive(to(2, 3), timeout=10.0)
    assert not first.has_error()
    assert second.error.reason == "no reply within 10 s"
    assert time.now_s == pytest.approx(60.0, abs=1.5)


def test_a_quorum_cuts_off_what_waits_in_this_process() -> None:
    memory = MemoryGrid({2: silent, 3: silent})
    time, replies = FakeTime({1.0: answer_later(memory, 2)}), Queue(memory)
    replies.clock = time.clock
    grid = StreamingGrid(memory, replies, clock=time.clock, sleep=time.sleep)
    grid.configure(in_order=False, upload_stall_s=1.0, quorums={"train": Quorum(0.5, 4.0)})
    replied = list(grid.send_and_receive(to(2, 3), timeout=10.0))
    assert [r.has_error() for r in replied] == [False, True]
    assert time.now_s == pytest.approx(5.0, abs=0.5)


Quorate = tuple[StreamingGrid, MemoryGrid, FakeTime]


@pytest.fixture
def quorate() -> Quorate:
    """Five nodes, of which 60% have answered after 2 s, and a fourth after 15 s."""
    memory = MemoryGrid({n: silent for n in (2, 3, 4, 5, 6)})
    time = FakeTime()
    for due_s, node_id in ((1.0, 2), (1.5, 3), (2.0, 4), (15.0, 5)):
        time.at(due_s, answer_later(memory, node_id))
    grid = streaming(memory, time=time, in_order=False)
    grid.configure(
        in_order=False, upload_stall_s=1.0, quorums={"train": Quorum(share=0.6, grace_s=10.0)}
    )
    return grid, memory, time


def test_once_enough_have_answered_the_others_have_little_time(quorate: Quorate) -> None:
    grid, _, time = quorate
    replies = list(grid.send_and_receive(to(2, 3, 4, 5, 6), timeout=100.0))
    assert sources([r for r in replies if not r.has_error()]) == [2, 3, 4]
    late = [r for r in replies if r.has_error()]
    assert [r.error.reason for r in late] == ["no reply within 10 s after 3 of 5 had answered"] * 2
    assert [kind_of(r.error) for r in late] == ["straggler"] * 2
    assert time.now_s == pytest.approx(12.0, abs=0.6)


def test_a_late_reply_is_told_once_and_dropped(quorate: Quorate) -> None:
    grid, memory, time = quorate
    list(grid.send_and_receive(to(2, 3, 4, 5, 6), timeout=100.0))
    received = grid.traffic.received_bytes
    assert grid.late_replies() == []
    time.sleep(16.0 - time.now_s)
    [late] = grid.late_replies()
    assert late.message.metadata.dst_node_id == 5
    assert late.late_s == pytest.approx(4.0, abs=0.6)
    assert grid.late_replies() == []
    assert list(memory.pull_messages([m.metadata.message_id for m in memory.pushed])) == []
    assert grid.traffic.received_bytes == received


def test_a_quorum_is_of_its_type_and_errors_do_not_count(quorate: Quorate) -> None:
    grid, memory, time = quorate
    memory.nodes[6] = memory.nodes[2] = failing
    # Two of five have answered, which is no quorum: so the usual time holds.
    replies = list(grid.send_and_receive(to(2, 3, 4, 5, 6), timeout=14.0))
    reasons = [r.error.reason for r in replies if r.has_error()]
    assert reasons.count("no reply within 14 s") == 1
    assert time.now_s == pytest.approx(14.0, abs=0.6)
    questions = [Message(RecordDict(), n, "query") for n in (7, 8, 9)]
    memory.nodes |= {7: echo, 8: echo, 9: silent}
    replies = list(grid.send_and_receive(questions, timeout=40.0))
    assert [r.error.reason for r in replies if r.has_error()] == ["no reply within 40 s"]


@pytest.mark.parametrize(("share", "needed"), [(0.7, 7), (0.71, 8), (0.05, 1)])
def test_a_quorum_is_rounded_up(share: float, needed: int) -> None:
    memory, time = MemoryGrid({n: silent for n in range(2, 12)}), FakeTime()
    for n in range(2, 12):
        time.at(float(n), answer_later(memory, n))
    grid = streaming(memory, time=time, in_order=False)
    quorums = {"train": Quorum(share, grace_s=0.2)}
    grid.configure(in_order=False, upload_stall_s=1.0, quorums=quorums)
    replies = list(grid.send_and_receive(to(*range(2, 12)), timeout=100.0))
    assert len([r for r in replies if not r.has_error()]) == needed


def test_no_more_messages_are_under_way_than_the_window_holds() -> None:
    memory = MemoryGrid({n: silent for n in (2, 3, 4, 5)})
    at = {0.5: answer_later(memory, 3), 1.0: answer_later(memory, 2)}
    time = FakeTime({**at, 2.0: answer_later(memory, 5), 3.0: answer_later(memory, 4)})
    grid = StreamingGrid(
        memory, PlainReplies(memory), windows={"train": 2, "query": 1},
        clock=time.clock, sleep=time.sleep,
    )  # fmt: skip
    replies = grid.send_and_receive(to(2, 3, 4, 5), timeout=1.9)
    assert len(memory.pushed) == 2
    sent_after = [(next(replies).metadata.src_node_id, len(memory.pushed)) for _ in range(2)]
    # The next one is on its way before the reply is worked on.
    assert sent_after == [(3, 3), (2, 4)]
    # Sent at 0.5 s it would be late at 2.4 s; sent at 1.0 s it has until 2.9 s.
    last = list(replies)
    assert [(r.metadata.src_node_id, r.has_error()) for r in last] == [(5, False), (4, True)]


@pytest.mark.parametrize("in_order", [False, True])
def test_a_window_loses_no_message(in_order: bool) -> None:
    nodes = {2: echo, 3: failing, 4: silent, 5: echo, 6: silent, 7: echo}
    memory, time = MemoryGrid(dict(nodes)), FakeTime()
    memory.refused = {5}
    grid = StreamingGrid(
        memory, PlainReplies(memory), in_order=in_order, windows={"train": 1},
        clock=time.clock, sleep=time.sleep,
    )  # fmt: skip
    replies = list(grid.send_and_receive(to(*nodes), timeout=1.0))
    assert sources(replies) == [2, 3, 4, 5, 6, 7]
    assert sources([r for r in replies if not r.has_error()]) == [2, 7]
