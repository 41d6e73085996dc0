"""Structured pruning of the U-Net's widths: the result is a smaller regular U-Net."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp  # type: ignore[import-untyped]
from torch import Tensor

from fedphd.common.config.widths import prune_widths, pruned_head_dim
from fedphd.common.errors import ConfigError
from fedphd.common.unet.costs import Costs, LayerChange, PruneReport
from fedphd.common.unet.groups import ChannelGroups, Cut, example_inputs
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import PrunedUNet, unet_config, unet_from_config

# What a forward pass to the end of the middle block goes through.
_ENCODER = ("time_embedding", "conv_in", "down_blocks", "mid_block")


@dataclass(frozen=True)
class Pruned:
    """A pruned U-Net, and how to cut anything else that has the dense one's tensors."""

    unet: PrunedUNet
    cut: Cut
    report: PruneReport


def prune_unet(unet: PrunedUNet, *, ratio: float) -> Pruned:
    """Remove the channels of least group 2-norm (DepGraph, arXiv:2301.12900).

    Every attention head and every normalisation group of a layer's output loses the same number of
    channels, and there are as many of them afterwards. (Where an up block normalises two outputs of
    unequal width together, a group may lose more or fewer.) So widths follow ``prune_widths``, and
    the result is built from a config like any other U-Net, on the CPU. Queries are scaled so that
    what softmax divides by stays the same. The sinusoidal time features stay, and so does ``unet``.
    ``ratio`` is the share of each width to remove, in [0, 1).

    Raises:
        ConfigError: attention heads would not all keep the same whole number of channels.
    """
    config, state = unet_config(unet), unet.state_dict()
    before = config["block_out_channels"]
    widths = prune_widths(before, ratio, config["norm_num_groups"])
    try:
        head_dim = pruned_head_dim(config, widths, ratio)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    pruned = unet_from_config(
        {**config, "block_out_channels": widths, "attention_head_dim": head_dim}
    )
    groups = ChannelGroups.of(unet)
    norms = torch.split(groups.norms(state).cpu(), list(groups.sizes))
    quotas = _quotas(groups, config, pruned.state_dict())
    keep = torch.cat([_strongest(n, *quotas[group]) for group, n in enumerate(norms)])
    # Attention divides the products of queries and keys by the root of the head's width: narrower
    # queries are scaled so that the products of the channels that stay count as before.
    scale = math.sqrt(head_dim / config["attention_head_dim"])
    queries = [name for name in state if ".to_q." in name]
    cut = groups.cut(TensorLayout.of(state), keep.tolist(), dict.fromkeys(queries, scale))
    pruned.load_state_dict(cut.apply(state))
    pruned.train(unet.training)
    (before_costs, before_layers), (after_costs, after_layers) = map(_count, (unet, pruned))
    report = PruneReport(
        requested_ratio=ratio,
        achieved_ratio=1 - sum(widths) / sum(before),
        achieved_ratios=tuple(1 - a / b for a, b in zip(widths, before, strict=True)),
        widths_before=tuple(before),
        widths_after=tuple(widths),
        before=before_costs,
        after=after_costs,
        layers=_changes(before_layers, after_layers),
    )
    return Pruned(pruned, cut, report)


def count_costs(unet: PrunedUNet) -> Costs:
    """Costs of ``unet`` by torch-pruning's counter."""
    return _count(unet)[0]


# Channels that come out of a layer, its parameters and its multiply-accumulates.
_Layer = tuple[int, int, int]


def _count(unet: PrunedUNet) -> tuple[Costs, dict[str, _Layer]]:
    """The costs of ``unet``, and of each layer with a matrix of weights by name."""
    # On the meta device a forward pass has shapes to count but no arithmetic to do.
    with torch.device("meta"):
        twin = unet_from_config(unet_config(unet))
        macs, parameters, by_layer, parameters_of = tp.utils.count_ops_and_params(
            twin, example_inputs(twin), layer_wise=True
        )
    encoder = sum(
        by_layer[layer] or 0
        for name, layer in twin.named_modules()
        if name.startswith(_ENCODER) and not [*layer.children()]
    )
    layers = {
        name: (len(layer.weight), int(parameters_of[layer]), int(by_layer[layer] or 0))
        for name, layer in twin.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    return Costs(parameters=int(parameters), macs=int(macs), encoder_macs=int(encoder)), layers


def _changes(before: Mapping[str, _Layer], after: Mapping[str, _Layer]) -> tuple[LayerChange, ...]:
    found = []
    for name, old in before.items():
        channels, parameters, macs = zip(old, after[name], strict=True)
        found.append(LayerChange(name=name, channels=channels, parameters=parameters, macs=macs))
    return tuple(found)


def _quotas(
    groups: ChannelGroups, config: Mapping[str, Any], pruned: Mapping[str, Tensor]
) -> dict[int, tuple[int, int]]:
    """For each dependency group: its number of equal blocks, and how many channels each keeps."""
    group_of = [group for group, size in enumerate(groups.sizes) for _ in range(size)]
    quotas = {}
    for (name, dim), channels in groups.channels.items():
        # Outputs of a layer are in one dependency group; inputs may come from several.
        if dim != 0 or pruned[name].ndim == 1:
            continue
        group = group_of[channels[0]]
        if name.startswith("time_embedding."):
            blocks = 1
        elif name.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight")):
            blocks = groups.sizes[group] // config["attention_head_dim"]
        else:
            blocks = config["norm_num_groups"]
        quotas[group] = blocks, len(pruned[name]) // blocks
    return quotas


def _strongest(norms: Tensor, blocks: int, kept: int) -> Tensor:
    """Mark the ``kept`` largest of each block of ``norms``, (C,); bool, (C,)."""
    rows = norms.view(blocks, -1)
    # Stable: which of two equal channels stays must not depend on the machine.
    order = rows.argsort(dim=1, descending=True, stable=True)
    marked = torch.zeros_like(rows, dtype=torch.bool)
    return marked.scatter_(1, order[:, :kept], True).view(-1)
