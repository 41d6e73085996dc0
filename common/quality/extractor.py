"""What turns images into features: a small classifier, or Inception.

Where the reference statistics come from the clients, they and the cloud need the same features, so
an extractor can be described in a message. A classifier can also be stored in a file.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedphd.common.data.images import ImageSet
from fedphd.common.errors import ConfigError, FedPhDError, ReplyError
from fedphd.common.first_weights import WithoutFirstWeights
from fedphd.common.quality.inception import Inception, inception_of
from fedphd.common.quality.moments import FeatureStatistics
from fedphd.common.rng import generator
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.messages import ExtractorSpec
from fedphd.common.working import tracked

_FORMAT = "fedphd-features-1"
_SMALL_IMAGE = 16
_SMALLEST_MAP = 4
# With the words around it, what a message has room for.
_LONGEST_NAME = 188


class FeatureClassifier(nn.Module):
    """A small convolutional classifier; calling it returns its penultimate features.

    It takes images as (N, C, H, W), uint8 in 0 to 255 or floating point in 0 to 1, and returns
    (N, num_features), float32, >= 0. H = W = ``image_size`` sets how often the resolution is
    halved; ``seed`` is of the first weights.
    """

    num_features = 64

    def __init__(self, *, channels: int, image_size: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.channels, self.image_size = channels, image_size
        # PyTorch's own would draw from the global generator and move the caller's random state.
        with torch.device("cpu"), WithoutFirstWeights():
            self.body = _body(channels, image_size, self.num_features)
            self.head = nn.Linear(self.num_features, num_classes)
        noise = generator("classifier-weights", seed)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=noise)
            else:
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Penultimate features of ``images``, (N, num_features)."""
        unit = images.float() if images.is_floating_point() else images.float() / 255
        features: Tensor = self.body(unit * 2 - 1)
        return features

    def logits(self, images: Tensor) -> Tensor:
        """Class scores of ``images``, (N, num_classes)."""
        scores: Tensor = self.head(self(images))
        return scores


