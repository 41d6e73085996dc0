"""Feature extractors: the same features after a message or a file, and nothing else accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedphd.common.errors import ConfigError, ReplyError
from fedphd.common.quality.extractor import (
    Extractor,
    FeatureClassifier,
    classifier_extractor,
    load_extractor,
    restore_extractor,
    save_extractor,
)
from fedphd.common.rng import generator
from fedphd.common.wire.messages import ExtractorSpec


def extractor(seed: int = 0, **changes: int) -> Extractor:
    sizes = {"channels": 1, "image_size": 8, "num_classes": 10} | changes
    return classifier_extractor(FeatureClassifier(**sizes, seed=seed), name="digits")


def images() -> torch.Tensor:
    numbers = torch.randint(0, 256, (5, 1, 8, 8), generator=generator("extractor-test"))
    return numbers.to(torch.uint8)


def changed(made: Extractor, **values: Any) -> ExtractorSpec:
    return made.spec.model_copy(update=values)


def test_a_message_and_a_file_bring_the_same_features(tmp_path: Path) -> None:
    made = extractor()
    save_extractor(made, tmp_path / "features.safetensors")
    spec = ExtractorSpec.model_validate_json(made.spec.model_dump_json())
    for got in (
        restore_extractor(spec, made.weights()),
        load_extractor(tmp_path / "features.safetensors"),
    ):
        assert (got.spec.name, got.spec.num_features) == ("classifier(digits)", 64)
        assert got.spec == made.spec
        assert got.fingerprint() == made.fingerprint()
        assert torch.equal(got.network(images()), made.network(images()))
        assert torch.equal(
            got.scores(got.network(images())),
            made.network.logits(images()),  # type: ignore[union-attr]
        )
        assert not any(parameter.requires_grad for parameter in got.network.parameters())


def test_other_weights_have_another_fingerprint() -> None:
    assert extractor(seed=0).fingerprint() != extractor(seed=1).fingerprint()


def test_images_of_another_shape_are_refused() -> None:
    extractor().check_shape((1, 8, 8))
    with pytest.raises(ConfigError, match=r"images of shape \(1, 8, 8\), these are \(1, 16, 16\)"):
        extractor().check_shape((1, 16, 16))


def test_weights_that_do_not_fit_are_refused() -> None:
    made, weights = extractor(), extractor().weights()
    poisoned = weights.clone()
    poisoned[0] = torch.nan
    for spec, flat, problem in (
        (made.spec, weights[:-1], "weights; expected"),
        (made.spec, poisoned, r"tensor body\.0\.weight holds nan"),
        (changed(made, num_classes=9), weights, r"head\.weight has shape \(10, 64\); expected"),
        (changed(made, num_features=63), weights, "computes 64 features, not 63"),
        (changed(made, layout="[]"), weights[:0], "is missing; expected shape"),
        (changed(made, layout="{"), weights, "layout of the weights is malformed"),
    ):
        with pytest.raises(ReplyError, match=problem):
            restore_extractor(spec, flat)


def test_files_with_something_else_are_refused_by_name(tmp_path: Path) -> None:
    text, other = tmp_path / "text", tmp_path / "other.safetensors"
    text.write_text("no tensors")
    save_file({"a": torch.zeros(1)}, other)
    for path in (text, other, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=f"features_file = .*{path.name}: cannot be read"):
            load_extractor(path)


def test_a_long_name_of_data_is_cut_to_what_a_message_holds() -> None:
    made = classifier_extractor(
        FeatureClassifier(channels=1, image_size=8, num_classes=2, seed=0), name="x" * 255
    )
    assert made.spec.name == f"classifier({'x' * 188})"
