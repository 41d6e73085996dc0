"""A link that is cut for some seconds costs no work: what was under way arrives afterwards."""

from __future__ import annotations

import time
from pathlib import Path

from support.processes import Processes
from support.relay import Relay
from support.site import Site

RUN = {
    "schedule.intervals": 2,
    "schedule.num_edges": 1,
    "schedule.min_clients": 1,
    # As long as the cloud would wait in vain for an answer that is lost.
    "waits.interval_s": 60.0,
}
# A network of 34 MB as float32: seven objects, of which two travel at a time.
WIDE = {
    "topology": "flat",
    "model.block_out_channels": [112, 224],
    "model.norm_num_groups": 8,
    "model.attention_head_dim": 8,
    "wire.client_down": "fp32",
    "wire.client_up": "fp32",
    "training.local_unit": "steps",
    "training.local_amount": 1,
    "schedule.intervals": 1,
    "schedule.edge_rounds": 1,
    "schedule.min_clients": 1,
    "pruning.mode": "none",
}
WIDE_BYTES, OBJECT_BYTES = 34_000_000, 5 << 20
# Longer than a node keeps looking before it connects anew, shorter than Flower waits for it.
CUT_S = 4.0
# More than a heartbeat or a question for work, less than the announcement of an answer.
ANSWER_BYTES = 1000


def test_an_interval_that_ends_while_the_link_is_cut_is_not_lost(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        site = Site(processes, RUN, edges=("edge-0",))
        with Relay(site.ports["cloud"]) as relay:
            edge = site.start("edge-0", cloud=relay.address)
            site.start("client-0")
            cloud = site.start("cloud")
            edge.wait_line(r"interval +1 round 1")
            relay.cut_before(ANSWER_BYTES)
            # The last one: the answer to the cloud is due.
            edge.wait_line(r"interval +1 round 2")
            assert relay.wait_cut(30.0)
            time.sleep(CUT_S)
            assert not site.events("interval")
            relay.mend()
            cloud.wait_line(r"interval +2 of")
            site.check_end()
            assert relay.num_cut > 0
    assert [event["failures"] for event in site.events("interval")] == [[], []]
    assert [list(event["edges"]) for event in site.events("interval")] == [["edge-0"]] * 2
    assert [(e["interval"], e["edge_round"]) for e in site.rounds("edge-0")] == [
        (1, 1), (1, 2), (2, 1), (2, 2),
    ]  # fmt: skip


def test_an_upload_that_is_cut_goes_on_where_it_was(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        site = Site(processes, WIDE, edges=())
        with Relay(site.ports["cloud"]) as relay:
            relay.cut_after(2 * WIDE_BYTES // 3)
            site.start("cloud")
            site.start("client-0", edges=[relay.address])
            assert relay.wait_cut(60.0)
            time.sleep(CUT_S)
            assert not site.events("interval")
            relay.mend()
            site.check_end()
        [interval] = site.events("interval")
        assert interval["failures"] == [], site.programs["client-0"].text
        assert interval["parameters"] * 4 > 0.9 * WIDE_BYTES
        # All again would be five thirds of it.
        assert relay.sent_bytes < WIDE_BYTES + 2.5 * OBJECT_BYTES
