"""Pruning: which channels go, and that the smaller network is the same network without them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch_pruning as tp
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedphd.common.config.roles import read_preset
from fedphd.common.config.run import ModelConfig
from fedphd.common.errors import ConfigError
from fedphd.common.unet.costs import Costs
from fedphd.common.unet.groups import ChannelGroups, Cut
from fedphd.common.unet.model import PrunedUNet, build_unet, unet_config, unet_from_config
from fedphd.server.pruning import Pruned, count_costs, prune_unet

# Three levels, attention in two of them, and a level that its neighbour's residuals reach.
LEVELS = ModelConfig(
    block_out_channels=(16, 32, 32),
    layers_per_block=2,
    attention_levels=(1,),
    attention_head_dim=4,
    norm_num_groups=4,
    dropout=0.1,
)

CONDITIONAL = ModelConfig(class_conditional=True, num_class_embeds=11)


def preset(name: str) -> ModelConfig:
    return ModelConfig.model_validate_json(json.dumps(read_preset(name)["model"]))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return images, torch.tensor([5, 900])


def predict(unet: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return unet.eval()(*inputs(), return_dict=False)[0]


def randomised(unet: PrunedUNet) -> PrunedUNet:
    """Norms and biases start as ones and zeros, which would hide a wrong index."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet


def pruned_in_place(unet: PrunedUNet, pruned: Pruned) -> PrunedUNet:
    """A copy from which torch-pruning removed the same channels of every group's first layer."""
    twin = copy.deepcopy(unet)
    graph = tp.DependencyGraph().build_dependency(twin, inputs())
    names = {module: name for name, module in twin.named_modules()}
    kept = dict(zip(pruned.cut.layout.names, pruned.cut.kept, strict=True))
    for group in list(graph.get_all_groups(ignored_layers=[twin.conv_out])):
        root = group[0].dep.target.module
        stays = kept[f"{names[root]}.weight"][0]
        assert stays is not None
        goes = [i for i in range(len(group[0].idxs)) if i not in stays]
        graph.get_pruning_group(root, group[0].dep.handler, goes).prune()
    for module in twin.modules():
        if isinstance(module, Downsample2D | Upsample2D):
            module.channels = module.conv.in_channels
    return twin


@pytest.mark.parametrize("config", [ModelConfig(), LEVELS, CONDITIONAL])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_outputs_are_those_of_torch_prunings_network_to_the_bit(
    config: ModelConfig, ratio: float
) -> None:
    unet = randomised(build_unet(config, seed=2))
    pruned = prune_unet(unet, ratio=ratio)
    twin = pruned_in_place(unet, pruned)
    expected = twin.state_dict()
    # torch-pruning knows nothing of softmax's scale.
    for name, factor in pruned.cut.scales.items():
        expected[name].mul_(factor)
    state = pruned.unet.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert torch.equal(predict(pruned.unet), predict(twin))


def attention_scores(unet: PrunedUNet, hidden: torch.Tensor) -> torch.Tensor:
    """Scores before softmax of the bottleneck's first head, for ``hidden``, (N, width)."""
    attention = unet.mid_block.attentions[0]
    width = unet_config(unet)["attention_head_dim"]
    with torch.no_grad():
        query, key = attention.to_q(hidden)[:, :width], attention.to_k(hidden)[:, :width]
    return query @ key.T / width**0.5


def test_attention_scores_of_the_channels_that_stay_are_as_before() -> None:
    unet = randomised(build_unet(ModelConfig(), seed=2))
    attention = unet.mid_block.attentions[0]

    def kept(cut: Cut) -> tuple[list[int], list[int]]:
        rows, columns = cut.kept[cut.layout.names.index("mid_block.attentions.0.to_q.weight")]
        assert rows is not None
        assert columns is not None
        return list(rows), list(columns)

    rows, _ = kept(prune_unet(unet, ratio=0.5).cut)
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k):
            gone = [i for i in range(len(layer.bias)) if i not in rows]
            layer.weight[gone], layer.bias[gone] = 0.0, 0.0
    # Channels of norm 0 go first, so the same ones go again.
    pruned = prune_unet(unet, ratio=0.5)
    again, columns = kept(pruned.cut)
    assert again == rows
    hidden = torch.zeros(5, len(attention.to_q.weight))
    hidden[:, columns] = torch.randn(5, len(columns), generator=torch.Generator().manual_seed(1))
    scores = attention_scores(pruned.unet, hidden[:, columns])
    torch.testing.assert_close(scores, attention_scores(unet, hidden))


