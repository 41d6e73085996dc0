"""A step asks its device for nothing; what it measured is read at the round's end."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from support.training import flat_weights, train
from torch.utils._python_dispatch import TorchDispatchMode

from fedphd.client import trainer as trainer_module
from fedphd.client.readings import Readings
from fedphd.client.steps import LocalRound
from fedphd.client.trainer import Trainer
from fedphd.common.config.run import ModelConfig, ObjectiveConfig, TrainingConfig
from fedphd.common.data.images import ImageSet
from fedphd.common.errors import FedPhDError
from fedphd.common.rng import generator

MODEL = ModelConfig(image_size=4, block_out_channels=(16, 16), norm_num_groups=8, dropout=0.1)
IMAGES = torch.randint(0, 256, (10, 1, 4, 4), generator=generator("images")).to(torch.uint8)
TRAINING = TrainingConfig(batch_size=4, learning_rate=0.01)


def values(loss: float, norm: float = 1.0) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(loss), "gradient_norm": torch.tensor(norm)}


def readings(device: str) -> Readings:
    return Readings("client 3, round 2", TRAINING, torch.device(device))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_values_are_those_of_each_step(device: str) -> None:
    taken = readings(device)
    assert taken.read() == []
    taken.add(**values(0.5))
    taken.add(**values(0.25, 3.0))
    assert taken.read() == [
        {"loss": 0.5, "gradient_norm": 1.0},
        {"loss": 0.25, "gradient_norm": 3.0},
    ]


def test_a_cpu_looks_at_once_and_a_gpu_at_the_end() -> None:
    text = r"client 3, round 2, step 2: the loss is nan, its gradient's norm 1; .*\(now 0.01\)"
    at_once, at_the_end = readings("cpu"), readings("cuda")
    for taken in (at_once, at_the_end):
        taken.add(**values(0.5))
    with pytest.raises(FedPhDError, match=text):
        at_once.add(**values(math.nan))
    at_the_end.add(**values(math.nan))
    at_the_end.add(**values(math.nan))
    with pytest.raises(FedPhDError, match=text):
        at_the_end.read()


class Calls(TorchDispatchMode):
    """Counts the operations of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.by_name[str(func)] += 1
        return func(*args, **(kwargs or {}))


def a_gpus_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let values be read when a GPU's would be, though they lie on a CPU."""

    def made(name: str, training: TrainingConfig, device: torch.device) -> Readings:
        return Readings(name, training, torch.device("cuda"))

    monkeypatch.setattr(trainer_module, "Readings", made)


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "moon", "scaffold"])
def test_a_step_waits_for_no_value(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpus_readings(monkeypatch)
    calls, step = Calls(), LocalRound.step

    def counted(round_: LocalRound, data: ImageSet, steps_before: int) -> None:
        with calls:
            step(round_, data, steps_before)

    trainer = Trainer(client_id="client-0", device="cpu")
    order: dict[str, Any] = {
        "objective": ObjectiveConfig(method=method), "training": TRAINING, "sparsity_lambda": 1e-4,
        "variate": torch.zeros_like(flat_weights(MODEL)) if method == "scaffold" else None,
    }  # fmt: skip
    # MOON compares from the second round on.
    train(trainer, MODEL, IMAGES, **order)
    monkeypatch.setattr(LocalRound, "step", counted)
    metrics = train(trainer, MODEL, IMAGES, edge_round=2, **order).metrics
    assert (metrics.loss.value or 0) > 0
    assert calls.by_name["aten._fused_adam_.default"] == 3
    # What `item()`, `float()` and `if tensor:` come to.
    assert calls.by_name["aten._local_scalar_dense.default"] == 0


def test_after_a_round_that_failed_the_moments_start_afresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a_gpus_readings(monkeypatch)
    trainer, fresh = (Trainer(client_id="client-0", device="cpu") for _ in range(2))
    broken = flat_weights(MODEL)
    broken[0] = math.nan
    with pytest.raises(FedPhDError, match="round 1, step 1: the loss is nan"):
        train(trainer, MODEL, IMAGES, weights=broken, training=TRAINING)
    after, first = (
        train(t, MODEL, IMAGES, edge_round=2, training=TRAINING) for t in (trainer, fresh)
    )
    assert torch.equal(after.weights, first.weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_a_step_does_not_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    step, strict = LocalRound.step, {"mode": "default"}

    def watched(round_: LocalRound, data: ImageSet, steps_before: int) -> None:
        torch.cuda.set_sync_debug_mode(strict["mode"])
        try:
            step(round_, data, steps_before)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # The round's first step brings the schedule to the device.
        strict["mode"] = "error"

    monkeypatch.setattr(LocalRound, "step", watched)
    trainer = Trainer(client_id="client-0", device="cuda")
    assert train(trainer, MODEL, IMAGES, training=TRAINING, sparsity_lambda=1e-4).steps == 3
