"""What each method adds to a step, against values worked out by hand."""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import pytest
import torch
from support.training import flat_weights, layout_of
from support.training import train as training_round

from fedphd.client.local_state import OWN_WEIGHTS, VARIATE
from fedphd.client.objectives import (
    Batch,
    EpsilonObjective,
    Objective,
    contrastive_loss,
    middle_block,
    output_of,
)
from fedphd.client.steps import noised
from fedphd.client.trainer import Trainer, TrainResult
from fedphd.common.config.run import DiffusionConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from fedphd.common.errors import ReplyError
from fedphd.common.rng import generator
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import PrunedUNet, build_scheduler, build_unet

MODEL = ModelConfig(image_size=4, block_out_channels=(16, 16), norm_num_groups=8)
NARROW = ModelConfig(image_size=4, block_out_channels=(8, 8), norm_num_groups=8)
IMAGES = torch.randint(0, 256, (8, 1, 4, 4), generator=generator("images")).to(torch.uint8)
# Two plain steps of rate 0.1, clipped nowhere.
SGD = TrainingConfig(
    optimizer="sgd", learning_rate=0.1, batch_size=4, local_unit="steps", local_amount=2,
    max_grad_norm=1e9,
)  # fmt: skip
ADAM = SGD.model_copy(update={"optimizer": "adam", "max_grad_norm": 1.0})
X, Y = "conv_in.bias", "conv_out.bias"


class TwoBiases(Objective):
    """Loss 3 x + 4 y in two biases x and y: the gradient is (3, 4) everywhere."""

    def loss(self, unet: PrunedUNet, batch: Batch) -> torch.Tensor:
        parameters = dict(unet.named_parameters())
        return 3 * parameters[X][0] + 4 * parameters[Y][0]


def layout(model: ModelConfig = MODEL) -> TensorLayout:
    return layout_of(model)


def two(flat: torch.Tensor) -> tuple[float, float]:
    """The values at x and y."""
    named = layout().unpack(flat)
    return named[X][0].item(), named[Y][0].item()


def at_two(x: float, y: float) -> torch.Tensor:
    """Zeros, (numel,), but for x and y."""
    flat = torch.zeros(layout().numel)
    named = layout().unpack(flat)
    named[X][0], named[Y][0] = x, y
    return flat


def client(objective: Objective | None = None) -> Trainer:
    return Trainer(client_id="client-0", device="cpu", objective=objective)


def train(
    trainer: Trainer | None = None,
    *,
    model: ModelConfig = MODEL,
    training: TrainingConfig = SGD,
    method: ObjectiveConfig | None = None,
    **changes: Any,
) -> TrainResult:
    changes = {"training": training, "objective": method or ObjectiveConfig()} | changes
    return training_round(trainer or client(), model, IMAGES, **changes)


def vector(trainer: Trainer, name: str) -> torch.Tensor:
    return cast(torch.Tensor, trainer.state_dict()[name])


def moved(result: TrainResult) -> tuple[float, float]:
    return two(result.weights - flat_weights(MODEL))


def test_plain_sgd_by_hand() -> None:
    result = train(client(TwoBiases()))
    # Two steps of -0.1 * (3, 4).
    assert moved(result) == pytest.approx((-0.6, -0.8), rel=1e-5)
    assert (result.metrics.objective_term.value, result.variate_change) == (0.0, None)


def test_sgd_decays_weights_as_an_l2_term() -> None:
    one = SGD.model_copy(update={"weight_decay": 0.5, "local_amount": 1})
    weights = at_two(2.0, -1.0)
    result = train(client(TwoBiases()), training=one, weights=weights)
    # 2 - 0.1 * (3 + 0.5 * 2) and -1 - 0.1 * (4 - 0.5 * 1)
    assert two(result.weights) == pytest.approx((1.6, -1.35), rel=1e-5)


