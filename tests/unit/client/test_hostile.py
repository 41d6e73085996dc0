"""Whatever an edge sends: a client refuses it or trains, keeps its state, and allocates little."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flwr.app import Array, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from support.client_app import MODEL, App, config, offer, question, task
from support.hostile import FEW, FEWEST, bad_arrays, bad_records, scalars, spoiled, with_array

from fedphd.client.app import ClientRuntime
from fedphd.common.config.run import ModelConfig, TrainingConfig
from fedphd.common.errors import FedPhDError, ReplyError
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.parts import PartSubset
from fedphd.common.wire.messages import TRAIN, Hello, TrainReply, UNetSpec
from fedphd.common.wire.offers import CHOOSE, ChooseReply
from fedphd.common.wire.records import read_payload, read_weights, to_records

# Each round starts afresh, so that the same order gives the same weights at any time.
ORDER, WEIGHTS = task(training=TrainingConfig(batch_size=32, optimizer_state="fresh"))
CONTENT = json.loads(ORDER.model_dump_json())
# 20 GB and more as float32, and 3 GB, which is within what a peer may describe.
VAST, LARGE = (4096, 8192), (1536, 1536)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Client:
    """A client that is asked with records, and what an honest order leads to."""

    def __init__(self) -> None:
        self.runtime = ClientRuntime(config())
        self.app = App(self.runtime)
        self.trained = self.train(to_records(ORDER, WEIGHTS))

    def ask(self, records: RecordDict, kind: str = TRAIN) -> Message:
        return self.app.app(Message(records, 2, kind), self.app.context)

    def train(self, records: RecordDict) -> torch.Tensor:
        return read_weights(self.ask(records))

    def is_as_before(self) -> bool:
        """Whether an honest order leads to the same weights, to the bit."""
        return torch.equal(self.train(to_records(ORDER, WEIGHTS)), self.trained)


@pytest.fixture(scope="module")
def client() -> Client:
    return Client()


def described(**changes: Any) -> UNetSpec:
    """The network of ``ORDER`` with another description of the U-Net."""
    return UNetSpec(unet=ORDER.network.unet | changes, layout=ORDER.network.layout)


@FEW
@given(st.data())
def test_spoiled_orders(client: Client, data: st.DataObject) -> None:
    # Not how much to train: an edge may ask for any number of passes.
    kept = ("training", "diffusion", "objective")
    head = {key: value for key, value in CONTENT.items() if key not in kept}
    # 64 tensors: most drawn places would lie in there.
    content = {**CONTENT, **data.draw(spoiled(head))}
    records = RecordDict({**to_records(ORDER, WEIGHTS), **scalars(content)})
    try:
        reply = client.ask(records)
    except ReplyError:
        pass
    else:
        assert read_payload(reply, TrainReply).client_id == "client-0"
        assert read_weights(reply).isfinite().all()
    assert client.is_as_before()


@FEWEST
@given(st.data())
def test_spoiled_descriptions_of_the_network(client: Client, data: st.DataObject) -> None:
    unet = data.draw(spoiled(ORDER.network.unet))
    content = {**CONTENT, "network": {"unet": unet, "layout": ORDER.network.layout}}
    with contextlib.suppress(ReplyError):
        client.train(RecordDict({**to_records(ORDER, WEIGHTS), **scalars(content)}))
    assert client.is_as_before()


@FEW
@given(bad_arrays(WEIGHTS))
def test_bad_arrays(client: Client, array: Array) -> None:
    with pytest.raises(ReplyError):
        client.train(with_array(to_records(ORDER, WEIGHTS), array))


@FEW
@given(bad_records(), st.sampled_from([TRAIN, CHOOSE]))
def test_other_records(client: Client, bad: RecordDict, kind: str) -> None:
    with pytest.raises(ReplyError):
        client.ask(bad, kind)


@FEW
@given(st.data())
def test_spoiled_questions(client: Client, data: st.DataObject) -> None:
    asked = question(offer("edge-0"), offer("edge-1", 10.0, label=0))
    content = data.draw(spoiled(json.loads(asked.model_dump_json())))
    try:
        answer = read_payload(client.ask(scalars(content), CHOOSE), ChooseReply)
    except FedPhDError:
        return
    num_images = client.runtime.hello(Hello(asking="e")).num_samples
    assert sum(answer.label_counts) == num_images or not answer.label_counts


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"network": described(block_out_channels=VAST)}, "at most 1,000,000,000 are accepted"),
        ({"network": described(block_out_channels=LARGE)}, "its U-Net and its weights differ"),
        ({"network": described(layers_per_block=10**9)}, "U-Net config: layers_per_block"),
        ({"network": described(block_out_channels=[2**60])}, "U-Net config: block_out_channels"),
        ({"initial": ModelConfig(block_out_channels=VAST)}, "at most 1,000,000,000 are accepted"),
        ({"initial": ModelConfig(block_out_channels=LARGE)}, "its initial U-Net is another one"),
    ],
)
def test_vast_networks_are_refused_before_they_have_memory(
    client: Client, changes: dict[str, Any], reason: str
) -> None:
    order = ORDER.model_copy(update=changes)
    weights = WEIGHTS
    if order.initial:
        # Only the decoder travels; the rest would come from the initial network.
        order, weights = only_the_decoder(order)
    before = peak_bytes()
    with pytest.raises(ReplyError, match=reason):
        client.train(to_records(order, weights))
    assert peak_bytes() - before < 5e8


def only_the_decoder(order: Any) -> tuple[Any, torch.Tensor]:
    sent = PartSubset(ORDER.network.tensor_layout(), ("decoder",))
    network = UNetSpec(unet=ORDER.network.unet, layout=sent.chosen.to_json())
    parts = {"parts": ("decoder",), "send": ("decoder",)}
    return order.model_copy(update={"network": network, **parts}), sent.take(WEIGHTS)


def test_weights_under_other_names_are_refused(client: Client) -> None:
    layout = ORDER.network.tensor_layout()
    other = TensorLayout(("x", *layout.names[1:]), layout.shapes)
    order = ORDER.model_copy(
        update={"network": UNetSpec(unet=ORDER.network.unet, layout=other.to_json())}
    )
    with pytest.raises(ReplyError, match=r"differ: tensor conv_in\.weight is missing"):
        client.train(to_records(order, WEIGHTS))


def test_parts_that_do_not_travel_stay_here(client: Client) -> None:
    order, weights = only_the_decoder(ORDER.model_copy(update={"initial": MODEL}))
    greedy = order.model_copy(update={"send": ("encoder", "decoder")})
    with pytest.raises(ReplyError, match="asks for the part encoder, which does not travel"):
        client.train(to_records(greedy, weights))


def test_refused_orders_leave_moments_alone() -> None:
    client = Client()
    kept = ORDER.model_copy(update={"training": TrainingConfig(batch_size=32)})
    client.train(to_records(kept, WEIGHTS))
    before = client.runtime._trainer.state_dict()
    layout = ORDER.network.tensor_layout()
    small = TensorLayout(layout.names[:1], layout.shapes[:1])
    for changes in (
        {"network": UNetSpec(unet=ORDER.network.unet, layout=small.to_json())},
        {"network": described(block_out_channels=[8, 8])},
        {"cut": "{}"},
    ):
        order = kept.model_copy(update=changes)
        weights = WEIGHTS[: order.network.tensor_layout().numel]
        with pytest.raises(ReplyError):
            client.train(to_records(order, weights))
    after = client.runtime._trainer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(after[k]))
               for k in before if k != "layout")  # fmt: skip
