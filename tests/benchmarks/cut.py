"""What the cut costs at once, what of it is left after some steps, and what could be mended.

Central training of the digits' U-Net, without federation, about four minutes on one core: 1,200
steps with the sparsity term, then the cut, then up to 240 steps more. Each row is the loss, with
the same noise for all, at the cut and after so many steps:

- ``cut``: as the product does it, queries scaled so that attention's softmax has its scale;
- ``softmax scale lost``: the same without that scale;
- ``normalisations re-estimated``: the scale and shift of each group normalisation changed so that
  its outputs have mean and spread of the dense network's again, on training images;
- ``dense``: the network without a cut, trained on.

    python tests/benchmarks/cut.py [--ratios 0.25 0.4375] [--sparsity 1e-4]
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.training import of_one_class, train_task

from fedphd.client.trainer import ClientImages, Trainer
from fedphd.common.config.data import DataConfig
from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.data.images import LabelledImages, to_model_range
from fedphd.common.unet.groups import Cut
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import PrunedUNet, build_scheduler, build_unet, unet_config
from fedphd.common.wire.messages import UNetSpec
from fedphd.server.pruning import prune_unet

AFTER = (15, 45, 120, 240)
PROBES = 1024


class Bench:
    """The digits, and the loss on some of them with noise that stays the same."""

    def __init__(self) -> None:
        self.config = load_config(CloudConfig, None, {"preset": "digits"})
        model = self.config.model
        source = LabelledImages(DataConfig(source="digits"))
        self.images = source.decode(image_size=model.image_size, channels=model.channels).images
        rng = torch.Generator().manual_seed(5)
        chosen = torch.randperm(len(self.images), generator=rng)[:PROBES]
        clean = to_model_range(self.images[chosen])
        self.noise = torch.randn(clean.shape, generator=rng)
        self.timesteps = torch.randint(1000, (len(clean),), generator=rng)
        scheduler = build_scheduler(self.config.diffusion)
        self.noisy = scheduler.add_noise(clean, self.noise, self.timesteps)  # type: ignore[arg-type]

    @torch.no_grad()
    def predict(self, unet: PrunedUNet) -> Tensor:
        """The noise that ``unet`` sees in the probes."""
        return unet.eval()(self.noisy, self.timesteps, return_dict=False)[0]

    def loss(self, unet: PrunedUNet) -> float:
        """Mean squared error of the noise."""
        return float((self.predict(unet) - self.noise).square().mean())

    def train(self, trainer: Trainer, unet: PrunedUNet, steps: int, **changes: Any) -> None:
        """Train ``unet`` in place."""
        layout = TensorLayout.of(unet.state_dict())
        task = train_task(
            self.config.model,
            training=self.config.training.model_copy(
                update={"local_unit": "steps", "local_amount": steps}
            ),
            network=UNetSpec(unet=unet_config(unet), layout=layout.to_json()),
            **changes,
        )
        data = ClientImages(of_one_class(self.images))
        result = trainer.train(task, layout.pack(unet.state_dict()), data)
        unet.load_state_dict(layout.unpack(result.weights))

    def losses(self, unet: PrunedUNet, state: Any, cut: Cut | None) -> list[float]:
        """The loss now and after more steps, going on with the moments of ``state``."""
        unet, trainer, losses, done = copy.deepcopy(unet), Trainer(client_id="one"), [], 0
        trainer.load_state_dict(state)
        losses.append(self.loss(unet))
        for steps in AFTER:
            self.train(trainer, unet, steps - done, cut=cut, edge_round=1 + steps)
            done = steps
            losses.append(self.loss(unet))
        return losses


def without_scale(unet: PrunedUNet, cut: Cut) -> PrunedUNet:
    """The pruned network as if nothing had been scaled at the cut."""
    unet = copy.deepcopy(unet)
    state = unet.state_dict()
    for name, factor in cut.scales.items():
        state[name].div_(factor)
    return unet


def re_estimated(bench: Bench, dense: PrunedUNet, pruned: PrunedUNet, cut: Cut) -> PrunedUNet:
    """The pruned network with each normalisation's outputs spread as in the dense one."""
    unet, originals = copy.deepcopy(pruned), dict(dense.named_modules())
    kept = dict(zip(cut.layout.names, cut.kept, strict=True))
    for name, norm in unet.named_modules():
        if not isinstance(norm, nn.GroupNorm):
            continue
        stays = kept[f"{name}.weight"][0] or tuple(range(norm.num_channels))
        want = [moment[list(stays)] for moment in output_moments(bench, dense, originals[name])]
        have = output_moments(bench, unet, norm)
        factor = (want[1] / have[1].clamp(min=1e-4)).clamp(0.25, 4)
        with torch.no_grad():
            norm.bias.copy_(want[0] - (have[0] - norm.bias) * factor)
            norm.weight.mul_(factor)
    return unet


def output_moments(bench: Bench, unet: PrunedUNet, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of what ``module`` puts out, each (C,)."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda *call: seen.append(call[2]))
    bench.predict(unet)
    handle.remove()
    channels = seen[0].transpose(0, 1).flatten(1)
    return channels.mean(1), channels.std(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.4375])
    parser.add_argument("--sparsity", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench, trainer = Bench(), Trainer(client_id="one")
    dense = build_unet(bench.config.model, seed=0)
    bench.train(trainer, dense, args.steps, sparsity_lambda=args.sparsity)
    state = trainer.state_dict()
    print("| network | parameters | at the cut | " + " | ".join(f"+{n}" for n in AFTER) + " |")
    print("|---" * (3 + len(AFTER)) + "|")

    def row(name: str, unet: PrunedUNet, cut: Cut | None) -> None:
        size = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
        cells = " | ".join(f"{loss:.4f}" for loss in bench.losses(unet, state, cut))
        print(f"| {name} | {size:.2f} M | {cells} |", flush=True)

    row("dense", dense, None)
    for ratio in args.ratios:
        result = prune_unet(dense, ratio=ratio)
        unet, cut = result.unet, result.cut
        row(f"cut {ratio:g}", unet, cut)
        row("softmax scale lost", without_scale(unet, cut), cut)
        row("normalisations re-estimated", re_estimated(bench, dense, unet, cut), cut)


if __name__ == "__main__":
    main()
