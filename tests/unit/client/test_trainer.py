"""A client's local training: hand-worked steps, repeatability, what lasts between rounds."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from typing import Any, cast

import pytest
import torch
from sklearn.datasets import load_digits
from support.training import flat_weights, layout_of, of_one_class
from support.training import train as training_round

from fedphd.client.flat_unet import FlatUNet
from fedphd.client.objectives import Batch, Objective
from fedphd.client.precision import Arithmetic
from fedphd.client.steps import (
    batches,
    flipped,
    noised,
    validation_loss,
    warmed_up,
)
from fedphd.client.trainer import Trainer, TrainResult
from fedphd.common.config.run import DiffusionConfig, ModelConfig, TrainingConfig
from fedphd.common.errors import ConfigError, FedPhDError, ReplyError
from fedphd.common.rng import generator
from fedphd.common.unet.groups import Cut, GroupPenalty
from fedphd.common.unet.model import (
    PrunedUNet,
    build_scheduler,
    build_unet,
    resolve_device,
    unet_config,
)
from fedphd.common.unet.parts import PartSubset

WIDE = ModelConfig(image_size=4, block_out_channels=(16, 16), norm_num_groups=8, dropout=0.1)
NARROW = ModelConfig(image_size=4, block_out_channels=(8, 8), norm_num_groups=8)
IMAGES = torch.randint(0, 256, (10, 1, 4, 4), generator=generator("images")).to(torch.uint8)
PLAIN = Arithmetic(torch.device("cpu"), bf16=False)
TRAINING = TrainingConfig(batch_size=4, learning_rate=0.01, precision="fp32")


def client(objective: Objective | None = None, client_id: str = "client-0") -> Trainer:
    return Trainer(client_id=client_id, device="cpu", objective=objective)


def train(
    trainer: Trainer | None = None,
    *,
    model: ModelConfig = WIDE,
    images: torch.Tensor = IMAGES,
    training: TrainingConfig = TRAINING,
    **changes: Any,
) -> TrainResult:
    return training_round(trainer or client(), model, images, training=training, **changes)


def named(weights: torch.Tensor, model: ModelConfig = WIDE) -> dict[str, torch.Tensor]:
    return layout_of(model).unpack(weights)


class TwoBiases(Objective):
    """Loss 3 x + 4 y in two biases x and y: the gradient is (3, 4), of norm 5."""

    def loss(self, unet: PrunedUNet, batch: Batch) -> torch.Tensor:
        parameters = dict(unet.named_parameters())
        return 3 * parameters["conv_in.bias"][0] + 4 * parameters["conv_out.bias"][0]


class Nothing(Objective):
    """Loss 0 everywhere, with gradient 0."""

    def loss(self, unet: PrunedUNet, batch: Batch) -> torch.Tensor:
        return 0 * next(unet.parameters()).sum()


def shrink(model: ModelConfig) -> Cut:
    """A cut of WIDE to the shapes of ``model`` that keeps the first channels of everything."""
    before, after = layout_of(WIDE), layout_of(model)
    kept = tuple(tuple(tuple(range(size)) for size in shape) for shape in after.shapes)
    return Cut(before, kept)


def test_one_step_by_hand() -> None:
    trainer = client(TwoBiases())
    one_step = TRAINING.model_copy(update={"local_unit": "steps", "max_grad_norm": 2.5})
    result = train(trainer, training=one_step)
    before, after = named(flat_weights(WIDE)), named(result.weights)
    state = trainer.state_dict()
    first = named(cast(torch.Tensor, state["exp_avg"]))
    second = named(cast(torch.Tensor, state["exp_avg_sq"]))
    assert result.metrics.gradient_norm.value == pytest.approx(5.0, rel=1e-5)
    # Clipped from norm 5 to 2.5: (1.5, 2). Moments are 0.1 and 0.001 of it and its square;
    # Adam's first step is the learning rate times the gradient's sign.
    for name, gradient in (("conv_in.bias", 1.5), ("conv_out.bias", 2.0)):
        assert first[name][0].item() == pytest.approx(0.1 * gradient, rel=1e-5)
        assert second[name][0].item() == pytest.approx(0.001 * gradient**2, rel=1e-5)
        assert (after[name] - before[name])[0].item() == pytest.approx(-0.01, rel=1e-4)
    moved = sum(int((after[name] != before[name]).sum()) for name in after)
    assert moved == 2
    expected = 3 * before["conv_in.bias"][0] + 4 * before["conv_out.bias"][0]
    assert result.metrics.loss.value == pytest.approx(expected.item(), abs=1e-6)
    assert (result.steps, result.metrics.sparsity_penalty.value) == (1, 0.0)


def test_epsilon_step_equals_a_plain_loop() -> None:
    model = WIDE.model_copy(update={"dropout": 0.0})
    training = TRAINING.model_copy(update={"optimizer": "adamw", "weight_decay": 0.1})
    result = train(model=model, training=training)
    unet, rng = build_unet(model, seed=0).train(), generator("train", 7, "client-0", 1, 1)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.01, weight_decay=0.1)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)
    losses = []
    order = torch.randperm(10, generator=rng)
    for indices in (order[:4], order[4:8], order[8:]):
        clean = IMAGES[indices].float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=rng)
        timesteps = torch.randint(1000, (len(clean),), generator=rng)
        kept = alphas[timesteps].view(-1, 1, 1, 1)
        predicted = unet(kept.sqrt() * clean + (1 - kept).sqrt() * noise, timesteps).sample
        loss = ((predicted - noise) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert result.metrics.loss.value == pytest.approx(sum(losses) / 3, rel=1e-4)
    for name, tensor in named(result.weights, model).items():
        assert torch.allclose(tensor, unet.state_dict()[name], atol=2e-4), name


def test_warm_up_runs_over_the_clients_own_steps() -> None:
    training = TRAINING.model_copy(update={"warmup_steps": 4})
    assert [warmed_up(training, n) for n in range(6)] == [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01]
    assert warmed_up(TRAINING, 0) == 0.01
    trainer, weights, moves = client(TwoBiases()), flat_weights(WIDE), []
    for edge_round in (1, 2):
        result = train(trainer, training=training, edge_round=edge_round)
        moves.append((named(result.weights)["conv_in.bias"] - named(weights)["conv_in.bias"])[0])
    # A constant gradient moves a weight by the learning rate: 3 steps in each round.
    assert moves[0].item() == pytest.approx(-(0.0025 + 0.005 + 0.0075), rel=1e-3)
    assert moves[1].item() == pytest.approx(-0.03, rel=1e-3)


def test_same_call_gives_the_same_bits_and_another_does_not() -> None:
    flips = TRAINING.model_copy(update={"horizontal_flip": True})
    first = train(training=flips)
    torch.manual_seed(99)
    again = train(training=flips)
    assert torch.equal(first.weights, again.weights)
    assert first.metrics.loss.value == again.metrics.loss.value
    others = [
        train(training=TRAINING),
        train(training=flips, edge_round=2),
        train(training=flips, interval=2),
        train(training=flips, seed=8),
        train(client(client_id="client-1"), training=flips),
    ]
    for other in others:
        assert not torch.equal(first.weights, other.weights)


def test_dropout_is_on_in_training_and_global_generators_stay() -> None:
    before = torch.get_rng_state()
    with_dropout = train()
    train(sparsity_lambda=1e-4)
    assert torch.equal(before, torch.get_rng_state())
    without = WIDE.model_copy(update={"dropout": 0.0})
    assert not torch.equal(with_dropout.weights, train(model=without).weights)


def test_first_sparse_round_draws_what_a_later_one_would() -> None:
    fresh = TRAINING.model_copy(update={"optimizer_state": "fresh"})
    trainer = client()
    first = train(trainer, training=fresh, sparsity_lambda=1e-4)
    again = train(trainer, training=fresh, sparsity_lambda=1e-4)
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.weights, train(training=fresh).weights)


def test_kept_moments_change_the_second_round_and_fresh_ones_do_not() -> None:
    fresh = TRAINING.model_copy(update={"optimizer_state": "fresh"})
    keeping, starting = (client() for _ in range(2))
    assert torch.equal(train(keeping).weights, train(starting, training=fresh).weights)
    assert keeping.state_dict()["moment_steps"] == 3
    assert starting.state_dict() == {"steps": 3}
    kept = train(keeping, edge_round=2)
    restarted = train(starting, edge_round=2, training=fresh)
    assert not torch.equal(kept.weights, restarted.weights)
    assert torch.equal(restarted.weights, train(edge_round=2).weights)
    assert (keeping.state_dict()["moment_steps"], starting.state_dict()["steps"]) == (6, 6)


def test_moments_are_cut_with_the_network(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer = client()
    train(trainer)
    dense = named(cast(torch.Tensor, trainer.state_dict()["exp_avg"]))
    training = TRAINING.model_copy(update={"beta1": 0.5, "local_unit": "steps"})
    # Moments are of gradients, which double where the weights are halved.
    cut = dataclasses.replace(shrink(NARROW), scales={"conv_in.bias": 0.5})
    later = client(Nothing())
    later.load_state_dict(trainer.state_dict())
    train(later, model=NARROW, cut=cut, training=training)
    pruned = named(cast(torch.Tensor, later.state_dict()["exp_avg"]), NARROW)
    for name, tensor in shrink(NARROW).apply(dense).items():
        factor = 2 * 0.5 if name == "conv_in.bias" else 0.5
        assert torch.allclose(pruned[name], factor * tensor, rtol=1e-5, atol=0), name
    assert later.state_dict()["moment_steps"] == 4
    assert "optimiser moments cut" in caplog.text
    # The cut comes with every task of the interval and must not be applied again.
    train(later, model=NARROW, cut=cut, edge_round=2)
    assert later.state_dict()["moment_steps"] == 7


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cut": None}, "no cut to follow"),
        ({"cut": shrink(NARROW), "optimizer_moments": "reset"}, "no cut to follow"),
        ({"cut": shrink(WIDE)}, "the cut does not lead to the new network: tensor conv_in.weight"),
    ],
)
def test_moments_that_do_not_fit_start_afresh(
    changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = client()
    train(trainer)
    result = train(trainer, model=NARROW, **changes)
    assert torch.equal(result.weights, train(model=NARROW).weights)
    assert trainer.state_dict()["moment_steps"] == 3
    assert trainer.state_dict()["steps"] == 6
    assert f"optimiser moments reset ({reason}" in caplog.text


def test_sparse_phase_adds_the_group_penalty() -> None:
    training = TRAINING.model_copy(update={"local_unit": "steps", "max_grad_norm": 1e9})
    trainer = client(Nothing())
    result = train(trainer, training=training, sparsity_lambda=0.5)
    unet = build_unet(WIDE, seed=0)
    penalty = GroupPenalty(unet)()
    penalty.backward()  # type: ignore[no-untyped-call]
    assert result.metrics.loss.value == 0
    assert result.metrics.sparsity_penalty.value == pytest.approx(penalty.item(), rel=1e-5)
    moments = named(cast(torch.Tensor, trainer.state_dict()["exp_avg"]))
    for name, parameter in unet.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(moments[name], 0.1 * 0.5 * gradient, rtol=1e-4, atol=1e-7), name


def test_a_fresh_process_goes_on_from_the_state() -> None:
    resident = client()
    train(resident)
    state = resident.state_dict()
    scalars = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    assert json.loads(json.dumps(scalars)) == scalars
    carried = {**state, "exp_avg": cast(torch.Tensor, state["exp_avg"]).clone()}
    restarted = client()
    restarted.load_state_dict(carried)
    expected = train(resident, edge_round=2).weights
    assert torch.equal(expected, train(restarted, edge_round=2).weights)
    assert carried["moment_steps"] == 3
    assert torch.equal(cast(torch.Tensor, carried["exp_avg"]), cast(torch.Tensor, state["exp_avg"]))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("exp_avg", torch.zeros(3), r"exp_avg is torch.float32 of shape \(3,\)"),
        ("layout", "[1]", "expected a list"),
        ("moment_steps", None, "client-0 is malformed"),
    ],
)
def test_malformed_state_is_refused(key: str, value: object, text: str) -> None:
    trainer = client()
    train(trainer)
    with pytest.raises(FedPhDError, match=text):
        trainer.load_state_dict(trainer.state_dict() | {key: value})
    assert trainer.state_dict()["steps"] == 3


def test_each_pass_shows_each_image_once() -> None:
    training = TRAINING.model_copy(update={"local_amount": 2})
    drawn = list(batches(10, training, generator("a")))
    assert [len(indices) for indices in drawn] == [4, 4, 2, 4, 4, 2]
    first, second = torch.cat(drawn[:3]), torch.cat(drawn[3:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert first.tolist() != second.tolist()
    steps = training.model_copy(update={"local_unit": "steps", "local_amount": 4})
    assert [len(indices) for indices in batches(10, steps, generator("a"))] == [4, 4, 2, 4]


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.arange(6.0).view(1, 1, 2, 3).expand(1000, 1, 2, 3)
    result = flipped(images, generator("a"))
    mirrored = (result == torch.tensor([[2.0, 1.0, 0.0], [5.0, 4.0, 3.0]])).all(-1).all(-1)
    assert ((result == images).all(-1).all(-1) ^ mirrored).all()
    assert 430 < mirrored.sum() < 570


def test_forward_process_by_hand() -> None:
    # Two timesteps with beta 0.19 and 0.5: kept shares 0.81 and 0.405.
    scheduler = build_scheduler(
        DiffusionConfig(num_train_timesteps=2, beta_start=0.19, beta_end=0.5)
    )
    batch = noised(torch.ones(50, 1, 2, 2), scheduler, generator("a"), torch.device("cpu"))
    assert set(batch.timesteps.tolist()) == {0, 1}
    for noisy, timestep, noise in zip(batch.noisy, batch.timesteps, batch.noise, strict=True):
        kept = (0.81, 0.405)[int(timestep)]
        assert torch.allclose(noisy, math.sqrt(kept) + math.sqrt(1 - kept) * noise, atol=1e-6)


def test_loss_falls_on_digits() -> None:
    model = ModelConfig(block_out_channels=(16, 32))
    images = torch.from_numpy(load_digits().images * (255 / 16)).to(torch.uint8)[:, None]
    trainer = client()
    training = TrainingConfig(learning_rate=3e-3, local_unit="steps", local_amount=60)
    now: dict[str, Any] = {
        "model": model, "images": images[:256], "held_out": images[256:512],
    }  # fmt: skip
    before = train(trainer, **now, training=training)
    after = train(trainer, **now, weights=before.weights)
    assert before.metrics.validation_loss.value is not None
    assert after.metrics.validation_loss.value is not None
    assert before.metrics.validation_loss.value > 0.9
    assert after.metrics.validation_loss.value < 0.5 * before.metrics.validation_loss.value


@pytest.mark.parametrize(
    ("batch_size", "counts"), [(64, (256, 44)), (500, (256, 44)), (40, (160, 140))]
)
def test_validation_loss_by_hand(batch_size: int, counts: tuple[int, ...]) -> None:
    """A network that predicts no noise is off by the noise: 300 images, so two batches."""
    network = FlatUNet(unet_config(build_unet(WIDE, seed=0)), torch.device("cpu"))
    with torch.no_grad():
        network.flat.zero_()
    images = torch.zeros(300, 1, 4, 4, dtype=torch.uint8)
    scheduler = build_scheduler(DiffusionConfig())
    found = validation_loss(
        network, of_one_class(images), scheduler, generator("v"), PLAIN, batch_size=batch_size
    )
    rng, squares = generator("v"), 0.0
    for count in counts:
        squares += float(torch.randn((count, 1, 4, 4), generator=rng).square().sum())
        torch.randint(1000, (count,), generator=rng)
    assert found == pytest.approx(squares / (300 * 16), rel=1e-6)
    assert not network.unet.training


def test_validation_repeats_and_does_not_touch_the_training() -> None:
    held_out = {"held_out": IMAGES[:4]}
    plain, validating = (client() for _ in range(2))
    results = [train(validating, **held_out, edge_round=number) for number in (1, 2)]
    for number, result in enumerate(results, start=1):
        expected = train(plain, edge_round=number)
        assert expected.metrics.validation_loss.value is None
        assert torch.equal(result.weights, expected.weights)
    # The same weights came, and the same noise was drawn, in another round.
    assert results[0].metrics.validation_loss.value == results[1].metrics.validation_loss.value
    other = train(**held_out, seed=8)
    assert other.metrics.validation_loss != results[0].metrics.validation_loss
    with pytest.raises(ConfigError, match=r"images are torch\.uint8 of shape"):
        train(held_out=IMAGES[:0])


def test_what_is_validated_are_the_weights_in_use() -> None:
    """Of a U-Net that travels in parts: with the client's own ones."""
    layout = layout_of(WIDE)
    # The run's own initial weights.
    whole = flat_weights(WIDE, seed=7)
    came = PartSubset(layout, ("decoder",)).take(flat_weights(WIDE, seed=1))
    mixed = PartSubset(layout, ("decoder",)).put(whole.clone(), came)
    held_out = {"held_out": IMAGES[:4]}
    partly = train(weights=came, parts=("decoder",), initial=WIDE, **held_out)
    wholly = train(weights=mixed, **held_out)
    assert partly.metrics.validation_loss == wholly.metrics.validation_loss


