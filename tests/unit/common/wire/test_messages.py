"""What a message's figures can do."""

from __future__ import annotations

from fedphd.common.wire.traffic import Traffic


def test_traffic_adds_and_subtracts() -> None:
    first, second = Traffic(sent_bytes=5, received_bytes=7), Traffic(sent_bytes=1, received_bytes=2)
    assert first + second == Traffic(sent_bytes=6, received_bytes=9)
    assert (first + second).minus(first) == second
    assert first.total_bytes == 12