def test_fedprox_pulls_back_to_the_received_weights() -> None:
    method = ObjectiveConfig(method="fedprox", proximal_mu=2.0)
    result = train(client(TwoBiases()), method=method)
    # At the received weights there is no pull: (-0.3, -0.4). Then the gradient is
    # (3, 4) + 2 * (-0.3, -0.4) = (2.4, 3.2): (-0.24, -0.32) more.
    assert moved(result) == pytest.approx((-0.54, -0.72), rel=1e-5)
    # 2 / 2 * (0.3^2 + 0.4^2) = 0.25 in the second step, 0 in the first.
    assert result.metrics.objective_term.value == pytest.approx(0.125, rel=1e-5)
    # The loss is reported without it.
    start = two(flat_weights(MODEL))
    expected = 3 * (start[0] - 0.15) + 4 * (start[1] - 0.2)
    assert result.metrics.loss.value == pytest.approx(expected, rel=1e-4)


def test_fedprox_counts_before_clipping() -> None:
    method = ObjectiveConfig(method="fedprox", proximal_mu=2.0)
    clipped = SGD.model_copy(update={"max_grad_norm": 2.0})
    result = train(client(TwoBiases()), method=method, training=clipped)
    # (3, 4) of norm 5 to 2: (1.2, 1.6), a move by (-0.12, -0.16). Then (3, 4) - 2 * (0.12, 0.16)
    # points the same way, and is clipped to the same.
    assert moved(result) == pytest.approx((-0.24, -0.32), rel=1e-5)


def test_contrast_by_hand() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    received = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    previous = torch.tensor([[0.0, 5.0], [0.0, 1.0]])
    loss = contrastive_loss(z, received, previous, temperature=0.5)
    # Cosines: first row 1 and 0, second row 4/5 and 1.
    first = -math.log(math.exp(2.0) / (math.exp(2.0) + math.exp(0.0)))
    second = -math.log(math.exp(1.6) / (math.exp(1.6) + math.exp(2.0)))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    # d loss / d(s_p - s_r) = sigmoid((s_p - s_r) / T) / T / B. In row 1, d s_p / d z = (0, 1)
    # and d s_r / d z = 0 across z. In row 2, of length 2: (0, 0) for s_p, (0.6, 0) / 2 for s_r.
    assert z.grad is not None
    row_1 = 1 / (1 + math.exp(2.0)) / 0.5 / 2
    row_2 = 1 / (1 + math.exp(-0.4)) / 0.5 / 2
    assert z.grad[0].tolist() == pytest.approx([0.0, row_1], abs=1e-6)
    assert z.grad[1].tolist() == pytest.approx([-0.3 * row_2, 0.0], abs=1e-6)


def test_equal_models_contrast_to_log_two() -> None:
    z = torch.randn(3, 5, generator=generator("z"))
    assert contrastive_loss(z, z, z, temperature=0.5).item() == pytest.approx(math.log(2))


def representation(unet: PrunedUNet, batch: Batch) -> torch.Tensor:
    """The middle block's output in the network's own forward pass, (B, D)."""
    with output_of(middle_block(unet)) as caught:
        EpsilonObjective().loss(unet, batch)
    return caught[0].flatten(1)


