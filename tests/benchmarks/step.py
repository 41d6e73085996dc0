"""What a client's training step takes beside a plain loop of diffusers and torch.

The plain loop is what one would write without federation: ``UNet2DModel``, ``DDPMScheduler``,
Adam, a clipped gradient, in float32. Ours is ``Trainer.train``, with all that an edge round adds:
it reads the weights, draws by seeds, measures, keeps the moments. In the sparse phase there is the
sparsity term besides, which the plain loop does not have. Turn by turn in one process, since times
drift on a shared machine: the ratios are what to look at.

    python tests/benchmarks/step.py                      # about 6 minutes
    python tests/benchmarks/step.py --presets digits --turns 9
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers import UNet2DModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.training import of_one_class, train_task

from fedphd.client.trainer import ClientImages, Trainer
from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.unet.arithmetic import has_bf16
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_scheduler, build_unet

# Steps of a turn; that a turn lasts some seconds.
STEPS = {"digits": 40, "cifar10-16": 10, "cifar10": 1}
# Of the paper's network a batch of 128 would take a minute.
BATCH = {"cifar10": 8}
IMAGES = 64


def plain(config: CloudConfig, images: torch.Tensor, batch: int, steps: int) -> Callable[[], None]:
    """A turn of the plain loop."""
    ours = build_unet(config.model, seed=0)
    known = inspect.signature(UNet2DModel).parameters
    unet = UNet2DModel(**{key: value for key, value in ours.config.items() if key in known})
    unet.load_state_dict(ours.state_dict())
    scheduler = build_scheduler(config.diffusion)
    training = config.training
    optimizer = torch.optim.Adam(unet.parameters(), lr=training.learning_rate)

    def turn() -> None:
        unet.train()
        for _ in range(steps):
            chosen = images[torch.randint(len(images), (batch,))]
            noise = torch.randn_like(chosen)
            times = torch.randint(scheduler.config["num_train_timesteps"], (batch,))
            predicted = unet(scheduler.add_noise(chosen, noise, times), times).sample
            loss = torch.nn.functional.mse_loss(predicted, noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), training.max_grad_norm)
            optimizer.step()

    return turn


def ours(
    config: CloudConfig,
    images: torch.Tensor,
    batch: int,
    steps: int,
    *,
    sparse: bool = False,
    **changes: str,
) -> Callable[[], None]:
    """A turn of a client's edge round; ``changes`` of its training."""
    unet = build_unet(config.model, seed=0)
    weights = TensorLayout.of(unet.state_dict()).pack(unet.state_dict())
    trainer, rounds = Trainer(client_id="client-0", device="cpu"), itertools.count(1)
    training = config.training.model_copy(
        update={
            "local_unit": "steps", "local_amount": steps, "batch_size": batch,
            "precision": "fp32", **changes,
        },
    )  # fmt: skip
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    data = ClientImages(of_one_class(pixels))

    def turn() -> None:
        task = train_task(
            config.model, edge_round=next(rounds), training=training, diffusion=config.diffusion,
            sparsity_lambda=config.pruning.sparsity_lambda if sparse else 0.0,
        )  # fmt: skip
        if trainer.train(task, weights, data).steps != steps:
            raise RuntimeError("another number of steps than the plain loop's")

    return turn


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", default=",".join(STEPS))
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"one of {os.cpu_count()} cores of {platform.machine()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}; median of {arguments.turns} turns"
    )
    # Whether compiled code is used, and what compiling took.
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("fedphd.client.compiled").setLevel(logging.INFO)
    print("bf16 instructions:", "yes" if has_bf16() else "no", "\n")
    print(
        "| network, batch | plain, s per step | fp32 | fp32, sparse phase | bf16 | fp32, compiled "
        "| bf16, compiled |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for name in arguments.presets.split(","):
        config = load_config(CloudConfig, None, {"preset": name, "evaluation.reference": None})
        model, steps = config.model, STEPS[name]
        batch = BATCH.get(name, config.training.batch_size)
        torch.manual_seed(0)
        images = torch.rand(IMAGES, model.channels, model.image_size, model.image_size) * 2 - 1
        turns = [
            plain(config, images, batch, steps),
            ours(config, images, batch, steps),
            ours(config, images, batch, steps, sparse=True),
            ours(config, images, batch, steps, precision="bf16"),
            ours(config, images, batch, steps, compile="always"),
            ours(config, images, batch, steps, precision="bf16", compile="always"),
        ]
        seconds: list[list[float]] = [[] for _ in turns]
        # The first turn also allocates, and compiles.
        for number in range(arguments.turns + 1):
            for turn, found in zip(turns, seconds, strict=True):
                started_s = time.perf_counter()
                turn()
                if number:
                    found.append((time.perf_counter() - started_s) / steps)
        base, *others = map(median, seconds)
        ratios = " | ".join(f"{other / base:.2f}" for other in others)
        print(f"| `{name}`, {batch} | {base:.3g} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
