"""Coupled channels: the group-norm penalty, and cuts that remove channels.

Layers whose channels can only be removed together form a dependency group (DepGraph,
arXiv:2301.12900; torch-pruning finds them). A channel of a group owns slices of many tensors:
rows and columns of weights, entries of biases, scales and shifts of normalisations.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Final, Self

import torch
import torch_pruning as tp  # type: ignore[import-untyped]
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedphd.common.errors import ReplyError
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import PrunedUNet, unet_config, unet_from_config

Axis = tuple[str, int]
# Parameters; 20 MB.
_SMALL: Final = 5_000_000


@dataclass(frozen=True)
class ChannelGroups:
    """All prunable channels of a U-Net, numbered consecutively, one dependency group after another.

    Neither the image channels nor the sinusoidal time features are among them.

    Attributes:
        sizes: channels of each dependency group.
        channels: for each prunable axis (tensor name, dimension), in the order of the state dict,
            the channel that owns the slice at each index.
    """

    sizes: tuple[int, ...]
    channels: Mapping[Axis, tuple[int, ...]]

    @classmethod
    def of(cls, unet: PrunedUNet) -> Self:
        """Trace the architecture of ``unet``; neither its weights nor its random state matter."""
        # On the meta device tensors have shapes but no memory: a client need not hold a second
        # network. It imports sympy, for which a small network takes less.
        small = sum(parameter.numel() for parameter in unet.parameters()) <= _SMALL
        device = torch.device("cpu" if small else "meta")
        with torch.random.fork_rng(devices=[]), device, torch.enable_grad():
            twin = unet_from_config(unet_config(unet))
            graph = tp.DependencyGraph().build_dependency(twin, example_inputs(twin))
        names = {module: name for name, module in twin.named_modules()}
        sizes: list[int] = []
        owners: dict[Axis, dict[int, int]] = defaultdict(dict)
        # The image channels stay: pruning them would change what the network is for.
        for group in graph.get_all_groups(ignored_layers=[twin.conv_out]):
            first = sum(sizes)
            sizes.append(len(group[0].idxs))
            for item in group.items:
                owned = {i: first + r for i, r in zip(item.idxs, item.root_idxs, strict=True)}
                for axis in _axes_of(item.dep, names):
                    owners[axis] |= owned
        order = {name: position for position, name in enumerate(twin.state_dict())}
        axes = sorted(owners, key=lambda axis: (order[axis[0]], axis[1]))
        channels = {axis: tuple(owners[axis][i] for i in sorted(owners[axis])) for axis in axes}
        return cls(tuple(sizes), channels)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that prunable channels have slices of."""
        return tuple(dict.fromkeys(name for name, _ in self.channels))

    @cached_property
    def index(self) -> Tensor:
        """The owners of all axes one after the other, (sum of axis lengths,), int64."""
        return torch.tensor([channel for owned in self.channels.values() for channel in owned])

    def norms(self, state: Mapping[str, Tensor]) -> Tensor:
        """The 2-norm of all slices of each channel together, (sum of ``sizes``,), float32."""
        index = self.index.to(next(iter(state.values())).device)
        return _norms(self, index, [state[name].detach() for name in self.tensors])

    def cut(
        self,
        layout: TensorLayout,
        keep: Sequence[bool],
        scales: Mapping[str, float] | None = None,
    ) -> "Cut":
        """The cut that keeps the channels where ``keep``, (sum of ``sizes``,), is true."""
        kept = {
            axis: tuple(i for i, channel in enumerate(owned) if keep[channel])
            for axis, owned in self.channels.items()
        }
        tensors = zip(layout.names, layout.shapes, strict=True)
        indices = (tuple(kept.get((n, dim)) for dim in range(len(s))) for n, s in tensors)
        return Cut(layout, tuple(indices), scales or {})


