"""Flower's own ``flower-supernode`` as a client of an edge, among clients of this project."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.federation import FIRST_CLIENT, Federation
from support.federation import TINY as IN_MEMORY
from support.processes import Processes
from support.site import EDGES, NUM_PARTS, Site
from support.tiny import CLASSES_PER_CLIENT, PRUNED_WIDTHS, TINY

from fedphd.common.unet.checkpoint import load_checkpoint
from fedphd.common.unet.layout import TensorLayout

# A stock node takes about 9 s for every message.
pytestmark = pytest.mark.slow

STOCK, RESIDENT = "client-1", "client-0"
# What a federation in memory is told as well, so that the two compare; TOML knows no null.
RUN: dict[str, Any] = {
    **{key: value for key, value in IN_MEMORY.items() if value is not None},
    **TINY,
    "reproducible": True,
    "schedule.intervals": 2,
    "schedule.edge_rounds": 1,
    "schedule.min_clients": 2,
    "pruning.sparse_rounds": 1,
}


@dataclass(frozen=True)
class Outcome:
    """A run with a resident client and a stock node."""

    site: Site
    codes: dict[str, int]
    text: str


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    with Processes(tmp_path_factory.mktemp("stock")) as processes:
        site = Site(processes, RUN)
        edges = {name: site.start(name) for name in EDGES}
        site.start(RESIDENT)
        for edge in edges.values():
            edge.wait_line("listening on")
        stock = site.start_stock(STOCK, "edge-0")
        cloud = site.start("cloud")
        codes = {name: site.programs[name].wait_exit() for name in ("cloud", *EDGES, RESIDENT)}
        # Nobody can tell it that the run is over: it looks for its SuperLink for ever.
        stock.process.send_signal(signal.SIGTERM)
        stock.wait_exit()
        processes.wait_gone()
        yield Outcome(site, codes, cloud.text)


def weights(run_dir: Path) -> torch.Tensor:
    unet = load_checkpoint(run_dir / "checkpoint")[0]
    assert list(unet.config["block_out_channels"]) == PRUNED_WIDTHS
    return TensorLayout.of(unet.state_dict()).pack(unet.state_dict())


def test_the_run_ends_well(outcome: Outcome) -> None:
    assert set(outcome.codes.values()) == {0}, outcome
    assert [event["failures"] for event in outcome.site.events("interval")] == [[], []]


def test_the_stock_node_trains_at_its_only_edge(outcome: Outcome) -> None:
    for event in outcome.site.rounds("edge-0"):
        assert STOCK in event["clients"]
        assert math.isfinite(event["loss"])
    assert all(STOCK not in event["clients"] for event in outcome.site.rounds("edge-1"))


def test_its_moments_survive_between_its_processes(outcome: Outcome, tmp_path: Path) -> None:
    """A client that stays in one process, and reaches the same edge only, gives the same bits."""
    torch.set_num_threads(1)
    federation = Federation(
        tmp_path, RUN, num_clients=2, parts=NUM_PARTS, classes=CLASSES_PER_CLIENT
    )
    federation.clients[1].board.set_connected(federation.addresses[1], False)
    del federation.edge_grids[1].nodes[FIRST_CLIENT + 1]
    assert federation.run().exit_code == 0
    assert torch.equal(weights(outcome.site.run_dir), weights(federation.run_dir))
