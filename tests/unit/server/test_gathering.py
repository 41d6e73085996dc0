"""For how long participants are waited for at the start."""

from __future__ import annotations

import pytest

from fedphd.common.config.waits import WaitConfig
from fedphd.common.history.progress import Reported
from fedphd.common.history.summary import IntervalCosts
from fedphd.common.unet.costs import Costs
from fedphd.server.gathering import Wait, start_wait

COSTS = Costs(parameters=1, macs=1, encoder_macs=1)
OF_PAST = "3 intervals as they were so far"


def after(intervals: int, seconds: float) -> Reported:
    row = IntervalCosts(
        interval=1, client_rounds=1, client_edge_bytes=1, edge_cloud_bytes=1, images=1,
        training_flops=1,
    )  # fmt: skip
    return Reported(dense=COSTS, costs=COSTS, intervals_s=seconds, rounds=[row] * intervals)


@pytest.mark.parametrize(
    ("so_far", "resumed", "wait"),
    [
        (after(2, 1000.0), False, Wait(300.0, "waits.start_s")),
        (after(2, 1000.0), True, Wait(1500.0, OF_PAST)),
        (after(2, 100.0), True, Wait(300.0, "waits.start_s")),
        (after(2, 9000.0), True, Wait(7200.0, "waits.interval_s")),
        (after(0, 0.0), True, Wait(300.0, "waits.start_s")),
    ],
)
def test_a_run_that_goes_on_waits_for_those_at_work(
    so_far: Reported, resumed: bool, wait: Wait
) -> None:
    assert start_wait(WaitConfig(), so_far, resumed=resumed) == wait
