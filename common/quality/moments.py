"""First and second moments of image features, which add up over data in several hands.

The Frechet distance needs a mean and a covariance. Both follow from a count, a sum and a sum of
outer products, and these of several owners' images add up to those of all images, exactly.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from flwr.app import Message
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedphd.common.errors import ConfigError, FedPhDError, ReplyError
from fedphd.common.wire.messages import StatisticsReply
from fedphd.common.wire.payload import MOST
from fedphd.common.wire.records import read_weights

# In a run's folder, for later evaluations of its checkpoint.
STATISTICS_FILE = "statistics.safetensors"
WRITE_STATISTICS = "write the file with fedphd statistics --data ... --out FILE"
_FORMAT = "fedphd-statistics-1"


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over the features of ``count`` images."""

    count: int
    sums: Tensor  # of the features, (d,), float64
    outer: Tensor  # sum of the features' outer products, (d, d), float64, symmetric
    label_counts: tuple[int, ...]  # images per class, shape (num_classes,)

    @classmethod
    def zeros(cls, num_features: int, num_classes: int) -> Self:
        """The statistics of no images."""
        sums = torch.zeros(num_features, dtype=torch.float64)
        outer = torch.zeros(num_features, num_features, dtype=torch.float64)
        return cls(0, sums, outer, (0,) * num_classes)

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> Self:
        """The statistics of ``features``, (N, d), any float type, and ``labels``, (N,), int64."""
        wide = features.double().cpu()
        counts = torch.bincount(labels, minlength=num_classes).tolist()
        return cls(len(wide), wide.sum(0), wide.T @ wide, tuple(counts))

    @classmethod
    def summed(
        cls, batches: Iterable[Tensor], labels: Tensor, num_features: int, num_classes: int
    ) -> Self:
        """The statistics of features in batches, (B, d) each, and all their ``labels``, (N,)."""
        total = cls.zeros(num_features, num_classes)
        for batch in batches:
            total += cls.of(batch, labels[total.count : total.count + len(batch)], num_classes)
        return total

    def __add__(self, other: Self) -> Self:
        counts = tuple(map(sum, zip(self.label_counts, other.label_counts, strict=True)))
        sums, outer = self.sums + other.sums, self.outer + other.outer
        return type(self)(self.count + other.count, sums, outer, counts)

    @property
    def mean(self) -> Tensor:
        """Mean of the features, (d,), float64."""
        return self.sums / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance of the features, (d, d), float64, with count - 1 in the denominator."""
        mean = self.mean
        # sum (x - m)(x - m)^T = sum x x^T - count m m^T. The difference cancels digits: so float64.
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def sha256(self) -> str:
        """SHA-256 over count, mean and covariance (little-endian): names these statistics."""
        digest = hashlib.sha256(str(self.count).encode())
        for tensor in (self.mean, self.covariance):
            digest.update(tensor.contiguous().numpy().astype("<f8").tobytes())
        return digest.hexdigest()

    def pack(self) -> Tensor:
        """The sums as one vector, (d + d (d + 1) / 2,), float64; of ``outer`` the upper half."""
        rows, columns = torch.triu_indices(*self.outer.shape)
        return torch.cat([self.sums, self.outer[rows, columns]])

    @classmethod
    def unpack(
        cls, flat: Tensor, *, num_features: int, count: int, label_counts: tuple[int, ...]
    ) -> Self:
        """Read what ``pack`` wrote, and check that some images can have these statistics.

        Raises:
            ReplyError: another length, values that are not finite, counts that do not fit, or
                squares that are too small for the sums.
        """
        expected = num_features + num_features * (num_features + 1) // 2
        if flat.shape != (expected,):
            raise ReplyError(
                f"statistics hold {flat.numel()} values; {num_features} features take {expected}"
            )
        # One NaN or infinity from one client would make every later distance useless.
        if not bool(flat.isfinite().all()):
            raise ReplyError("statistics hold values that are not finite")
        if float(flat.abs().max()) > MOST:
            raise ReplyError(f"statistics hold values above {MOST:g}, which sums may not hold")
        if min(label_counts, default=0) < 0 or sum(label_counts) != count:
            raise ReplyError(f"label counts {list(label_counts)} are not those of {count} images")
        rows, columns = torch.triu_indices(num_features, num_features)
        outer = torch.zeros(num_features, num_features, dtype=torch.float64)
        outer[rows, columns] = outer[columns, rows] = flat[num_features:]
        sums = flat[:num_features].clone()
        # Cauchy-Schwarz, with room for rounding: (sum of x)^2 <= count * (sum of x^2). Statistics
        # that break it have a negative variance, and the Frechet distance the root of it.
        squares = outer.diagonal()
        if bool((sums.square() > count * squares * (1 + 1e-9) + 1e-9).any()):
            raise ReplyError(f"statistics are impossible for {count} images")
        return cls(count, sums, outer, label_counts)


def read_statistics(
    message: Message, answer: StatisticsReply, *, num_features: int, num_classes: int
) -> FeatureStatistics:
    """The sums that came with ``answer``; raises ReplyError if they cannot be used."""
    if len(answer.label_counts) != num_classes:
        raise ReplyError(f"counts {len(answer.label_counts)} classes; expected {num_classes}")
    return FeatureStatistics.unpack(
        read_weights(message, "float64"),
        num_features=num_features,
        count=answer.count,
        label_counts=answer.label_counts,
    )


@dataclass(frozen=True)
class StatisticsFile:
    """Reference statistics on disk."""

    statistics: FeatureStatistics
    features: str  # their name, such as ``classifier(digits)``
    fingerprint: str  # of the extractor whose features they are

    def save(self, path: Path) -> None:
        """Write to ``path``; raises FedPhDError if it cannot be written."""
        content = {
            "count": torch.tensor(self.statistics.count),
            "label_counts": torch.tensor(self.statistics.label_counts),
            "statistics": self.statistics.pack(),
        }
        about = {
            "format": _FORMAT,
            "features": self.features,
            "fingerprint": self.fingerprint,
            "num_features": str(len(self.statistics.sums)),
        }
        try:
            save_file(content, path, metadata=about)
        except (OSError, SafetensorError) as error:
            raise FedPhDError(f"{path}: statistics could not be written: {error}") from error

    @classmethod
    def load(cls, path: Path, *, otherwise: str = WRITE_STATISTICS) -> Self:
        """Read what ``save`` wrote.

        Raises ConfigError if ``path`` holds something else, which says what to do ``otherwise``.
        """
        try:
            with safe_open(path, framework="pt") as stored:
                about = stored.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise ValueError("it does not hold statistics")
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            statistics = FeatureStatistics.unpack(
                tensors["statistics"],
                num_features=int(about["num_features"]),
                count=int(tensors["count"]),
                label_counts=tuple(tensors["label_counts"].tolist()),
            )
            return cls(statistics, about["features"], about["fingerprint"])
        except (OSError, SafetensorError, ReplyError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{path}: cannot be read as reference statistics ({error}); {otherwise}"
            ) from error