def test_moons_step_is_the_gradient_of_its_formula() -> None:
    trainer, method = client(), ObjectiveConfig(method="moon", moon_mu=3.0, moon_temperature=0.5)
    one = SGD.model_copy(update={"local_amount": 1, "learning_rate": 1.0})
    previous = train(
        trainer, training=one, method=method, weights=flat_weights(MODEL, seed=5)
    ).weights
    assert torch.equal(vector(trainer, OWN_WEIGHTS), previous)
    result = train(trainer, training=one, method=method, interval=2)
    plain = train(training=one, interval=2)
    # The same by hand, with three separate networks.
    rng = generator("train", 7, "client-0", 2, 1)
    order = torch.randperm(len(IMAGES), generator=rng)[:4]
    clean = IMAGES[order].float() / 127.5 - 1
    batch = noised(clean, build_scheduler(DiffusionConfig()), rng, torch.device("cpu"))
    current, received, before = (build_unet(MODEL, seed=0) for _ in range(3))
    before.load_state_dict(layout().unpack(previous))
    with torch.no_grad():
        near, far = representation(received, batch), representation(before, batch)
    term = 3.0 * contrastive_loss(representation(current, batch), near, far, temperature=0.5)
    term.backward()  # type: ignore[no-untyped-call]
    assert result.metrics.objective_term.value == pytest.approx(term.item(), rel=1e-4)
    assert result.metrics.loss.value == plain.metrics.loss.value
    difference = layout().unpack(plain.weights - result.weights)
    for name, parameter in current.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(difference[name], gradient, rtol=1e-3, atol=1e-6), name
    assert any(float(tensor.abs().max()) > 1e-4 for tensor in difference.values())


def test_moon_adds_nothing_before_there_is_a_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    trainer, method = client(), ObjectiveConfig(method="moon", moon_mu=1.0)
    first = train(trainer, training=ADAM, method=method)
    assert torch.equal(first.weights, train(training=ADAM).weights)
    assert first.metrics.objective_term.value == 0.0
    second = train(trainer, training=ADAM, method=method, edge_round=2)
    assert second.metrics.objective_term.value > 0
    assert caplog.text.count("has no previous local model yet, so MOON's term is 0") == 1


def test_moon_contrasts_with_the_round_just_before() -> None:
    trainer, method = client(), ObjectiveConfig(method="moon", moon_mu=3.0)
    options: dict[str, Any] = {"training": SGD, "method": method}
    first = train(trainer, **options).weights
    second = train(trainer, **options, edge_round=2).weights
    assert not torch.equal(first, second)
    third = train(trainer, **options, edge_round=3)

    def third_after(own: torch.Tensor) -> TrainResult:
        """The third round of a client that remembers these weights."""
        other = client()
        other.load_state_dict(trainer.state_dict() | {"steps": 4, OWN_WEIGHTS: own})
        return train(other, **options, edge_round=3)

    assert torch.equal(third.weights, third_after(second).weights)
    assert not torch.equal(third.weights, third_after(first).weights)


def test_scaffold_by_hand() -> None:
    trainer, method = client(TwoBiases()), ObjectiveConfig(method="scaffold")
    state = trainer.state_dict() | {"layout": layout().to_json(), VARIATE: at_two(0.5, 2.0)}
    trainer.load_state_dict(state)
    result = train(trainer, method=method, variate=at_two(1.0, 0.0))
    # g - c_i + c = (3, 4) - (0.5, 2) + (1, 0) = (3.5, 2), twice.
    assert moved(result) == pytest.approx((-0.7, -0.4), rel=1e-5)
    # Option II: c_i - c + (x - y) / (K lr) = (0.5, 2) - (1, 0) + (0.7, 0.4) / 0.2 = (3, 4).
    assert two(vector(trainer, VARIATE)) == pytest.approx((3.0, 4.0), rel=1e-5)
    assert result.variate_change is not None
    assert two(result.variate_change) == pytest.approx((2.5, 2.0), rel=1e-5)
    assert (result.variate_change != 0).sum() == 2
    assert result.metrics.objective_term.value == 0.0


def test_scaffold_corrects_before_clipping_and_learns_what_was_given() -> None:
    trainer, method = client(TwoBiases()), ObjectiveConfig(method="scaffold")
    clipped = SGD.model_copy(update={"max_grad_norm": 2.5})
    result = train(trainer, method=method, variate=at_two(0.0, -4.0), training=clipped)
    # (3, 4) - 0 + (0, -4) = (3, 0), clipped to (2.5, 0).
    assert moved(result) == pytest.approx((-0.5, 0.0), rel=1e-5)
    # c_i+ = 0 - (0, -4) + (2.5, 0), which is also option II: (0.5, 0) / 0.2 - (0, -4).
    assert two(vector(trainer, VARIATE)) == pytest.approx((2.5, 4.0), rel=1e-5)


