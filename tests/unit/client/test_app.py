"""A client's answers: who it is, one choice per round, and training on its own images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from support.client_app import MODEL, App, config, offer, question, task

from fedphd.client.app import ClientRuntime
from fedphd.client.local_state import MOMENTS
from fedphd.client.steps import LocalRound
from fedphd.common.config.run import ObjectiveConfig, TrainingConfig
from fedphd.common.errors import ConfigError, FedPhDError, ReplyError
from fedphd.common.stores import FileStore
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_unet, unet_config
from fedphd.common.unet.parts import Part, PartSubset
from fedphd.common.wire.messages import (
    FINISH,
    HELLO,
    TRAIN,
    Ack,
    Finish,
    Hello,
    HelloReply,
    TrainReply,
    TrainTask,
    UNetSpec,
)
from fedphd.common.wire.offers import CHOOSE, ChooseReply, Offer
from fedphd.common.wire.records import read_payload, read_variate, read_weights, to_records
from fedphd.server.pruning import prune_unet


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runtime() -> ClientRuntime:
    return ClientRuntime(config())


def test_a_server_of_another_protocol_is_named(
    runtime: ClientRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.hello(Hello(asking="edge-0"))
    assert caplog.messages == []
    runtime.hello(Hello(asking="edge-0", protocol=9, version="7.0"))
    [line] = caplog.messages
    assert line.startswith("edge-0 speaks protocol 9 (fedphd 7.0); this is protocol 8")


def test_hello_gives_the_number_of_images(runtime: ClientRuntime) -> None:
    reply = runtime.hello(Hello(asking="edge-0"))
    assert (reply.kind, reply.name) == ("client", "client-0")
    # 1,797 digits in 60 parts.
    assert 20 <= reply.num_samples <= 40


def test_parts_of_all_clients_make_up_the_data() -> None:
    sizes = [
        ClientRuntime(config(n, num_partitions=5)).hello(Hello(asking="e")).num_samples
        for n in range(5)
    ]
    assert sum(sizes) == 1797


def test_label_counts_go_to_the_chosen_edge_only(runtime: ClientRuntime) -> None:
    offers = offer("edge-0"), offer("edge-1")
    mine = runtime.choose(question(*offers, asking="edge-0", edge_round=7))
    other = runtime.choose(question(*offers, asking="edge-1", edge_round=7))
    assert mine.edge_id == other.edge_id
    chosen, not_chosen = (mine, other) if mine.edge_id == "edge-0" else (other, mine)
    num_samples = runtime.hello(Hello(asking="e")).num_samples
    assert sum(chosen.label_counts) == num_samples
    assert sum(count > 0 for count in chosen.label_counts) == 2, "two classes per client"
    assert not_chosen.label_counts == ()


def test_choices_of_long_ago_are_forgotten() -> None:
    client = ClientRuntime(config())
    for interval in range(1, 6):
        for edge_round in (1, 2):
            client.choose(question(offer("edge-0"), interval=interval, edge_round=edge_round))
    assert {key[2] for key in client._choices} == {4, 5}


def test_choice_of_a_round_is_made_once() -> None:
    client = ClientRuntime(config())
    # Full of what others brought, an edge is chosen with a chance of nearly 0.
    first = client.choose(question(offer("edge-0"), offer("edge-1", 1e6)))
    later = client.choose(question(offer("edge-0", 1e6), offer("edge-1"), asking="edge-1"))
    assert (first.edge_id, later.edge_id) == ("edge-0", "edge-0")
    for change in ({"edge_round": 2}, {"interval": 2}, {"run_name": "b"}):
        new = client.choose(question(offer("edge-0", 1e6), offer("edge-1"), **change))
        assert new.edge_id == "edge-1"


def test_choice_does_not_depend_on_the_process() -> None:
    offers = offer("edge-0"), offer("edge-1")
    answers = [
        [ClientRuntime(config()).choose(question(*offers, edge_round=r)).edge_id for r in (1, 2, 3)]
        for _ in range(2)
    ]
    assert answers[0] == answers[1]


def test_client_completes_the_edge_that_lacks_its_classes() -> None:
    client = ClientRuntime(config())
    counts = client.choose(question(offer("edge-0"))).label_counts
    own = counts.index(max(counts))
    other = counts.index(0)
    draws = [
        client.choose(
            question(
                offer("full", 30, own), offer("lacks", 30, other), edge_round=r, factor=100.0,
                offset=-105.0,
            )
        ).edge_id
        for r in range(2, 30)
    ]  # fmt: skip
    # Merged about (3/4, 1/4), score 1.28, or (1/2, 1/4, 1/4), score 1.48: after 30 samples and
    # the offset only the second is above 0.
    assert set(draws) == {"lacks"}


def test_run_over_fewer_classes_than_the_data(runtime: ClientRuntime) -> None:
    half = question(
        Offer(edge_id="edge-0", label_distribution=(1.0,), num_samples=0.0), target=(1.0,)
    )
    with pytest.raises(ConfigError, match="num_classes"):
        runtime.choose(half)


def test_training_answers_with_changed_weights(runtime: ClientRuntime) -> None:
    order, weights = task(interval=3, edge_round=2)
    before = weights.clone()
    message = App(runtime).ask(TRAIN, order, weights)
    reply = read_payload(message, TrainReply)
    num_samples = runtime.hello(Hello(asking="e")).num_samples
    assert (reply.client_id, reply.interval, reply.edge_round) == ("client-0", 3, 2)
    assert (reply.num_examples, reply.steps) == (num_samples, -(-num_samples // 8))
    assert reply.network == order.network
    assert 0.5 < reply.metrics.loss.value < 2.0, "about 1 for noise of variance 1"
    trained = read_weights(message)
    assert trained.shape == weights.shape
    assert 1e-4 < (trained - weights).abs().max() < 0.1
    assert torch.equal(weights, before), "the received weights are read-only"


def test_moments_that_were_dropped_do_not_come_back(tmp_path: Path) -> None:
    """Where another process trains the next round, it reads what is stored."""
    client, store = ClientRuntime(config()), FileStore(tmp_path / "state.safetensors")

    def train(edge_round: int, scale: float) -> set[str]:
        order, weights = task(edge_round=edge_round)
        message = Message(to_records(order, scale * weights), 2, TRAIN)
        with pytest.raises(FedPhDError, match="the loss is") if scale > 1 else nullcontext():
            client.train(order, message, store)
        return set(MOMENTS) & set(store._read("client-0") or {})

    assert train(1, 1.0) == set(MOMENTS)
    # The most that is allowed: layer after layer it grows beyond float32.
    assert train(2, 1e12) == set()


def test_half_a_round_that_a_librarys_error_ends_is_of_no_state(tmp_path: Path) -> None:
    def train(client: ClientRuntime, store: FileStore, edge_round: int) -> torch.Tensor:
        order, weights = task(edge_round=edge_round)
        message = Message(to_records(order, weights), 2, TRAIN)
        return read_weights(client.train(order, message, store))

    def new(name: str) -> tuple[ClientRuntime, FileStore]:
        store = FileStore(tmp_path / name, resident=True)
        return ClientRuntime(config()), store

    step = LocalRound.step

    def fails_after(round_: LocalRound, *of_step: Any) -> None:
        step(round_, *of_step)
        raise RuntimeError("out of memory")

    disturbed, undisturbed = new("disturbed.st"), new("undisturbed.st")
    for client in (disturbed, undisturbed):
        train(*client, 1)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(LocalRound, "step", fails_after)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(*disturbed, 2)
    assert torch.equal(train(*disturbed, 2), train(*undisturbed, 2))


def test_training_is_the_same_in_another_process() -> None:
    results = [read_weights(App(ClientRuntime(config())).ask(TRAIN, *task())) for _ in range(2)]
    assert torch.equal(*results)


def test_sparse_training_reports_its_penalty(runtime: ClientRuntime) -> None:
    reply = read_payload(App(runtime).ask(TRAIN, *task(sparsity_lambda=1e-4)), TrainReply)
    assert reply.metrics.sparsity_penalty.total > 0


def test_training_refuses_weights_that_do_not_fit(runtime: ClientRuntime) -> None:
    order, weights = task()
    with pytest.raises(ReplyError, match=r"got 3 values; the network has \d+"):
        App(runtime).ask(TRAIN, order, weights[:3])
    weights[0] = torch.nan
    with pytest.raises(ReplyError, match=r"tensor conv_in\.weight holds nan"):
        App(runtime).ask(TRAIN, order, weights)
    with pytest.raises(ReplyError, match="carries no weights"):
        App(runtime).ask(TRAIN, order)


def received(order: TrainTask, weights: torch.Tensor, *parts: Part, **changes: Any) -> Any:
    """The task and weights of an edge that exchanges only ``parts``."""
    sent = PartSubset(order.network.tensor_layout(), parts)
    network = UNetSpec(unet=order.network.unet, layout=sent.chosen.to_json())
    values = {"network": network, "parts": parts, "send": parts, "initial": MODEL} | changes
    return order.model_copy(update=values), sent.take(weights)


def test_only_the_decoder_comes_and_goes_and_the_rest_stays_here() -> None:
    order, initial = task()
    layout = order.network.tensor_layout()
    decoder = PartSubset(layout, ("decoder",))
    trained = layout.pack(build_unet(MODEL, seed=9).state_dict())
    app, whole = App(ClientRuntime(config())), App(ClientRuntime(config()))
    message = app.ask(TRAIN, *received(order, trained, "decoder"))
    reply = read_payload(message, TrainReply)
    assert reply.network.tensor_layout() == decoder.chosen
    # As if the received decoder had come with the run's initial weights.
    full = read_weights(whole.ask(TRAIN, order, decoder.put(initial, decoder.take(trained))))
    assert torch.equal(read_weights(message), decoder.take(full))
    # The next round goes on from this client's own encoder and bottleneck.
    later, _ = task(edge_round=2)
    again = app.ask(TRAIN, *received(later, trained, "decoder"))
    full = read_weights(whole.ask(TRAIN, later, decoder.put(full, decoder.take(trained))))
    assert torch.equal(read_weights(again), decoder.take(full))


def test_own_parts_of_a_new_client_are_cut_like_the_network() -> None:
    dense = build_unet(MODEL, seed=0)
    pruned = prune_unet(dense, ratio=0.5)
    layout = TensorLayout.of(pruned.unet.state_dict())
    network = UNetSpec(unet=unet_config(pruned.unet), layout=layout.to_json())
    order, _ = task(network=network, cut=pruned.cut.to_json())
    trained = layout.pack(pruned.unet.state_dict()) + 0.01
    decoder = PartSubset(layout, ("decoder",))
    message = App(ClientRuntime(config())).ask(TRAIN, *received(order, trained, "decoder"))
    initial = layout.pack(pruned.cut.apply(dense.state_dict()))
    completed = decoder.put(initial, decoder.take(trained))
    expected = read_weights(App(ClientRuntime(config())).ask(TRAIN, order, completed))
    assert torch.equal(read_weights(message), decoder.take(expected))


def test_half_of_the_network_goes_back() -> None:
    order, weights = task(send=("bottleneck", "decoder"))
    message = App(ClientRuntime(config())).ask(TRAIN, order, weights)
    half = PartSubset(order.network.tensor_layout(), ("bottleneck", "decoder"))
    full, _ = task()
    expected = read_weights(App(ClientRuntime(config())).ask(TRAIN, full, weights))
    assert torch.equal(read_weights(message), half.take(expected))
    assert read_payload(message, TrainReply).network.tensor_layout() == half.chosen


def test_parts_without_the_rest_are_refused(runtime: ClientRuntime) -> None:
    with pytest.raises(ReplyError, match="brings only the parts decoder, and no initial U-Net"):
        App(runtime).ask(TRAIN, *received(*task(), "decoder", initial=None))


def test_scaffold_takes_a_variate_and_answers_with_its_change() -> None:
    order, weights = task(
        objective=ObjectiveConfig(method="scaffold"), training=TrainingConfig(optimizer="sgd")
    )
    app = App(ClientRuntime(config()))
    with pytest.raises(ReplyError, match="carries no control variate"):
        app.ask(TRAIN, order, weights)
    with pytest.raises(ReplyError, match="control variate: got 3 values"):
        app.ask(TRAIN, order, weights, weights[:3])
    message = app.ask(TRAIN, order, weights, torch.zeros_like(weights))
    change, steps = read_variate(message), read_payload(message, TrainReply).steps
    # From zero: the mean gradient of SGD, (x - y) / (K lr).
    moved = (weights - read_weights(message)) / (steps * order.training.learning_rate)
    torch.testing.assert_close(change, moved, rtol=1e-2, atol=1e-4)
    assert float(change.abs().max()) > 1e-3


def test_every_kind_of_message_is_answered() -> None:
    told: list[Finish] = []
    app = App(ClientRuntime(config(), on_finish=told.append))
    assert read_payload(app.ask(HELLO, Hello(asking="e")), HelloReply).name == "client-0"
    asked = question(offer("edge-0"))
    assert read_payload(app.ask(CHOOSE, asked), ChooseReply).edge_id == "edge-0"
    end = Finish(exit_code=4, message="too few")
    assert read_payload(app.ask(FINISH, end), Ack).name == "client-0"
    assert told == [end]