class GroupPenalty:
    """The sparsity term of Eq. 11 of arXiv:2507.06449, without its factor lambda.

    The sum over dependency groups and their channels of the channel's 2-norm, taken over all
    slices that the channel owns in all layers of the group (not one norm per layer). ``unet`` is
    on the device it will stay on. It is traced once; its parameters are read at each call.
    """

    def __init__(self, unet: PrunedUNet) -> None:
        self._groups = ChannelGroups.of(unet)
        parameters = dict(unet.named_parameters())
        self._parameters = [parameters[name] for name in self._groups.tensors]
        self._index = self._groups.index.to(self._parameters[0].device)

    def __call__(self) -> Tensor:
        """The penalty of the current parameters: a differentiable float32 scalar.

        Its gradient is w / norm, and 0 for a channel whose weights are all 0.
        """
        total: Tensor = _SumOfNorms.apply(self._groups, self._index, *self._parameters)  # type: ignore[no-untyped-call]
        return total


@dataclass(frozen=True)
class Cut:
    """Which indices of every tensor stay when channels are removed, and which weights are scaled.

    Attributes:
        layout: before the cut.
        kept: for each tensor and each of its dimensions the kept indices, ascending; None: all.
        scales: factors by tensor name, > 0, that its weights are multiplied with.
    """

    layout: TensorLayout
    kept: tuple[tuple[tuple[int, ...] | None, ...], ...]
    scales: Mapping[str, float] = field(default_factory=dict)

    def apply(self, state: Mapping[str, Tensor], *, power: int = 1) -> dict[str, Tensor]:
        """Cut tensors of this cut's layout.

        The new tensors are contiguous, of the dtype and on the device of the given ones.

        Args:
            power: of ``scales``: 1 for weights and their averages; -1 for gradients by them, which
                shrink as the weights grow, and so for first moments and control variates; -2 for
                second moments.

        Raises:
            ReplyError: ``state`` is not of this cut's layout; names the tensor.
        """
        shapes = tuple(tuple(tensor.shape) for tensor in state.values())
        if problem := self.layout.mismatch(TensorLayout(tuple(state), shapes)):
            raise ReplyError(f"the cut is for another network: {problem}")
        cut = {
            name: _select(state[name], kept)
            for name, kept in zip(self.layout.names, self.kept, strict=True)
        }
        for name, factor in self.scales.items():
            cut[name].mul_(factor**power)
        return cut

    def apply_flat(self, flat: Tensor, expected: TensorLayout, *, power: int = 1) -> Tensor:
        """Cut a flat vector, (layout.numel,), float32, to (expected.numel,); as ``apply``.

        Raises:
            ReplyError: other names or shapes than the ``expected`` are left; names the tensor.
            FedPhDError: ``flat`` has another size.
        """
        kept = self.apply(self.layout.unpack(flat), power=power)
        if problem := expected.mismatch(TensorLayout.of(kept)):
            raise ReplyError(f"the cut does not lead to the new network: {problem}")
        return expected.pack(kept)

    def to_json(self) -> str:
        """As JSON text; equal lists of indices are written once."""
        lists = list(dict.fromkeys(k for kept in self.kept for k in kept if k is not None))
        number = {indices: position for position, indices in enumerate(lists)}
        numbers = [[None if k is None else number[k] for k in kept] for kept in self.kept]
        tensors = zip(self.layout.names, self.layout.shapes, numbers, strict=True)
        content = {"lists": lists, "tensors": list(tensors), "scales": dict(self.scales)}
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read ``to_json``'s text; raises ReplyError if it, or the indices in it, are malformed."""
        try:
            content = _CutText.model_validate_json(text)
            layout = TensorLayout.of_pairs([(name, shape) for name, shape, _ in content.tensors])
            kept = (_read_kept(*entry, content.lists) for entry in content.tensors)
            if unknown := sorted(content.scales.keys() - set(layout.names)):
                raise ValueError(f"scales {unknown[0]}, which is not among the tensors")
            return cls(layout, tuple(kept), content.scales)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ReplyError(f"malformed cut: {where}: {first['msg']}") from error
        except (ValueError, IndexError) as error:
            raise ReplyError(f"malformed cut: {error}") from error


class _CutText(BaseModel, strict=True):
    """A cut in a message."""

    lists: list[tuple[int, ...]]  # of kept indices
    # Name, shape, and for each dimension the number of its list; None keeps all.
    tensors: list[tuple[str, tuple[NonNegativeInt, ...], tuple[NonNegativeInt | None, ...]]]
    # Their powers down to -2 multiply what a client keeps, which must stay finite.
    scales: dict[str, Annotated[float, Field(ge=1e-4, le=1)]]


