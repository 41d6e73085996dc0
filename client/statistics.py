"""A client's part of the reference statistics: sums over the features of its images."""

import torch
from torch import Tensor

from fedphd.common.data.images import ImageSet
from fedphd.common.quality.extractor import restore_extractor
from fedphd.common.quality.moments import FeatureStatistics
from fedphd.common.wire.messages import StatisticsTask


def summed_features(
    task: StatisticsTask, weights: Tensor, data: ImageSet, *, device: torch.device
) -> FeatureStatistics:
    """Count, sum and sum of outer products of the features of ``data``, in float64.

    The sums are of all images together; no image and no single image's features are in them,
    unless there is only one image. ``weights`` are the extractor's, (numel,), float32.

    Raises:
        ConfigError: the extractor takes images of another shape, or torch-fidelity is missing.
        ReplyError: the extractor's weights do not fit its description.
    """
    extractor = restore_extractor(task.extractor, weights)
    return extractor.statistics(
        data, num_classes=task.num_classes, batch_size=task.batch_size, device=device
    )
