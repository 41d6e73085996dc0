"""Coupled channels: the penalty over them, and cuts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp

from fedphd.common.config.run import ModelConfig
from fedphd.common.errors import ReplyError
from fedphd.common.unet.groups import ChannelGroups, Cut, GroupPenalty
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import PrunedUNet, build_unet

CUT = Cut(
    TensorLayout(("a", "b", "c"), ((3, 4), (3,), (2,))),
    (((0, 2), (1, 2, 3)), ((0, 2),), (None,)),
)


@pytest.fixture
def unet() -> PrunedUNet:
    return build_unet(ModelConfig(), seed=1)


def zeroed(unet: PrunedUNet) -> dict[str, torch.nn.Parameter]:
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    return dict(unet.named_parameters())


def norms_by_torch_pruning(unet: PrunedUNet) -> torch.Tensor:
    """Channel by channel, slice by slice, from a graph traced on the real weights."""
    inputs = (torch.zeros(1, 1, 8, 8), torch.zeros((), dtype=torch.long))
    graph = tp.DependencyGraph().build_dependency(unet, inputs)
    norms = []
    for group in graph.get_all_groups(ignored_layers=[unet.conv_out]):
        energies = [torch.zeros(()) for _ in group[0].idxs]
        for item in group.items:
            module = item.dep.target.module
            if not hasattr(module, "weight"):
                continue
            columns = item.dep.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                slices = [module.weight[:, index]] if columns else [module.weight[index]]
                if not columns and module.bias is not None:
                    slices.append(module.bias[index])
                for part in slices:
                    energies[root] = energies[root] + part.square().sum()
        norms += [energy.sqrt() for energy in energies]
    return torch.stack(norms)


def test_penalty_and_its_gradient_agree_with_a_walk_over_torch_prunings_groups(
    unet: PrunedUNet,
) -> None:
    expected = norms_by_torch_pruning(unet).sum()
    expected.backward()
    gradients = {name: p.grad for name, p in unet.named_parameters()}
    unet.zero_grad(set_to_none=True)

    penalty = GroupPenalty(unet)()
    torch.testing.assert_close(penalty, expected.detach())
    penalty.backward()

    for name, parameter in unet.named_parameters():
        if name == "conv_out.bias":
            assert parameter.grad is None
            assert gradients[name] is None
        else:
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_coupled_slices_form_one_norm(unet: PrunedUNet) -> None:
    parameters = zeroed(unet)
    with torch.no_grad():
        parameters["time_embedding.linear_1.weight"][5, 0] = 3.0
        parameters["time_embedding.linear_2.weight"][7, 5] = 4.0
    # Hidden channel 5 owns both: sqrt(3^2 + 4^2) = 5. The 4 is in output channel 7 as well.
    assert GroupPenalty(unet)().item() == pytest.approx(5 + 4)


def test_concatenated_skip_connections_belong_to_the_channel_they_come_from(
    unet: PrunedUNet,
) -> None:
    parameters = zeroed(unet)
    with torch.no_grad():
        parameters["conv_in.bias"][1] = 2.0
        # Inputs of this layer: 64 channels from below, then the skip of conv_in.
        parameters["up_blocks.1.resnets.0.norm1.weight"][64 + 1] = 1.0
        parameters["up_blocks.1.resnets.1.norm1.bias"][32 + 1] = 2.0
    assert GroupPenalty(unet)().item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("name", "index"),
    [("conv_out.bias", (0,))],
)
def test_image_channels_are_not_penalised(
    unet: PrunedUNet, name: str, index: tuple[int, ...]
) -> None:
    parameters = zeroed(unet)
    with torch.no_grad():
        parameters[name][index] = 3.0
    assert GroupPenalty(unet)().item() == 0.0


def test_image_channels_and_time_features_cannot_be_pruned(unet: PrunedUNet) -> None:
    axes = ChannelGroups.of(unet).channels
    assert ("conv_in.weight", 0) in axes
    assert ("conv_in.weight", 1) not in axes
    assert ("conv_out.weight", 1) in axes
    assert ("conv_out.weight", 0) not in axes
    assert ("time_embedding.linear_1.weight", 0) in axes
    assert ("time_embedding.linear_1.weight", 1) not in axes


def test_every_other_axis_is_covered_completely(unet: PrunedUNet) -> None:
    groups = ChannelGroups.of(unet)
    for name, tensor in unet.state_dict().items():
        for dim, size in enumerate(tensor.shape[:2]):
            if (name, dim) in groups.channels:
                assert len(groups.channels[name, dim]) == size
            else:
                assert (name, dim) in {
                    ("conv_in.weight", 1),
                    ("conv_out.weight", 0),
                    ("conv_out.bias", 0),
                    ("time_embedding.linear_1.weight", 1),
                }
    owned = {channel for channels in groups.channels.values() for channel in channels}
    assert owned == set(range(sum(groups.sizes)))


def test_gradient_is_zero_not_nan_where_all_weights_are_zero(unet: PrunedUNet) -> None:
    parameters = zeroed(unet)
    GroupPenalty(unet)().backward()
    for name, parameter in parameters.items():
        if name != "conv_out.bias":
            assert parameter.grad is not None
            assert parameter.grad.count_nonzero() == 0


def test_gradient_carries_the_factor_lambda(unet: PrunedUNet) -> None:
    penalty = GroupPenalty(unet)
    penalty().backward()
    once = unet.conv_in.weight.grad.clone()
    unet.zero_grad(set_to_none=True)
    (0.25 * penalty()).backward()
    torch.testing.assert_close(unet.conv_in.weight.grad, 0.25 * once)


def test_penalty_reads_the_weights_of_the_moment(unet: PrunedUNet) -> None:
    penalty = GroupPenalty(unet)
    before = penalty().item()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(2)
    assert penalty().item() == pytest.approx(2 * before)


def test_tracing_leaves_weights_mode_and_random_state(unet: PrunedUNet) -> None:
    before, random = {k: v.clone() for k, v in unet.state_dict().items()}, torch.get_rng_state()
    unet.train()
    with torch.no_grad():
        GroupPenalty(unet)
    assert unet.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


def test_channel_norms_are_the_penaltys_terms(unet: PrunedUNet) -> None:
    norms = ChannelGroups.of(unet).norms(unet.state_dict())
    assert norms.shape == (1312,)
    assert norms.sum().item() == pytest.approx(GroupPenalty(unet)().item())


def test_a_cut_keeps_the_named_rows_and_columns() -> None:
    state = {
        "a": torch.arange(12.0).view(3, 4),
        "b": torch.tensor([1.0, 2.0, 3.0]),
        "c": torch.tensor([7.0, 8.0]),
    }
    cut = CUT.apply(state)
    assert cut["a"].tolist() == [[1, 2, 3], [9, 10, 11]]
    assert cut["b"].tolist() == [1, 3]
    assert cut["c"].tolist() == [7, 8]
    cut["c"].zero_()
    assert state["c"].tolist() == [7, 8]


def test_a_cut_refuses_tensors_of_another_network() -> None:
    with pytest.raises(ReplyError, match=r"tensor b has shape \(4,\); expected \(3,\)"):
        CUT.apply({"a": torch.zeros(3, 4), "b": torch.zeros(4), "c": torch.zeros(2)})
    with pytest.raises(ReplyError, match="tensor c is missing"):
        CUT.apply({"a": torch.zeros(3, 4), "b": torch.zeros(3)})


def test_json_round_trip_of_a_cut() -> None:
    assert json.loads(CUT.to_json()) == {
        "lists": [[0, 2], [1, 2, 3]],
        "tensors": [["a", [3, 4], [0, 1]], ["b", [3], [0]], ["c", [2], [None]]],
        "scales": {},
    }
    assert Cut.from_json(CUT.to_json()) == CUT
    scaled = dataclasses.replace(CUT, scales={"b": 0.5})
    assert Cut.from_json(scaled.to_json()) == scaled


def test_a_cut_scales_weights_and_what_follows_them() -> None:
    cut = dataclasses.replace(CUT, scales={"b": 0.5})
    state = {"a": torch.ones(3, 4), "b": torch.tensor([8.0, 1.0, 2.0]), "c": torch.ones(2)}
    for power, expected in {1: [4.0, 1.0], -1: [16.0, 4.0], -2: [32.0, 8.0]}.items():
        result = cut.apply(state, power=power)
        assert result["b"].tolist() == expected
        assert result["a"].sum() == 6
    assert state["b"].tolist() == [8, 1, 2]


@pytest.mark.parametrize(
    "scales", [{"b": 0.0}, {"b": -1.0}, {"b": 1.5}, {"b": "1"}, {"d": 0.5}, None]
)
def test_strange_scales_are_refused(scales: Any) -> None:
    text = json.dumps({**json.loads(CUT.to_json()), "scales": scales})
    with pytest.raises(ReplyError, match="malformed cut"):
        Cut.from_json(text)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0, 3], [1, 2, 3]], "tensor a: kept indices must ascend within 0 to 2"),
        ([[-1, 2], [1, 2, 3]], "tensor a: kept indices must ascend within 0 to 2"),
        ([[0, 0], [1, 2, 3]], "without repeats"),
        ([[2, 0], [1, 2, 3]], "ascend"),
        ([[], [1, 2, 3]], "ascend"),
        ([[0.0, 1.0], [1, 2, 3]], r"malformed cut: lists\.0\.0: Input should be a valid integer"),
        ([[True], [1, 2, 3]], r"lists\.0\.0: Input should be a valid integer"),
        (["02", [1, 2, 3]], r"lists\.0: Input should be a valid array"),
        ([[0, 2]], "malformed cut"),
    ],
)
def test_strange_indices_are_refused(lists: list[Any], message: str) -> None:
    text = json.dumps({**json.loads(CUT.to_json()), "lists": lists})
    with pytest.raises(ReplyError, match=message):
        Cut.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[0].__setitem__(2, [0]),
        lambda tensors: tensors[0].__setitem__(2, [0, -1]),
        lambda tensors: tensors[0].__setitem__(2, [0, "1"]),
        lambda tensors: tensors[0].pop(),
        lambda tensors: tensors[0].__setitem__(0, "b"),
        lambda tensors: tensors[0].__setitem__(1, [-3, 4]),
    ],
)
def test_strange_tensors_are_refused(change: Callable[[list[Any]], None]) -> None:
    content = json.loads(CUT.to_json())
    change(content["tensors"])
    with pytest.raises(ReplyError, match="malformed cut"):
        Cut.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"lists":1,"tensors":2}', "[" * 100_000])
def test_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(ReplyError, match="malformed cut"):
        Cut.from_json(text)
