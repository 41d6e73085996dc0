"""What training costs in arithmetic."""

from typing import Final

from pydantic import BaseModel

FLOPS_CONVENTION: Final = (
    "3 x 2 x MACs x images that passed through an optimiser step: 2 operations per "
    "multiply-accumulate, of which attention's own products (QK^T and AV) are left out, and a "
    "backward pass counts as two forward passes; MACs of one image, after pruning those of the "
    "pruned network; MOON's two further forward passes, which end at the middle block, count as "
    "such, in a client's first round too, which has none"
)

# Forward passes up to the end of the middle block, per step, beside the training's own pass.
ENCODER_PASSES = {"moon": 2}


class Costs(BaseModel):
    """A U-Net's parameters, and its multiply-accumulates in a forward pass of one image.

    The multiply-accumulates are torch-pruning's count, as the paper's are: it leaves out the
    products of attention without weights, QK^T and AV (``docs/measuring.md`` says how much that
    is). ``encoder_macs`` are those up to the end of the middle block.
    """

    parameters: int
    macs: int
    encoder_macs: int = 0


class LayerChange(BaseModel):
    """A layer with a matrix of weights; each number before and after pruning.

    ``channels`` are those that come out of it, ``macs`` of one image.
    """

    name: str
    channels: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]


class PruneReport(BaseModel):
    """How much pruning removed."""

    requested_ratio: float  # share of each width that was to be removed
    achieved_ratio: float  # share of all widths together that was removed
    achieved_ratios: tuple[float, ...]  # share of each level's width that was removed
    widths_before: tuple[int, ...]  # channels of each level
    widths_after: tuple[int, ...]
    before: Costs
    after: Costs
    layers: tuple[LayerChange, ...] = ()


def training_flops(costs: Costs, images: int, *, encoder_passes: int = 0) -> float:
    """Floating-point operations of training a U-Net of ``costs``, by ``FLOPS_CONVENTION``.

    An image that is seen twice counts twice. ``encoder_passes`` are what the objective needs
    per step beside the training's own pass: forward passes up to the end of the middle block.
    """
    return 2 * (3 * costs.macs + encoder_passes * costs.encoder_macs) * images


def images_of_steps(num_images: int, steps: int, batch_size: int) -> int:
    """Images in a client's first ``steps`` batches, where each pass ends with a smaller one."""
    per_pass = -(-num_images // batch_size)
    passes, rest = divmod(steps, per_pass)
    return passes * num_images + min(rest * batch_size, num_images)
