"""SCAFFOLD's server variate and partial exchange at an edge, with scripted clients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from flwr.app import Array
from support.memory import MemoryGrid, streaming
from support.peers import FakeClient, interval_task, plan

from fedphd.common.config.run import FederationConfig
from fedphd.common.errors import ReplyError
from fedphd.common.rng import sample_participants
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.messages import IntervalReply, UNetSpec
from fedphd.common.wire.records import read_array, to_array
from fedphd.common.wire.roster import Roster
from fedphd.edge.averaging import PartAverage, ServerVariate
from fedphd.edge.interval import run_interval
from fedphd.edge.link import CloudLink

START = torch.tensor([10.0, 20.0, 30.0])
# Diffusers lists the middle block after the up blocks, so the parts are not in one piece each.
UNET = TensorLayout(
    ("conv_in.weight", "down_blocks.0.bias", "up_blocks.0.bias", "mid_block.bias", "conv_out.bias"),
    ((2,), (), (), (), ()),
)
PIECES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
SCAFFOLD = {"method": "scaffold"}


def interval(
    clients: Iterable[FakeClient],
    config: FederationConfig,
    weights: torch.Tensor = START,
    variate: torch.Tensor | None = None,
    **task: Any,
) -> tuple[IntervalReply, torch.Tensor, torch.Tensor | None]:
    grid = streaming(MemoryGrid(dict(enumerate(clients, start=2))))
    roster = Roster(
        grid, asking="edge-0", kind="client", hello_s=1.0, retry_s=60.0, max_samples=1000
    )
    reply, array, change = run_interval(
        interval_task(config, **task), Array(weights.numpy()), variate, edge_id="edge-0",
        link=CloudLink("edge-0"), grid=grid, roster=roster, on_round=lambda strategy, stats: None,
    )  # fmt: skip
    return reply, read_array(to_array(array)), change


def travelling(layout: TensorLayout) -> dict[str, UNetSpec]:
    return {"network": UNetSpec(unet={"kind": "tiny"}, layout=layout.to_json())}


def test_variate_moves_by_the_changes_over_all_clients() -> None:
    first = FakeClient("a", (10, 0), change=torch.tensor([4.0, 0.0, 8.0]))
    second = FakeClient("b", (0, 30), change=torch.tensor([4.0, 2.0, 0.0]))
    config = plan(objective=SCAFFOLD, schedule={"edge_rounds": 2})
    _, _, change = interval(
        [first, second], config, variate=torch.tensor([1.0, 1.0, 1.0]), num_clients=8
    )
    # A round adds (8, 2, 8) / 8, whatever the clients' numbers of images.
    assert change is not None
    assert change.tolist() == [2.0, 0.5, 2.0]
    for client in (first, second):
        assert client.variates == [[1.0, 1.0, 1.0], [2.0, 1.25, 2.0]]


def test_other_methods_have_no_variate() -> None:
    client = FakeClient("a")
    _, _, change = interval([client], plan(objective={"method": "fedprox", "proximal_mu": 0.5}))
    assert change is None
    assert client.tasks[0].objective.proximal_mu == 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "carries no control variate"),
        (torch.zeros(2), "control variate: got 2 values; the network has 3"),
        (torch.tensor([0.0, 0.0, math.nan]), "control variate: tensor b holds nan"),
        (torch.zeros(3, dtype=torch.float64), "control variate: expected a flat float32 array"),
    ],
)
def test_bad_change_leaves_out_its_client(change: torch.Tensor | None, reason: str) -> None:
    bad = FakeClient("bad", (10, 0), step=100.0, change=change)
    good = FakeClient("good", (10, 0), step=1.0, change=torch.ones(3))
    config = plan(objective=SCAFFOLD)
    reply, weights, total = interval([bad, good], config, variate=torch.zeros(3))
    assert reply.failures[0].startswith(f"bad: {reason}")
    assert weights.tolist() == [11.0, 21.0, 31.0]
    assert total is not None
    assert total.tolist() == [0.5, 0.5, 0.5]


def test_a_newcomers_whole_variate_counts_among_small_changes() -> None:
    # This edge comes to a run in which the clients' variates are near 1 already.
    old = [FakeClient(name, (10, 0), change=torch.full((3,), 0.01)) for name in "abc"]
    new = FakeClient("new", (10, 0), change=torch.ones(3))
    bad = FakeClient("bad", (10, 0), change=torch.full((3,), 11.0))
    reply, _, total = interval(
        [*old, new, bad], plan(objective=SCAFFOLD), variate=torch.ones(3), num_clients=5
    )
    assert [failure.split(",")[0] for failure in reply.failures] == [
        "bad: its change of the control variate has the norm 19.05"
    ]
    assert total is not None
    assert total.tolist() == pytest.approx([1.03 / 5] * 3)


def test_variate_of_the_cloud_is_checked() -> None:
    with pytest.raises(ReplyError, match="control variate: tensor a holds inf"):
        interval([], plan(objective=SCAFFOLD), variate=torch.tensor([math.inf, 0.0, 0.0]))


def test_variate_by_hand() -> None:
    variate = ServerVariate(torch.tensor([1.0, 2.0]), 4)
    variate.add(torch.tensor([2.0, -4.0]))
    assert variate.change.tolist() == [0.5, -1.0]
    assert variate.current.tolist() == [1.5, 1.0]


def test_parts_are_averaged_over_those_who_sent_them() -> None:
    average = PartAverage(UNET, (("encoder",), ("bottleneck", "decoder")))
    average.add(0, torch.tensor([10.0, 20.0, 30.0]), 1.0)
    average.add(0, torch.tensor([50.0, 60.0, 70.0]), 3.0)
    weights, came = average.applied_to(PIECES)
    # (10 + 3 * 50) / 4 and so on; the rest stays.
    assert weights.tolist() == [40.0, 50.0, 60.0, 4.0, 5.0, 6.0]
    assert came == {0}
    # Nothing of the first sum is left in the next.
    average.add(0, torch.tensor([1.0, 1.0, 1.0]), 1.0)
    average.add(1, torch.tensor([7.0, 8.0, 9.0]), 2.0)
    weights, came = average.applied_to(PIECES)
    assert weights.tolist() == [1.0, 1.0, 1.0, 7.0, 8.0, 9.0]
    assert came == {0, 1}
    assert PIECES.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def usplit(**schedule: Any) -> FederationConfig:
    return plan(exchange={"parts": "usplit"}, schedule=schedule)


def test_usplit_assigns_the_halves_in_turn() -> None:
    clients = {name: FakeClient(name, step=10.0 ** (n + 1)) for n, name in enumerate("abc")}
    reply, weights, _ = interval(
        clients.values(), usplit(edge_rounds=2), PIECES, **travelling(UNET)
    )
    for edge_round in (1, 2):
        order = sample_participants("abc", fraction=1.0, seed=0, interval=1, edge_round=edge_round)
        sent = [clients[name].tasks[edge_round - 1].send for name in order]
        halves = [("encoder",), ("bottleneck", "decoder")]
        assert sent == [halves[(edge_round + place) % 2] for place in range(3)]
    for task in clients["a"].tasks:
        assert task.parts == ("encoder", "bottleneck", "decoder")
        assert task.initial is None, "all parts come, there is nothing to start afresh"
    assert reply.parts == ("encoder", "bottleneck", "decoder")
    # All of an encoder, and all of the rest, moved by one mean step each round.
    moved = (weights - PIECES).tolist()
    assert len(set(moved[:3])) == len(set(moved[3:])) == 1
    assert moved[0] != moved[5]


def test_client_alone_sends_one_half_per_round() -> None:
    client = FakeClient("a", step=1.0)
    reply, weights, _ = interval([client], usplit(edge_rounds=3), PIECES, **travelling(UNET))
    assert [task.send for task in client.tasks] == [
        ("bottleneck", "decoder"), ("encoder",), ("bottleneck", "decoder"),
    ]  # fmt: skip
    assert (weights - PIECES).tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert reply.network.tensor_layout() == UNET


def test_edge_sends_only_the_parts_that_somebody_trained() -> None:
    reply, weights, _ = interval(
        [FakeClient("a", step=1.0)], usplit(edge_rounds=1), PIECES, **travelling(UNET)
    )
    assert reply.parts == ("bottleneck", "decoder")
    assert weights.tolist() == [5.0, 6.0, 7.0]
    assert reply.network.tensor_layout().names == UNET.names[2:]


def test_half_of_the_other_kind_is_refused() -> None:
    wrong = FakeClient("a", reply=travelling(UNET))
    reply, weights, _ = interval([wrong], usplit(edge_rounds=1), PIECES, **travelling(UNET))
    assert reply.failures == ("a: tensor conv_in.weight is unexpected",)
    # Nobody trained: the cloud's own, whole.
    assert weights.tolist() == PIECES.tolist()
    assert reply.parts == ("encoder", "bottleneck", "decoder")


def test_udec_moves_the_decoder_only() -> None:
    decoder = TensorLayout(("up_blocks.0.bias", "conv_out.bias"), ((), ()))
    client = FakeClient("a", step=1.0)
    reply, weights, _ = interval(
        [client], plan(exchange={"parts": "udec"}), torch.tensor([4.0, 6.0]), **travelling(decoder)
    )
    assert weights.tolist() == [5.0, 7.0]
    assert reply.parts == ("decoder",)
    [task] = client.tasks
    assert (task.parts, task.send) == (("decoder",), ("decoder",))
    assert task.initial == plan().model