def test_a_fresh_network_of_the_same_description_takes_the_weights() -> None:
    pruned = prune_unet(randomised(build_unet(ModelConfig(), seed=2)), ratio=0.25).unet
    fresh = unet_from_config(json.loads(json.dumps(unet_config(pruned))))
    fresh.load_state_dict(pruned.state_dict(), strict=True)
    assert torch.equal(predict(fresh), predict(pruned))


def test_widths_shrink_by_whole_groups_and_heads_stay() -> None:
    config = unet_config(prune_unet(build_unet(ModelConfig(), seed=2), ratio=0.25).unet)
    assert config["block_out_channels"] == [24, 48]
    assert config["attention_head_dim"] == 6
    assert config["norm_num_groups"] == 8
    assert config["time_feature_width"] == 32


def test_each_normalisation_group_and_each_head_loses_the_same_number() -> None:
    pruned = prune_unet(randomised(build_unet(ModelConfig(), seed=2)), ratio=0.25)
    layout, uneven = pruned.cut.layout, []
    for name, shape, kept in zip(layout.names, layout.shapes, pruned.cut.kept, strict=True):
        layer, _, parameter = name.rpartition(".")
        if parameter != "weight" or not ("norm" in layer or layer.endswith(("conv_in", "to_q"))):
            continue
        rows = kept[0]
        assert rows is not None
        assert len(rows) == shape[0] * 3 // 4
        if len(set(torch.bincount(torch.tensor(rows) // (shape[0] // 8)).tolist())) > 1:
            uneven.append(layer)
    # They normalise 64 channels and 32 of a skip connection together, in groups of 12.
    assert sorted(uneven) == ["up_blocks.0.resnets.1.norm1", "up_blocks.1.resnets.0.norm1"]


def test_the_channels_of_least_norm_go() -> None:
    unet = randomised(build_unet(ModelConfig(), seed=2))
    groups, state = ChannelGroups.of(unet), unet.state_dict()
    # Channels 0 to 3 are conv_in's first normalisation group, of which one goes: number 2.
    with torch.no_grad():
        for (name, dim), owners in groups.channels.items():
            wanted = groups.channels["conv_in.weight", 0][2]
            for index, owner in enumerate(owners):
                if owner == wanted:
                    state[name].select(dim, index).zero_()
    pruned = prune_unet(unet, ratio=0.25)
    kept = dict(zip(pruned.cut.layout.names, pruned.cut.kept, strict=True))
    rows = kept["conv_in.weight"][0]
    assert rows is not None
    assert rows[:3] == (0, 1, 3)
    # The skip of conv_in enters here as channels 64 to 95.
    columns = kept["up_blocks.1.resnets.0.norm1.weight"][0]
    assert columns is not None
    assert [c - 64 for c in columns if c >= 64] == list(rows)


def test_the_given_network_is_left_alone() -> None:
    unet = build_unet(ModelConfig(), seed=2).train()
    before, random = {k: v.clone() for k, v in unet.state_dict().items()}, torch.get_rng_state()
    pruned = prune_unet(unet, ratio=0.5).unet
    assert unet_config(unet)["block_out_channels"] == [32, 64]
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert pruned.training
    with torch.no_grad():
        pruned.conv_out.bias.fill_(9.0)
    assert torch.equal(unet.conv_out.bias, before["conv_out.bias"])


def test_ratio_0_gives_the_dense_network() -> None:
    unet = build_unet(ModelConfig(), seed=2)
    pruned = prune_unet(unet, ratio=0.0)
    assert unet_config(pruned.unet) == unet_config(unet)
    assert torch.equal(predict(pruned.unet), predict(unet))
    assert pruned.report.achieved_ratio == 0


def test_a_pruned_network_can_be_pruned_again() -> None:
    once = prune_unet(build_unet(ModelConfig(), seed=2), ratio=0.25).unet
    twice = prune_unet(once, ratio=0.33).unet
    assert unet_config(twice)["block_out_channels"] == [16, 32]
    assert unet_config(twice)["time_feature_width"] == 32
    assert predict(twice).isfinite().all()


def test_the_cut_fits_anything_with_the_dense_names() -> None:
    unet = build_unet(ModelConfig(), seed=2)
    pruned = prune_unet(unet, ratio=0.25)
    moments = {name: 2 * tensor for name, tensor in unet.state_dict().items()}
    cut = Cut.from_json(pruned.cut.to_json()).apply(moments)
    assert all(torch.equal(cut[k], 2 * v) for k, v in pruned.unet.state_dict().items())


def test_the_report_says_what_was_asked_for_and_what_was_achieved() -> None:
    report = prune_unet(build_unet(ModelConfig(), seed=2), ratio=0.3).report
    assert report.requested_ratio == 0.3
    assert report.widths_before == (32, 64)
    assert report.widths_after == (24, 48)
    assert report.achieved_ratios == (0.25, 0.25)
    assert report.achieved_ratio == 0.25
    assert report.before == Costs(
        parameters=701_345, macs=16_162_016, encoder_macs=20_480 + 20_736 + 2_540_384 + 2_652_544
    )
    assert (report.after.parameters, report.after.macs) == (396_409, 9_119_416)
    assert report.after.encoder_macs < report.before.encoder_macs


def test_a_ratio_that_breaks_attention_heads_is_refused() -> None:
    # Of 4 channels per group 0.6 are to go, of 8 it is 1.2: one each, so a quarter and an eighth.
    config = ModelConfig(
        block_out_channels=(32, 64), attention_levels=(0, 1), norm_num_groups=8, image_size=8
    )
    with pytest.raises(ConfigError, match=r"pruning.ratio = 0.15 .* \[24, 56\]"):
        prune_unet(build_unet(config, seed=2), ratio=0.15)


@pytest.mark.parametrize(
    ("ratio", "million_parameters", "giga_macs"),
    [(None, 35.75, 6.06), (0.25, 20.13, 3.41), (0.5, 8.97, 1.52)],
)
def test_cifar10_reference_figures(
    ratio: float | None, million_parameters: float, giga_macs: float
) -> None:
    unet = build_unet(preset("cifar10"), seed=0)
    costs = count_costs(unet) if ratio is None else prune_unet(unet, ratio=ratio).report.after
    assert round(costs.parameters / 1e6, 2) == million_parameters
    assert round(costs.macs / 1e9, 2) == giga_macs


def test_macs_leave_out_the_products_of_attention() -> None:
    unet = build_unet(ModelConfig(image_size=16, attention_levels=(0,)), seed=2).eval()
    # Of attention in one kernel torch counts nothing on CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, 1, 16, 16), torch.tensor(5))
    # QK^T and AV: three times between 256 pixels of 32 channels, in the middle 64 of 64.
    products = 2 * (3 * 256 * 256 * 32 + 64 * 64 * 64)
    every = counter.get_total_flops() / 2
    assert products / every == pytest.approx(0.17, abs=0.001)
    # Biases and normalisations, 0.7% here, are what torch leaves out.
    assert count_costs(unet).macs == pytest.approx(every - products, rel=0.01)


def test_layers_are_told_before_and_after() -> None:
    report = prune_unet(build_unet(ModelConfig(), seed=2), ratio=0.25).report
    layers = {layer.name: layer for layer in report.layers}
    # 3 x 3 weights and a bias for each channel, at 64 pixels.
    assert layers["conv_in"].channels == (32, 24)
    assert layers["conv_in"].parameters == (320, 240)
    assert layers["conv_in"].macs == (64 * 320, 64 * 240)
    assert layers["conv_out"].parameters == (9 * 32 + 1, 9 * 24 + 1)
    # All but the normalisations, which have a scale and a shift per channel.
    for at, costs in enumerate((report.before, report.after)):
        counted = sum(layer.parameters[at] for layer in report.layers)
        assert 0.99 * costs.parameters < counted < costs.parameters