def _read_kept(
    name: str,
    shape: tuple[int, ...],
    numbers: tuple[int | None, ...],
    lists: Sequence[tuple[int, ...]],
) -> tuple[tuple[int, ...] | None, ...]:
    kept = tuple(None if number is None else lists[number] for number in numbers)
    for size, indices in zip(shape, kept, strict=True):
        if indices is None:
            continue
        # A negative index would count from the end, and a repeated one would copy a channel.
        if not indices or list(indices) != sorted({i for i in indices if 0 <= i < size}):
            raise ValueError(
                f"tensor {name}: kept indices must ascend within 0 to {size - 1} without repeats"
            )
    return kept


class _SumOfNorms(torch.autograd.Function):
    """The penalty with its gradient written out: one product per tensor.

    Autograd would record a thousand small operations in every training step.
    """

    @staticmethod
    def forward(ctx: Any, groups: ChannelGroups, index: Tensor, *parameters: Tensor) -> Tensor:
        norms = _norms(groups, index, parameters)
        ctx.groups = groups
        ctx.save_for_backward(index, norms, *parameters)
        return norms.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, norms, *parameters = ctx.saved_tensors
        # The derivative of Eq. 11 of arXiv:2507.06449, w / norm; at 0 the smallest subgradient.
        inverse = torch.where(norms > 0, grad / norms, 0.0)
        channels = ctx.groups.channels
        parts = torch.split(inverse[index], [len(owned) for owned in channels.values()])
        factors = dict(zip(channels, parts, strict=True))
        tensors = zip(ctx.groups.tensors, parameters, strict=True)
        return None, None, *(_scaled(name, tensor, factors) for name, tensor in tensors)


def _norms(groups: ChannelGroups, index: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    energies = []
    for name, tensor in zip(groups.tensors, tensors, strict=True):
        squares = tensor.reshape(len(tensor), -1).square()
        if (name, 0) in groups.channels:
            energies.append(squares.sum(1))
        if (name, 1) in groups.channels:
            energies.append(squares.sum(0).view(tensor.shape[1], -1).sum(1))
    total = energies[0].new_zeros(sum(groups.sizes))
    # The 2-norm in Eq. 11 of arXiv:2507.06449, over all slices of a channel.
    return total.index_add_(0, index, torch.cat(energies)).sqrt_()


def _scaled(name: str, tensor: Tensor, factors: Mapping[Axis, Tensor]) -> Tensor:
    """``tensor`` times the sum of the factors of its rows and columns."""
    rows, columns = factors.get((name, 0)), factors.get((name, 1))
    matrix = tensor.reshape(len(tensor), -1)
    scale = 0.0 if rows is None else rows[:, None]
    if columns is not None:
        scale = scale + columns.repeat_interleave(matrix.shape[1] // len(columns))
    return (matrix * scale).view_as(tensor)


def example_inputs(unet: PrunedUNet) -> tuple[Tensor, Tensor]:
    """An image, (1, C, H, W), and a timestep that ``unet`` takes, on the default device."""
    config = unet.config
    images = torch.zeros(1, config["in_channels"], config["sample_size"], config["sample_size"])
    return images, torch.zeros((), dtype=torch.long)


def _axes_of(dependency: Any, names: Mapping[nn.Module, str]) -> list[Axis]:
    """The tensor axes that a step of torch-pruning removes slices of."""
    module, remove = dependency.target.module, dependency.handler
    if module not in names or not list(module.parameters(recurse=False)):
        return []
    # A row of an embedding is a label, a column a channel.
    by_column = (
        tp.prune_conv_in_channels,
        tp.prune_linear_in_channels,
        tp.prune_embedding_out_channels,
    )
    if remove in by_column:
        return [(f"{names[module]}.weight", 1)]
    return [(f"{names[module]}.{name}", 0) for name, _ in module.named_parameters(recurse=False)]


def _select(tensor: Tensor, kept: Sequence[tuple[int, ...] | None]) -> Tensor:
    result = tensor.detach()
    for dim, indices in enumerate(kept):
        if indices is not None:
            result = result.index_select(dim, torch.tensor(indices, device=tensor.device))
    # Never the given tensor's memory: the caller goes on using both.
    return result.clone() if result.data_ptr() == tensor.data_ptr() else result.contiguous()