def _body(channels: int, image_size: int, num_features: int) -> nn.Sequential:
    """Convolutions down to a 4x4 map, then its mean, so that any image size is possible."""
    strides = [1 if image_size <= _SMALL_IMAGE else 2, 1]
    while -(-image_size // math.prod(strides)) > _SMALLEST_MAP:
        strides.append(2)
    widths = [channels, 32, 32, *(64 for _ in strides[2:]), num_features]
    layers: list[nn.Module] = []
    for (width_in, width_out), stride in zip(pairwise(widths), [*strides, 1], strict=True):
        layers += [nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass(frozen=True)
class Extractor:
    """A network whose features are compared."""

    network: nn.Module  # images, (N, C, H, W), uint8, to features, (N, d), float32
    scores: Callable[[Tensor], Tensor]  # features to class scores, (N, K)
    spec: ExtractorSpec  # how it is described in a message and in reports

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Shape (C, H, W) of the images that it is made for; None if it takes any."""
        if self.spec.kind == "inception":
            return None
        return self.spec.channels, self.spec.image_size, self.spec.image_size

    def weights(self) -> Tensor:
        """Its weights as one vector, (numel,), float32, on the CPU."""
        state = _floats(self.network)
        return TensorLayout.of(state).pack(state).cpu()

    def fingerprint(self) -> str:
        """SHA-256 of its kind and weights: equal fingerprints mean equal features."""
        digest = hashlib.sha256(f"{self.spec.kind} {self.spec.layout}".encode())
        digest.update(self.weights().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ConfigError unless it is made for images of ``shape``, (C, H, W)."""
        if self.image_shape not in (None, shape):
            raise ConfigError(
                f"the features {self.spec.name} are for images of shape {self.image_shape}, these "
                f"are {shape}; train them with the model's image_size and channels (fedphd "
                "features train)"
            )

    def features(self, images: Tensor, *, batch_size: int, device: torch.device) -> Tensor:
        """Features of ``images``, (N, C, H, W), uint8: (N, d), float32, on the CPU.

        Its network is on ``device`` afterwards.
        """
        return torch.cat(list(self._batches(images, batch_size, device)))

    def statistics(
        self, data: ImageSet, *, num_classes: int, batch_size: int, device: torch.device
    ) -> FeatureStatistics:
        """Statistics of the features of ``data``; raises ConfigError as ``check_shape`` does."""
        self.check_shape(tuple(data.images.shape[1:]))
        # Batch by batch: all features of a large data set at once may not fit into memory.
        batches = self._batches(data.images, batch_size, device)
        return FeatureStatistics.summed(batches, data.labels, self.spec.num_features, num_classes)

    @torch.no_grad()
    def _batches(self, images: Tensor, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        network = self.network.to(device)
        batches = torch.split(images, batch_size)
        for batch in tracked(batches, "computing features", len(batches)):
            yield network(batch.to(device)).cpu()


def classifier_extractor(model: FeatureClassifier, *, name: str) -> Extractor:
    """The extractor of a trained classifier; ``name`` is of the data that it was trained on."""
    spec = ExtractorSpec(
        kind="classifier",
        name=f"classifier({name[:_LONGEST_NAME]})",
        num_features=model.num_features,
        channels=model.channels,
        image_size=model.image_size,
        num_classes=model.head.out_features,
        layout=TensorLayout.of(_floats(model)).to_json(),
    )
    return Extractor(model.eval().requires_grad_(False), model.head, spec)


def inception_extractor(network: Inception) -> Extractor:
    """The extractor of Inception's 2048 features."""
    layout = TensorLayout.of(_floats(network.network)).to_json()
    return Extractor(network, network.scores, ExtractorSpec.inception(layout))


def restore_extractor(spec: ExtractorSpec, weights: Tensor) -> Extractor:
    """The extractor that a peer described, on the CPU, with its ``weights``, (numel,), float32.

    Raises:
        ReplyError: the weights do not fit the description, or are not finite.
        ConfigError: it is Inception, and torch-fidelity is missing here.
    """
    layout = spec.tensor_layout()
    if weights.numel() != layout.numel:
        raise ReplyError(f"extractor has {weights.numel()} weights; expected {layout.numel}")
    if problem := layout.first_non_finite(weights):
        raise ReplyError(f"extractor: {problem}")
    state = layout.unpack(weights)
    if spec.kind == "inception":
        return inception_extractor(inception_of(state))
    model = FeatureClassifier(
        channels=spec.channels, image_size=spec.image_size, num_classes=spec.num_classes, seed=0
    )
    problem = TensorLayout.of(model.state_dict()).mismatch(layout)
    if problem is None and spec.num_features != model.num_features:
        problem = f"computes {model.num_features} features, not {spec.num_features}"
    if problem:
        raise ReplyError(f"extractor: {problem}")
    model.load_state_dict(state)
    return replace(classifier_extractor(model, name=""), spec=spec)


def save_extractor(extractor: Extractor, path: Path) -> None:
    """Write a classifier to a features file; raises FedPhDError if it cannot be written."""
    state = {name: tensor.cpu() for name, tensor in extractor.network.state_dict().items()}
    about = {"format": _FORMAT, "spec": extractor.spec.model_dump_json()}
    try:
        save_file(state, path, metadata=about)
    except (OSError, SafetensorError) as error:
        raise FedPhDError(f"{path}: features could not be written: {error}") from error


def load_extractor(path: Path) -> Extractor:
    """Read what ``save_extractor`` wrote; raises ConfigError if ``path`` holds something else."""
    try:
        with safe_open(path, framework="pt") as stored:
            about = stored.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError("it does not hold a feature classifier")
            spec = ExtractorSpec.model_validate_json(about["spec"])
            layout = spec.tensor_layout()
            state = {name: stored.get_tensor(name) for name in layout.names}
        return restore_extractor(spec, layout.pack(state))
    except (OSError, SafetensorError, FedPhDError, ValueError, KeyError) as error:
        raise ConfigError(
            f"evaluation.features_file = {path}: cannot be read ({error}); write it with "
            "fedphd features train --data ... --out FILE"
        ) from error


def _floats(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that a forward pass needs; the normalisations' batch counters are integers."""
    state = network.network.state_dict() if isinstance(network, Inception) else network.state_dict()
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
