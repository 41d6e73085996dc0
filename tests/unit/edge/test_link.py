"""What an edge keeps of its link to the cloud: weights to build on, and what rounding has left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.peers import LAYOUT, NETWORK, interval_task, plan

from fedphd.common.errors import FedPhDError, ReplyError
from fedphd.common.stores import FileStore
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.parts import PARTS, PartSubset
from fedphd.common.wire.codecs import Codec, digest_of
from fedphd.common.wire.messages import IntervalTask, UNetSpec
from fedphd.common.wire.records import to_array
from fedphd.edge.link import WEIGHTS, CloudLink

CONFIG = plan(wire={"cloud_down": "bf16", "cloud_up": "int4"})
WHOLE = PartSubset(TensorLayout(("w",), ((2, 2),)), PARTS)
INT4 = Codec("int4", WHOLE.layout)
FIRST, MOVED = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([1.0, 2.0, 4.0])


def task(
    weights: torch.Tensor, base: torch.Tensor | None = None, **changes: object
) -> IntervalTask:
    """An order whose weights come to ``weights``."""
    built_on = None if base is None else digest_of(base)
    values = {"digest": digest_of(weights), "base": built_on, **changes}
    return interval_task(CONFIG, **values)


def received(link: CloudLink, first: torch.Tensor = FIRST) -> torch.Tensor:
    return link.receive(task(first), to_array(first))


def test_differences_build_on_what_came_before() -> None:
    link = CloudLink("e")
    assert received(link).tolist() == [10.0, 20.0, 30.0]
    assert link.holds == digest_of(FIRST)
    difference = to_array(Codec("bf16", LAYOUT).encode(MOVED))
    second = link.receive(task(FIRST + MOVED, base=FIRST), difference)
    assert second.tolist() == [11.0, 22.0, 34.0]
    assert link.holds == digest_of(second)


def test_weights_that_come_whole_replace_what_was_held() -> None:
    link = CloudLink("e")
    received(link)
    assert received(link, FIRST + 1).tolist() == [11.0, 21.0, 31.0]
    assert link.holds == digest_of(FIRST + 1)


@pytest.mark.parametrize("first", [None, FIRST + 1])
def test_a_difference_to_other_weights_is_refused(first: torch.Tensor | None) -> None:
    link = CloudLink("e")
    if first is not None:
        received(link, first)
    difference = to_array(Codec("bf16", LAYOUT).encode(MOVED))
    with pytest.raises(ReplyError, match="send them whole"):
        link.receive(task(FIRST + MOVED, base=FIRST), difference)
    assert link.holds is None


def test_weights_that_come_to_something_else_are_refused_and_not_held() -> None:
    link = CloudLink("e")
    received(link)
    difference = to_array(Codec("bf16", LAYOUT).encode(MOVED))
    with pytest.raises(ReplyError, match="do not come to those of the cloud"):
        link.receive(task(FIRST, base=FIRST), difference)
    assert link.holds is None


def test_a_difference_across_a_cut() -> None:
    link = CloudLink("e")
    received(link)
    cut = Cut(LAYOUT, (((1,),), ()), {"a": 0.5})
    smaller = TensorLayout(("a", "b"), ((1,), ()))
    network = UNetSpec(unet=NETWORK.unet, layout=smaller.to_json())
    # The second of two weights stays, halved: 20 becomes 10.
    expected = torch.tensor([11.0, 34.0])
    order = task(expected, base=FIRST, network=network, cut=cut.to_json())
    difference = to_array(Codec("bf16", smaller).encode(torch.tensor([1.0, 4.0])))
    assert link.receive(order, difference).tolist() == expected.tolist()
    received(link)
    with pytest.raises(ReplyError, match="does not say how"):
        link.receive(task(expected, base=FIRST, network=network), difference)


def test_what_rounding_takes_comes_with_the_next_change() -> None:
    link = CloudLink("e")
    # A step is 7 / 7 = 1, so that 0.4 is rounded to 0 at first.
    change = torch.tensor([7.0, 0.4, -0.4, 0.0])
    came = [INT4.decode(link.pack(WEIGHTS, INT4, WHOLE, change)).tolist() for _ in range(3)]
    assert [values[1] for values in came] == [0.0, 1.0, 0.0]
    assert [values[2] for values in came] == [0.0, -1.0, 0.0]
    assert [values[0] for values in came] == [7.0, 7.0, 7.0]


def test_parts_that_are_not_sent_keep_what_is_left_of_them() -> None:
    layout = TensorLayout(("conv_in.weight", "mid_block.weight"), ((2, 1), (2, 1)))
    encoder, both = PartSubset(layout, ("encoder",)), PartSubset(layout, ("encoder", "bottleneck"))
    link = CloudLink("e")
    of_both = Codec("int4", both.chosen)
    link.pack(WEIGHTS, of_both, both, torch.tensor([7.0, 0.4, 7.0, 0.4]))
    link.pack(WEIGHTS, Codec("int4", encoder.chosen), encoder, torch.tensor([7.0, 0.4]))
    came = of_both.decode(link.pack(WEIGHTS, of_both, both, torch.tensor([7.0, 0.4, 7.0, 0.4])))
    # 0.4 + 0.4 was sent as 1 by the encoder, which leaves -0.2 there; the other still has 0.4.
    assert came.tolist() == [7.0, 0.0, 7.0, 1.0]


def test_a_new_network_forgets_what_is_left() -> None:
    link = CloudLink("e")
    received(link)
    layout = TensorLayout(("a", "b"), ((1, 1), (1, 1)))
    link.pack(WEIGHTS, Codec("int4", layout), PartSubset(layout, PARTS), torch.tensor([7.0, 0.4]))
    assert link.state_dict().keys() == {"layout", WEIGHTS}
    network = UNetSpec(unet=NETWORK.unet, layout=layout.to_json())
    link.receive(task(torch.ones(2), network=network), to_array(torch.ones(2)))
    assert link.state_dict() == {}


def test_what_the_cloud_will_not_take_leaves_the_rest_as_it_was() -> None:
    link = CloudLink("e")
    change = torch.tensor([7.0, 0.4, 0.0, 0.0])
    link.pack(WEIGHTS, INT4, WHOLE, change)
    nothing = link.pack(WEIGHTS, INT4, WHOLE, torch.zeros(4), counts=False)
    assert INT4.decode(nothing).tolist() == [0.0] * 4
    # 0.4 is still there for the next change.
    assert INT4.decode(link.pack(WEIGHTS, INT4, WHOLE, change)).tolist() == [7.0, 1.0, 0.0, 0.0]


def test_an_exact_codec_leaves_nothing() -> None:
    link = CloudLink("e")
    change = torch.tensor([7.0, 0.4, -0.4, 0.0])
    exact = Codec("fp32", WHOLE.layout)
    assert torch.equal(link.pack(WEIGHTS, exact, WHOLE, change), change)
    assert link.state_dict() == {}


def test_what_is_left_outlives_the_process_and_goes_back_with_a_resumed_run(tmp_path: Path) -> None:
    def after(link: CloudLink, store: FileStore, interval: int, *resumed: int) -> list[float]:
        order = interval_task(
            CONFIG, interval=interval, resumed=resumed, run_name="r",
            network=UNetSpec(unet={}, layout=WHOLE.layout.to_json()),
        )  # fmt: skip
        store.restore(link, order)
        link.receive(order, to_array(torch.zeros(4)))
        change = torch.tensor([7.0, 0.3, 0.0, 0.0])
        came: list[float] = INT4.decode(link.pack(WEIGHTS, INT4, WHOLE, change)).tolist()
        store.store(link, order)
        return came

    def store() -> FileStore:
        return FileStore(tmp_path / "edge.safetensors", resident=True)

    link, kept = CloudLink("e"), store()
    # 0.3, then 0.6, which is sent as 1, then 0.3 - 0.1 = 0.2 and so on.
    assert [after(link, kept, n)[1] for n in (1, 2)] == [0.0, 1.0]
    # Another process has the second interval again, and then a third one.
    link, kept = CloudLink("e"), store()
    assert after(link, kept, 2, 1)[1] == 1.0
    assert after(CloudLink("e"), store(), 3, 1)[1] == 0.0


def test_a_damaged_state_is_named() -> None:
    state = {"layout": WHOLE.layout.to_json(), WEIGHTS: torch.zeros(3)}
    with pytest.raises(FedPhDError, match=r"edge e is malformed .*4 float32"):
        CloudLink("e").load_state_dict(state)
