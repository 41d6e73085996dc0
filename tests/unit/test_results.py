"""The committed comparisons can be reported on, and gone on with, as docs/results says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.manuals import ROOT

from fedphd.common.config.data import DataConfig
from fedphd.common.config.evaluation import EvaluationConfig
from fedphd.common.data.images import LabelledImages
from fedphd.common.quality.classifier import ClassifierSettings, load_feature_classifier
from fedphd.deploy.compare.comparison import Comparison
from fedphd.deploy.compare.methods import read_methods
from fedphd.deploy.compare.plan import PLAN

RESULTS = ROOT / "docs" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob(f"*/{PLAN}"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_rows_are_those_of_the_settings_and_need_no_file_of_methods(folder: Path) -> None:
    runs = Comparison.stored(folder, read_methods()).runs()
    assert any(run.finished for run in runs)


def test_digits_are_compared_by_the_committed_classifier(tmp_path: Path) -> None:
    [kept] = (RESULTS / "classifiers").iterdir()
    shutil.copy(kept, tmp_path)
    data = LabelledImages(DataConfig()).decode(image_size=8, channels=1)
    settings = ClassifierSettings(epochs=EvaluationConfig().classifier_epochs)
    load_feature_classifier(data, settings, cache_dir=tmp_path, device=torch.device("cpu"))
    # Another name would mean that one was trained here.
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
