"""What training costs in arithmetic."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel

FLOPS_CONVENTION: Final = (
    "3 x 2 x MACs x images that passed through an optimiser step: 2 operations per "
    "multiply-accumulate, and a backward pass counts as two forward passes; MACs of one image, "
    "after pruning those of the pruned network; further passes of an objective are not counted"
)


class Costs(BaseModel):
    """A U-Net's parameters, and its multiply-accumulates in a forward pass of one image."""

    parameters: int
    macs: int


class PruneReport(BaseModel):
    """How much pruning removed.

    Attributes:
        requested_ratio: share of each width that was to be removed.
        achieved_ratio: share of all widths together that was removed.
        achieved_ratios: share of each level's width that was removed.
        widths_before, widths_after: channels of each level.
        before, after: costs of the dense and of the pruned U-Net.
    """

    requested_ratio: float
    achieved_ratio: float
    achieved_ratios: tuple[float, ...]
    widths_before: tuple[int, ...]
    widths_after: tuple[int, ...]
    before: Costs
    after: Costs


def training_flops(macs: float, images: int) -> float:
    """Floating-point operations of training on ``images`` (see ``FLOPS_CONVENTION``).

    Args:
        macs: multiply-accumulates of one forward pass of one image.
        images: images of all optimiser steps together; one that is seen twice counts twice.
    """
    return 3 * 2 * macs * images


def images_of_steps(num_images: int, steps: int, batch_size: int) -> int:
    """Images in a client's first ``steps`` batches, where each pass ends with a smaller one."""
    per_pass = -(-num_images // batch_size)
    passes, rest = divmod(steps, per_pass)
    return passes * num_images + min(rest * batch_size, num_images)
