"""When a client compiles its network, and that it trains the same with it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import pytest
import torch
from support.training import flat_weights, train, train_task

from fedphd.client import compiled
from fedphd.client.compiled import CompiledPasses, compiled_passes
from fedphd.client.flat_unet import FlatUNet, UNetCache
from fedphd.client.trainer import Trainer
from fedphd.common.config.run import FederationConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from fedphd.common.rng import generator
from fedphd.common.unet.arithmetic import Arithmetic
from fedphd.common.unet.model import build_unet, unet_config

CPU = torch.device("cpu")
MODEL = ModelConfig(image_size=4, block_out_channels=(8,), attention_levels=())
TRAINING = TrainingConfig(optimizer="sgd", batch_size=8, local_amount=3)
ALWAYS = TRAINING.model_copy(update={"compile": "always"})
# A batch of 8 and one of 4 in each pass.
IMAGES = torch.randint(0, 256, (12, 1, 4, 4), generator=generator("images")).to(torch.uint8)
PLAIN_S, FAST_S = 1.0, 0.5


@pytest.fixture
def network() -> FlatUNet:
    made = FlatUNet(unet_config(build_unet(MODEL, seed=0)), CPU)
    made.load(flat_weights(MODEL))
    return made


@pytest.fixture
def passes() -> CompiledPasses:
    return CompiledPasses(Arithmetic(CPU, bf16=False), 8, at_once=False)


def trials(fast_s: float = FAST_S) -> Callable[..., float]:
    """Times of steps that are not taken."""
    return lambda network, arithmetic, unet, *_, **__: PLAIN_S if unet is network.unet else fast_s


def test_compiling_waits_until_the_steps_would_have_gained_its_cost(
    network: FlatUNet,
    passes: CompiledPasses,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(compiled, "trial_s", trials())
    # 0.2 s a tensor, and three tenths of what the steps take are gained.
    due_s = 0.2 * len(network.layout.names) / 0.3
    with caplog.at_level(logging.INFO):
        passes.trained(due_s - 1)
        passes.compile_if_due(network, 12)
        assert passes.chosen(network.unet, 8) is network.unet
        assert not caplog.messages
        passes.trained(1.01)
        passes.compile_if_due(network, 12)
        passes.compile_if_due(network, 12)
    assert passes.chosen(network.unet, 8) is not network.unet
    assert passes.chosen(network.unet, 4) is network.unet
    [said] = caplog.messages
    assert said.endswith("a step of 8 images takes 0.5 s, plain 1 s")


def test_what_is_no_faster_is_not_used(
    network: FlatUNet,
    passes: CompiledPasses,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(compiled, "trial_s", trials(fast_s=0.98))
    passes.trained(1e6)
    with caplog.at_level(logging.INFO):
        passes.compile_if_due(network, 12)
        passes.compile_if_due(network, 12)
    assert passes.chosen(network.unet, 8) is network.unet
    [said] = caplog.messages
    assert said.endswith("takes 0.98 s, plain 1 s; it is not used")


def test_without_a_compiler_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> float:
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(compiled, "trial_s", fails)
    with caplog.at_level(logging.INFO):
        weights = train(Trainer(client_id="one"), MODEL, IMAGES, training=ALWAYS).weights
    never = TRAINING.model_copy(update={"compile": "never"})
    assert torch.equal(
        weights, train(Trainer(client_id="one"), MODEL, IMAGES, training=never).weights
    )
    assert (
        "training goes on without compiled code: No working C++ compiler found" in caplog.messages
    )


@pytest.mark.parametrize("classes", [None, 4])
def test_a_round_runs_what_the_trial_compiled_and_compiles_nothing(
    classes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, graphs, ran = torch.compile, [], []

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)

        def forward(*inputs: object) -> object:
            ran.append(graph)
            return graph.forward(*inputs)

        return forward

    monkeypatch.setattr(
        torch, "compile", lambda unet, dynamic: compile_(unet, dynamic=dynamic, backend=counting)
    )
    monkeypatch.setattr(compiled, "_WORTH", 1e9)
    model = MODEL.model_copy(
        update={"class_conditional": classes is not None, "num_class_embeds": classes}
    )
    trainer, labels = Trainer(client_id="one"), torch.arange(12) % 3
    train(trainer, model, IMAGES, labels=labels, training=ALWAYS)
    tried, ran_before = len(graphs), len(ran)
    # A batch of 8 and one of 3 in each of three passes.
    train(trainer, model, IMAGES[:11], labels=labels[:11], training=ALWAYS, edge_round=2)
    assert len(graphs) == tried > 0
    assert len(ran) - ran_before == 3 * tried


@pytest.mark.slow
def test_compiled_steps_train_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(compile_: str) -> torch.Tensor:
        training = TRAINING.model_copy(update={"compile": compile_})
        trainer, state = Trainer(client_id="one"), torch.get_rng_state()
        weights = train(trainer, MODEL, IMAGES, training=training).weights
        assert torch.equal(torch.get_rng_state(), state)
        return weights

    plain = trained("never")
    # Whether it is faster is not the question here.
    monkeypatch.setattr(compiled, "_WORTH", 1e9)
    with caplog.at_level(logging.INFO):
        fast = trained("always")
    [said] = [r.getMessage() for r in caplog.records if r.name == compiled.__name__]
    assert said.startswith("compiled the network in ")
    assert "not used" not in said
    moved = (plain - flat_weights(MODEL)).norm()
    assert 0 < (fast - plain).norm() < 1e-4 * moved


def test_where_nothing_is_compiled(network: FlatUNet) -> None:
    arithmetic = Arithmetic(CPU, bf16=False)
    assert compiled_passes(network, arithmetic, train_task(MODEL, training=ALWAYS)) is not None
    moon = train_task(MODEL, training=ALWAYS, objective=ObjectiveConfig(method="moon"))
    assert compiled_passes(network, arithmetic, moon) is None
    exact = FederationConfig(reproducible=True, training=ALWAYS).local_training
    assert compiled_passes(network, arithmetic, train_task(MODEL, training=exact)) is None
    # On a CPU nobody has asked for it.
    assert compiled_passes(network, arithmetic, train_task(MODEL, training=TRAINING)) is None


def test_passes_last_as_long_as_their_network_and_its_batches() -> None:
    networks, arithmetic = UNetCache(), Arithmetic(CPU, bf16=False)
    network = networks.get(unet_config(build_unet(MODEL, seed=0)), CPU)
    task = train_task(MODEL, training=ALWAYS)
    passes = compiled_passes(network, arithmetic, task)
    assert passes is not None
    assert compiled_passes(network, arithmetic, task) is passes
    assert compiled_passes(network, Arithmetic(CPU, bf16=True), task) is not passes
    larger = train_task(MODEL, training=ALWAYS.model_copy(update={"batch_size": 9}))
    found = compiled_passes(network, arithmetic, larger)
    assert found is not None
    assert found.batch_size == 9
    del network
    networks.get(unet_config(build_unet(MODEL.model_copy(update={"channels": 3}), seed=0)), CPU)
    gc.collect()
    assert all(kept is not found for kept in compiled._passes.values())
