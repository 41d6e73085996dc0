"""What a model card says, and that the hub takes its metadata."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.exportable import write_exportable
from support.hub import problems

from fedphd.common.config.roles import validate
from fedphd.common.config.run import INCEPTION, FederationConfig
from fedphd.common.config.text import with_overrides
from fedphd.common.history.progress import Progress
from fedphd.common.quality.stored_run import StoredRun
from fedphd.deploy.share.card import Card, Data
from fedphd.deploy.share.folder import data_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exportable(tmp_path_factory.mktemp("run"), pruned=True)


def card_of(run: Path, **changes: Any) -> Card:
    """The card of a run, with ``changes`` of its fields."""
    stored = StoredRun.load(run / "checkpoint", "ema")
    fields: dict[str, Any] = {
        "config": stored.config({}), "progress": Progress.read(run / "checkpoint"),
        "data": data_of(run, None), "weights": "averaged", "own_class": True, "name": None,
        "license": None, "num_samples": 64, "steps": 50, "seed": 0, "onnx": False,
    }  # fmt: skip
    return Card(**{**fields, **changes})


def with_record(card: Card, **changes: Any) -> Card:
    """The same with ``changes`` of its last evaluation."""
    reported = card.progress.reported
    record = reported.evaluations[-1].model_copy(update=changes)
    of = reported.model_copy(update={"evaluations": [record]})
    return replace(card, progress=card.progress.model_copy(update={"reported": of}))


def measured_in(card: Card, features: str) -> Card:
    """The same with its last evaluation in other features."""
    return with_record(card, features=features)


def metadata(card: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return values


def test_a_card_of_a_run_with_private_images(run: Path) -> None:
    card = card_of(run).text()
    assert problems(card) == []
    values = metadata(card)
    assert (values["library_name"], values["pipeline_tag"]) == (
        "fedphd", "unconditional-image-generation",
    )  # fmt: skip
    assert "pruning" in values["tags"]
    assert values.keys().isdisjoint({"datasets", "license"})
    (result,) = values["model-index"][0]["results"]
    assert result["dataset"]["name"] == "a data set that is not named"
    assert result["metrics"] == [
        {
            "type": "frechet_distance",
            "value": 12.5,
            "name": "Frechet distance, features of a small classifier",
        }
    ]
    for part in (
        "3 clients of 30 to 36 images each, 99 in all",
        "`pathological-2x3-seed0-00c0ffee`",
        "Pruned once, after 5 edge rounds of sparse training: to 50% of its widths",
        "| precision | 0.75 |",
        "| for scale | real images get 2.0 |",
        "After cloud round 2: 64 samples, DDIM, 20 steps, noise of seed 1234",
        "Class 3 is drawn least: at 25% of its share",
        "The distance is not a FID",
        "5.0 MB between clients and edges, 2.0 MB to the cloud",
        "Nobody has stated a licence",
        "moving average over the last 5 of 40 optimiser steps",
        "arXiv:2507.06449",
        "author  = {{FedPhD developers}},",
    ):
        assert part in card, part
    assert "{%" not in card


def test_how_samples_were_measured_that_were_told_their_classes(run: Path) -> None:
    told = " The network was told the samples' classes, spread as the target is, with guidance 1.5;"
    assert "the plain pipeline" not in card_of(run).text()
    assert told in with_record(card_of(run), guidance=1.5).text()


def at(card: Card, *, done: int, measured_after: int) -> Card:
    """The same of a run that has done so many intervals, last evaluated after that one."""
    reported = card.progress.reported
    record = reported.evaluations[-1].model_copy(update={"interval": measured_after})
    of = reported.model_copy(update={"evaluations": [record]})
    changes = {"reported": of, "interval": done, "intervals": 12}
    return replace(card, progress=card.progress.model_copy(update=changes))


def test_numbers_of_the_untrained_network_are_not_those_of_an_early_version(run: Path) -> None:
    card = at(card_of(run), done=1, measured_after=0)
    text = card.text()
    assert "the run had done 1 of its 12 cloud rounds" in text
    assert "- 1 cloud round of " in text
    assert "These weights were not measured." in text
    assert "12.5" not in text
    assert "is drawn least" not in text
    assert not card.is_measured


def test_numbers_of_an_earlier_round_are_called_so(run: Path) -> None:
    card = at(card_of(run), done=5, measured_after=4)
    text = card.text()
    assert "These weights were not measured. Those of an earlier cloud round were:" in text
    assert "After cloud round 4: 64 samples" in text
    assert "is drawn least" not in text
    assert not card.is_measured
    current = at(card_of(run), done=4, measured_after=4)
    assert current.is_measured
    assert "not measured" not in current.text().replace("Carbon: not measured", "")


def test_a_dense_network_is_opened_by_diffusers_alone(run: Path) -> None:
    assert metadata(card_of(run, own_class=False).text())["library_name"] == "diffusers"


def test_emissions_are_an_estimate_with_its_assumptions(run: Path) -> None:
    """3.6e15 FLOPs at a GFLOP per joule are a kilowatt hour, of 500 g."""
    card = card_of(run).text()
    assert "Carbon: not measured." in card
    assert "1 GFLOP per joule" in card
    assert "about 5e+02 g of CO2eq" in card
    assert "co2_eq_emissions" not in metadata(card)


def test_what_is_public_or_said_by_the_user_is_named(run: Path) -> None:
    public = card_of(run, data=Data("digits"), license="cc-by-4.0")
    digits = measured_in(public, "classifier(digits)").text()
    assert "like those of\nscikit-learn's digits" in digits
    assert "features of a small classifier of digits" in digits
    assert metadata(digits)["license"] == "cc-by-4.0"
    assert "licence" not in digits
    named = card_of(run, data=data_of(run, "ada/lungs"), name="ada/drawn-lungs").text()
    assert metadata(named)["datasets"] == ["ada/lungs"]
    for elsewhere in (str(run), "./lungs", "https://example.org/lungs", "data/my lungs"):
        assert "datasets" not in metadata(card_of(run, data=Data(elsewhere)).text())
    assert 'place = "ada/drawn-lungs"' in named
    assert "# drawn-lungs\n" in named


def test_only_inceptions_distance_is_a_fid(run: Path) -> None:
    card = measured_in(card_of(run), INCEPTION).text()
    (result,) = metadata(card)["model-index"][0]["results"]
    assert (result["metrics"][0]["type"], result["metrics"][0]["name"]) == ("fid", "FID")
    assert "| FID | 12.5 |" in card
    assert "not a FID" not in card


def test_a_run_that_is_not_done_says_so_and_claims_no_number(run: Path) -> None:
    progress = Progress.read(run / "checkpoint").model_copy(update={"interval": 1})
    card = card_of(run, progress=progress).text()
    assert "the run had done 1 of its 2 cloud rounds" in card
    # What was measured are other weights.
    assert "model-index" not in metadata(card)
    assert "After cloud round 2: 64 samples" in card


def test_a_run_whose_clients_came_with_their_own_images(tmp_path: Path) -> None:
    run = write_exportable(tmp_path / "run", pruned=False, topology="flat")
    (run / "partition.json").unlink()
    card = card_of(run, data=data_of(run, None), own_class=False).text()
    assert problems(card) == []
    for part in ("At least 6 clients; what each holds is not known here", "Not pruned",
                 "Flat: the cloud averages its clients", "links between clients and cloud: 2.0 MB",
                 "The U-Net is dense"):  # fmt: skip
        assert part in card, part
    assert "Split:" not in card


def test_the_stand_in_refuses_metadata_that_the_hub_would() -> None:
    assert problems("# no metadata") == ["there is no metadata"]
    assert problems("---\nlicense: mine\n---\n")[0].startswith("license 'mine'")


@pytest.mark.parametrize("onnx", [False, True])
def test_the_card_has_no_gaps(run: Path, onnx: bool) -> None:
    card = card_of(run, onnx=onnx, license="mit").text()
    assert "\n\n\n" not in card
    assert ("### Without PyTorch" in card) is onnx


def test_a_card_of_a_network_that_is_told_classes(tmp_path: Path) -> None:
    told = write_exportable(tmp_path, pruned=False, model__class_conditional=True)
    card = card_of(told).text()
    assert problems(card) == []
    assert "class-conditional" in metadata(card)["tags"]
    for part in (
        "the network was told each image's class",
        "is told one of 0 to 9 for each image",
        "where a class was one owner's, images like that owner's",
    ):
        assert part in card
    assert "cannot be told which" not in card
    assert "labels only" not in card


STEERED, WEIGHED = "steered its choice of an edge", "had a part in the cloud's weights of its edges"


@pytest.mark.parametrize(
    ("settings", "uses"),
    [
        ({}, f"its labels {STEERED} and {WEIGHED} (Eq. 10)"),
        ({"selection.policy": "random"}, f"its labels {WEIGHED}"),
        ({"selection.policy": "static", "aggregation.factor": 0}, "its labels had no part in the"),
        ({"selection.factor": 0, "aggregation.factor": 0}, "its labels had no part in the"),
        (
            {"selection.policy": "min_kl", "selection.factor": 0, "aggregation.factor": 0},
            f"its labels {STEERED}.",
        ),
        (
            {"aggregation.method": "trimmed_mean", "schedule.num_edges": 3},
            f"its labels {STEERED}.",
        ),
        # Two edges are never trimmed.
        ({"aggregation.method": "trimmed_mean"}, f"its labels {STEERED} and {WEIGHED}"),
        ({"topology": "flat"}, "its labels had no part in the training."),
        (
            {"topology": "flat", "model.class_conditional": True},
            "its labels told the network what it sees.",
        ),
        (
            {"model.class_conditional": True},
            f"its labels told the network what it sees, {STEERED} and {WEIGHED}",
        ),
    ],
)
def test_what_labels_were_for(run: Path, settings: dict[str, Any], uses: str) -> None:
    config = validate(
        FederationConfig, with_overrides(card_of(run).config.model_dump(), settings), source=""
    )
    assert f"Each client's images stayed with it; {uses}" in card_of(run, config=config).text()


def test_what_left_a_client(run: Path) -> None:
    plain = "- What left a client: weights, how many images of each label it has and figures of its"
    assert plain in card_of(run).text()
    assert "only weights" not in card_of(run).text()
    settings = {
        "objective.method": "scaffold", "training.optimizer": "sgd", "topology": "flat",
        "pruning.mode": "none", "evaluation.reference": None, "evaluation.reference_clients": True,
    }  # fmt: skip
    config = validate(
        FederationConfig, with_overrides(card_of(run).config.model_dump(), settings), source=""
    )
    assert (
        "- What left a client: weights, SCAFFOLD's control variates, how many images of each label "
        "it has, sums over the features of its images, for the reference and figures of its "
    ) in card_of(run, config=config).text()


def test_the_version_is_that_of_the_run(run: Path) -> None:
    assert "2507.06449)): the training images" in card_of(run).text()
    text = card_of(run, trained_by="0.0.7").text()
    assert "2507.06449)),\nversion 0.0.7: the training images" in text
    assert "version = {0.0.7}" in text
    assert "version 0.0.7 or newer" not in text
