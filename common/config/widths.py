"""How wide the U-Net's levels and attention heads are before and after pruning."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any


def prune_width(width: int, ratio: float, groups: int) -> int:
    """Channels kept of ``width`` when ``ratio`` of each normalisation group is removed.

    Each of the ``groups`` keeps the same whole number of channels, at least one, rounded to
    the nearest (halves keep more), so a pruned width is a multiple of ``groups`` again.
    """
    per_group = width // groups
    return groups * max(1, per_group - int(per_group * ratio + 0.5 - 1e-9))


def prune_widths(widths: Iterable[int], ratio: float, groups: int) -> list[int]:
    """``prune_width`` of each level's width."""
    return [prune_width(width, ratio, groups) for width in widths]


def check_first_width(widths: Sequence[int], groups: int) -> None:
    """Raise ValueError if the first of ``widths`` is odd; ``groups`` divide it, for the fix.

    The time features are as wide as the first level before pruning, and half of them are sines,
    half cosines.
    """
    if widths[0] % 2:
        step = groups if groups % 2 == 0 else 2 * groups
        raise ValueError(
            f"model.block_out_channels = {list(widths)}: its first width, {widths[0]}, is odd, but "
            "as many time features are made, in pairs of sine and cosine; use an even multiple of "
            f"model.norm_num_groups = {groups}, such as {-(-widths[0] // step) * step}"
        )


def check_lowest_level(image_size: int, widths: Sequence[int], groups: int, when: str = "") -> None:
    """Raise ValueError if the last level normalises one value per image and group.

    Less its own mean it is 0, whatever the image. The last level's first block normalises what
    comes in, too, as wide as the level before. ``when`` its ``widths`` are those, for the error.
    """
    if image_size >> (len(widths) - 1) == 1 and groups in widths[-2:]:
        level = len(widths) - (1 if widths[-1] == groups else 2)
        raise ValueError(
            f"the last level of widths {list(widths)}{when} has 1x1 pixels (model.image_size = "
            f"{image_size}), where normalisation makes 0 of level {level}'s channels, of which one "
            f"is in each of model.norm_num_groups = {groups}; use fewer groups or levels"
        )


def check_levels(widths: Sequence[int], pruned: Sequence[int], ratio: float) -> None:
    """Raise ValueError if neighbours of different width become equal, or the other way round.

    A block between them has a convolution for its skip connection only where they differ, so the
    pruned U-Net would have other layers than the weights that are cut for it.
    """
    before, after = ([a == b for a, b in pairwise(of)] for of in (widths, pruned))
    if before != after:
        raise ValueError(
            f"pruning.ratio = {ratio} makes widths {list(pruned)} of {list(widths)}: levels that "
            "differ must go on to differ; use a smaller ratio, or fewer groups "
            "(model.norm_num_groups)"
        )


def levels_with_heads(attention_levels: Iterable[int], num_levels: int) -> list[int]:
    """Levels whose width attention heads share: the middle block has the last level's."""
    return sorted({*attention_levels, num_levels - 1})


def pruned_head_dim(model: Mapping[str, Any], pruned: Sequence[int], ratio: float) -> int:
    """Channels per attention head after pruning, which keeps the number of heads.

    Args:
        model: the unpruned U-Net's ``block_out_channels``, ``attention_levels`` and
            ``attention_head_dim``, which divides the widths of the levels with heads.
        pruned: channels of each level after pruning.
        ratio: share of each width that was to be removed, for the error.

    Raises ValueError if heads would not all keep the same whole number of channels.
    """
    widths, head_dim = model["block_out_channels"], model["attention_head_dim"]
    levels = levels_with_heads(model["attention_levels"], len(widths))
    dims = [head_dim * pruned[level] / widths[level] for level in levels]
    if len(set(dims)) > 1 or not dims[0].is_integer():
        raise ValueError(
            f"pruning.ratio = {ratio} makes widths {list(pruned)}, with attention heads of {dims} "
            f"channels at levels {levels}; use a ratio that keeps the same whole number "
            "everywhere, such as 0.25 or 0.5"
        )
    return int(dims[0])
