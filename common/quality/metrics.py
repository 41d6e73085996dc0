"""How good samples are, from their features: distances, precision and recall, class coverage.

The networks run elsewhere, once per image. Everything here starts from features, so torchmetrics'
classes get an extractor that returns its input.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from fedphd.common.quality.moments import FeatureStatistics
from fedphd.common.rng import derive_seed

NEIGHBOURS = 3  # k of arXiv:1904.06991, section 3.1
KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
_ROWS = 2048


class _KnownFeatures(nn.Identity):
    """An extractor whose input is features already: it returns its input."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(reference: FeatureStatistics, features: Tensor) -> float:
    """Frechet distance of ``features``, (N >= 2, d), from the reference (arXiv:1706.08500)."""
    # Eq. 6 of arXiv:1706.08500: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)).
    metric = FrechetInceptionDistance(
        feature=_KnownFeatures(features.shape[1]), reset_real_features=False, normalize=False
    )
    metric.real_features_sum = reference.sums.clone()
    metric.real_features_cov_sum = reference.outer.clone()
    metric.real_features_num_samples = torch.tensor(reference.count)
    metric.update(features, real=False)
    # Below 0 by rounding alone; what is not finite stays so.
    return max(float(metric.compute()), 0.0)


def kernel_distance(reference: Tensor, features: Tensor, *, seed: int) -> tuple[float, float]:
    """Squared MMD of a cubic kernel (KID in Inception's features; arXiv:1801.01401).

    Of reference features, (M >= 2, d), and samples' features, (N >= 2, d): mean and standard
    deviation over 100 random subsets, of at most 1000 and never more than there are. The mean may
    be slightly below 0.
    """
    size = min(KERNEL_SUBSET_SIZE, len(reference), len(features))
    # It warns that it stores all features, which are in memory anyway.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        metric = KernelInceptionDistance(
            feature=_KnownFeatures(features.shape[1]), subsets=KERNEL_SUBSETS, subset_size=size
        )
    # Unbiased MMD^2 of arXiv:1801.01401 with the kernel (x . y / d + 1)^3.
    metric.update(reference, real=True)
    metric.update(features, real=False)
    with _seeded("kernel-distance", seed):
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(scores: Tensor, *, seed: int) -> float:
    """Inception score (arXiv:1606.03498): mean over 10 random splits, as is custom.

    ``scores`` are Inception's class scores of the samples without bias, (N, 1008).
    """
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        metric = InceptionScore(_KnownFeatures(scores.shape[1]), splits=min(10, len(scores)))
    metric.update(scores)
    # exp(E[KL(p(y|x) || p(y))]), section 4 of arXiv:1606.03498.
    with _seeded("inception-score", seed):
        mean, _ = metric.compute()
    return float(mean)


def precision_recall(
    reference: Tensor, features: Tensor, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991, Eq. 1 and 2).

    Precision is the share of samples, (N > k, d), within the manifold of the reference images,
    (M > k, d); recall the share of reference images within the samples'. Both depend on the numbers
    of points: compare only values for equal numbers. A manifold is the union of balls around its
    points, each as large as the distance to its point's k-th nearest neighbour.
    """
    real, fake = reference.double(), features.double()
    return inside_manifold(real, neighbours, fake), inside_manifold(fake, neighbours, real)


def inside_manifold(points: Tensor, neighbours: int, queries: Tensor) -> float:
    """Share of ``queries``, (N, d), that lie within the manifold of ``points``, (M, d)."""
    radii = neighbour_distances(points, neighbours)
    # Eq. 1 of arXiv:1904.06991, averaged as in Eq. 2; in pieces, which bounds the memory.
    rows = torch.split(queries, _ROWS)
    inside = sum(int((torch.cdist(part, points) <= radii).any(1).sum()) for part in rows)
    return inside / len(queries)


def neighbour_distances(points: Tensor, neighbours: int) -> Tensor:
    """Distance of each of ``points``, (M, d), to its k-th nearest neighbour, (M,)."""
    rows = torch.split(points, _ROWS)
    # The nearest of all is the point itself.
    kth = [torch.cdist(part, points).kthvalue(neighbours + 1, dim=1).values for part in rows]
    return torch.cat(kth)


def coverage(reference: Tensor, features: Tensor, *, neighbours: int = NEIGHBOURS) -> float:
    """Share of the reference images near which there is a sample (arXiv:2002.09797, Eq. 8).

    That is, within the distance of the image's k-th nearest neighbour among the reference images,
    (M > k, d). ``features`` are the samples', (N, d).
    """
    real, fake = reference.double(), features.double()
    radii = neighbour_distances(real, neighbours)
    nearest = [torch.cdist(part, fake).min(1).values for part in torch.split(real, _ROWS)]
    return float((torch.cat(nearest) <= radii).double().mean())


def class_coverage(
    predicted: Tensor, reference_counts: Sequence[int]
) -> tuple[tuple[float, ...], int, float]:
    """How samples of the ``predicted`` classes, (N,), int64, spread over the reference's classes.

    ``reference_counts`` are its images per class, (num_classes,), at least one above 0.

    Returns:
        The share of the samples in each class, (num_classes,), sum 1; the class whose share is the
        smallest multiple of its share in the reference; and that multiple: 1 where all classes are
        as frequent as in the reference, 0 where one is lost.
    """
    counts = torch.bincount(predicted, minlength=len(reference_counts))
    shares = counts.double() / len(predicted)
    wanted = torch.tensor(reference_counts, dtype=torch.float64)
    # A class without reference images has no share to fall short of.
    ratios = torch.where(wanted > 0, shares / (wanted / wanted.sum()), torch.inf)
    least = int(ratios.argmin())
    return tuple(shares.tolist()), least, float(ratios[least])


@contextmanager
def _seeded(use: str, seed: int) -> Iterator[None]:
    """Seed the global generator, from which torchmetrics draws, and restore its state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(use, seed))
        yield