def test_result_is_a_copy_and_the_task_stays_as_it_was() -> None:
    trainer = client()
    weights = flat_weights(WIDE)
    result = train(trainer, weights=weights)
    kept = result.weights.clone()
    train(trainer, weights=weights, edge_round=2)
    assert torch.equal(result.weights, kept)
    assert torch.equal(weights, flat_weights(WIDE))
    assert result.weights.dtype == torch.float32
    assert not result.weights.requires_grad
    unet = build_unet(WIDE, seed=1)
    unet.load_state_dict(named(result.weights), strict=True)


def test_divergence_names_client_round_and_step() -> None:
    weights = flat_weights(WIDE)
    weights[0] = math.nan
    text = r"client client-0, interval 2, round 3, step 1: the loss is nan.*learning_rate"
    trainer = client()
    with pytest.raises(FedPhDError, match=text):
        train(trainer, weights=weights, interval=2, edge_round=3)
    assert torch.equal(train(trainer).weights, train().weights)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ReplyError, match=r"torch.float64 of shape \(5,\)"):
        train(weights=torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"torch.float32 of shape \(10, 1, 4, 4\).*torch.uint8"):
        train(images=IMAGES.float())
    with pytest.raises(ConfigError, match=r"\(0, 1, 4, 4\).*N >= 1"):
        train(images=IMAGES[:0])
    with pytest.raises(ConfigError, match=r"\(10, 3, 4, 4\).*\(N, 1, 4, 4\)"):
        train(images=IMAGES.expand(10, 3, 4, 4))


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match='device = "tpu": unknown'):
        resolve_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_missing_cuda_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match='use "auto" or "cpu"'):
        Trainer(client_id="client-0", device="cuda")
