"""What training costs in arithmetic."""

from __future__ import annotations

from typing import Final

FLOPS_CONVENTION: Final = (
    "3 x 2 x MACs x images that passed through an optimiser step: 2 operations per "
    "multiply-accumulate, and a backward pass counts as two forward passes; MACs of one image, "
    "after pruning those of the pruned network; further passes of an objective are not counted"
)


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
