"""Image features for Frechet distances, from a small classifier trained on the reference data.

Inception's weights are a download of 100 MB, and its features tell 8x8 digits apart badly. A
classifier of the reference data learns in seconds; its numbers compare runs on that data only.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812

from fedphd.common.data.images import ImageSet
from fedphd.common.errors import ConfigError
from fedphd.common.files import replaced
from fedphd.common.quality.extractor import FeatureClassifier
from fedphd.common.rng import derive_seed, generator
from fedphd.common.working import tracked

logger = logging.getLogger(__name__)

_FORMAT = 1
_SMALL_IMAGE = 16


@dataclass(frozen=True)
class ClassifierSettings:
    """How the classifier is trained; every field is part of the cache file's name."""

    epochs: int
    batch_size: int = 64  # images per step
    learning_rate: float = 3e-3  # Adam's, falling to 0 along a cosine
    held_out: float = 0.1  # share of the images that is kept for the accuracy
    seed: int = 0


def load_feature_classifier(
    reference: ImageSet, settings: ClassifierSettings, *, cache_dir: Path, device: torch.device
) -> FeatureClassifier:
    """The classifier for this data, from the cache or trained; on ``device``, for evaluation.

    ``cache_dir`` is made if it is missing. A file there that cannot be used is replaced by a newly
    trained classifier.

    Raises:
        ConfigError: there are fewer than 2 reference images.
    """
    if len(reference) < 2:
        raise ConfigError(
            f"evaluation.reference has {len(reference)} image(s); a distance needs at least 2"
        )
    path = cache_dir / f"classifier-{_fingerprint(reference, settings)}.safetensors"
    model = _restored(reference, settings, path)
    if model is None:
        model = _untrained(reference, settings)
        accuracy = train_classifier(model, reference, settings, device=device)
        logger.info(
            "feature classifier: %.1f%% of %d held-out images right after %d epochs",
            100 * accuracy,
            _num_held_out(reference, settings),
            settings.epochs,
        )
        _store(model, path)
    return model.to(device).eval().requires_grad_(False)


def train_classifier(
    model: FeatureClassifier,
    reference: ImageSet,
    settings: ClassifierSettings,
    *,
    device: torch.device,
) -> float:
    """Train ``model`` in place and return its accuracy on the held-out images, in 0 to 1.

    The same seed and CPU lead to the same weights.
    """
    noise = generator("classifier-training", settings.seed)
    order = torch.randperm(len(reference), generator=noise)
    num_held_out = _num_held_out(reference, settings)
    held_out, kept = reference.subset(order[:num_held_out]), reference.subset(order[num_held_out:])
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    num_steps = settings.epochs * -(-len(kept) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
    with _threads_for(reference):
        epochs = range(settings.epochs)
        for _ in tracked(epochs, "training the feature classifier", settings.epochs):
            shuffled = torch.randperm(len(kept), generator=noise)
            for batch in map(kept.subset, torch.split(shuffled, settings.batch_size)):
                scores = model.logits(batch.images.to(device))
                loss = F.cross_entropy(scores, batch.labels.to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return _accuracy(model.eval(), held_out, device)


@contextmanager
def _threads_for(data: ImageSet) -> Iterator[None]:
    """One thread for small images, whose batches are too little work to divide.

    On a busy machine the threads would wait for each other 20 times as long as they work.
    """
    before = torch.get_num_threads()
    if data.images.shape[2] <= _SMALL_IMAGE:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _accuracy(model: FeatureClassifier, data: ImageSet, device: torch.device) -> float:
    batches = torch.split(data.images, 1024)
    guesses = torch.cat([model.logits(batch.to(device)).argmax(1).cpu() for batch in batches])
    return int((guesses == data.labels).sum()) / len(data)


def _num_held_out(reference: ImageSet, settings: ClassifierSettings) -> int:
    return max(1, round(settings.held_out * len(reference)))


def _untrained(reference: ImageSet, settings: ClassifierSettings) -> FeatureClassifier:
    return FeatureClassifier(
        channels=reference.images.shape[1],
        image_size=reference.images.shape[2],
        num_classes=int(reference.labels.max()) + 1,
        seed=derive_seed("classifier", settings.seed),
    )


def _fingerprint(reference: ImageSet, settings: ClassifierSettings) -> str:
    """Changes with any pixel, label or setting, and with the network's layout (``_FORMAT``)."""
    plain = {"format": _FORMAT, "shape": list(reference.images.shape), **asdict(settings)}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for tensor in (reference.images, reference.labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _restored(
    reference: ImageSet, settings: ClassifierSettings, path: Path
) -> FeatureClassifier | None:
    """The classifier in the cache file; None if the file is missing or unusable."""
    if not path.exists():
        return None
    model = _untrained(reference, settings)
    try:
        tensors = load_file(path)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("weights that are not finite")
        model.load_state_dict(tensors)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        logger.warning("feature classifier %s is unusable and is trained again: %s", path, error)
        return None
    return model


def _store(model: FeatureClassifier, path: Path) -> None:
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as beside:
            save_file(state, beside)
    # Only a cache: without the file the next run trains again.
    except (SafetensorError, OSError) as error:
        logger.warning("feature classifier could not be stored as %s: %s", path, error)