def test_scaffold_with_adam_says_what_it_means_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer, method = client(TwoBiases()), ObjectiveConfig(method="scaffold")
    zeros = torch.zeros(layout().numel)
    wide = ADAM.model_copy(update={"max_grad_norm": 1e9})
    options: dict[str, Any] = {"method": method, "training": wide}
    train(trainer, variate=zeros, **options)
    # The mean gradient, where (x - y) / (K lr) would be Adam's sign of it.
    assert two(vector(trainer, VARIATE)) == pytest.approx((3.0, 4.0), rel=1e-5)
    train(trainer, variate=zeros, edge_round=2, **options)
    assert caplog.text.count("SCAFFOLD is derived for sgd; with adam") == 1
    caplog.clear()
    train(variate=zeros, method=method)
    assert "SCAFFOLD" not in caplog.text


def test_scaffold_needs_the_servers_variate() -> None:
    with pytest.raises(ReplyError, match="carries no control variate"):
        train(method=ObjectiveConfig(method="scaffold"))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "method",
    [
        ObjectiveConfig(method="fedprox", proximal_mu=0.0),
        ObjectiveConfig(method="moon", moon_mu=0.0),
        ObjectiveConfig(method="scaffold"),
    ],
    ids=lambda method: method.method,
)
def test_without_weight_every_method_is_fedavg_to_the_bit(
    method: ObjectiveConfig, optimizer: str
) -> None:
    """Two rounds with dropout; scaffold's variates are zero, so only its first counts."""
    model = MODEL.model_copy(update={"dropout": 0.2})
    training = ADAM.model_copy(update={"optimizer": optimizer})
    plain, other = client(), client()
    zeros = torch.zeros(layout().numel)
    for edge_round in (1,) if method.method == "scaffold" else (1, 2):
        options: dict[str, Any] = {"model": model, "training": training, "edge_round": edge_round}
        expected = train(plain, **options)
        result = train(other, method=method, variate=zeros, **options)
        assert torch.equal(result.weights, expected.weights)
        assert result.metrics.loss == expected.metrics.loss
        assert result.metrics.objective_term.value == 0.0


def shrink() -> Cut:
    """A cut of MODEL to NARROW that keeps the first channels of everything."""
    kept = tuple(tuple(tuple(range(size)) for size in shape) for shape in layout(NARROW).shapes)
    return Cut(layout(), kept)


@pytest.mark.parametrize(
    ("method", "name", "kind"),
    [("scaffold", VARIATE, "control variate"), ("moon", OWN_WEIGHTS, "own weights")],
)
def test_what_a_method_keeps_is_cut_with_the_network(
    method: str, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = client()
    options: dict[str, Any] = {"method": ObjectiveConfig(method=method), "training": ADAM}
    train(trainer, variate=torch.zeros(layout().numel), **options)
    before = vector(trainer, name)
    cut = shrink().apply_flat(before, layout(NARROW))
    state = trainer.state_dict()
    # With moments that start afresh: the two are independent of one another.
    zeros = torch.zeros(layout(NARROW).numel)
    narrow: dict[str, Any] = {
        "model": NARROW,
        "variate": zeros,
        "optimizer_moments": "reset",
        **options,
    }
    result = train(trainer, cut=shrink(), **narrow)
    assert f"weights; {kind} cut" in caplog.text
    assert "optimiser moments reset (no cut to follow)" in caplog.text
    started = client()
    started.load_state_dict(
        {"steps": state["steps"], "layout": layout(NARROW).to_json(), name: cut}
    )
    assert torch.equal(train(started, **narrow).weights, result.weights)
    # Without a cut it starts afresh, and says so.
    lost = client()
    lost.load_state_dict(state)
    train(lost, **narrow)
    assert f"weights; {kind} reset (no cut to follow)" in caplog.text
