"""Sentences on what came out of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.told import write_told

from fedphd.common.events import EventLog, Verdict
from fedphd.common.history.evaluation import Anchors
from fedphd.common.history.events import PeerChanged
from fedphd.deploy.launch.runs import CONFIG, EVENTS
from fedphd.deploy.report.record import RunRecord
from fedphd.deploy.report.words import compared, verdict

ALL = Anchors(real=0.6, one_class_missing=16.6, half_of_the_classes=44.8)


@pytest.mark.parametrize(
    ("distance", "anchors", "text"),
    [
        (0.3, ALL, "0.3 is less than what real images of all classes (0.6) get."),
        (0.62, ALL, "0.6 is about what real images of all classes (0.6) get."),
        (9.0, ALL, "9.0 is between what real images of all classes (0.6) and of all classes but "
                   "one (16.6) get."),
        (30.0, ALL, "30.0 is between what real images of all classes but one (16.6) and of half "
                    "of the classes (44.8) get; those of all classes get 0.6."),
        (41.2, ALL, "41.2 is about what real images of half of the classes (44.8) get; those of "
                    "all classes get 0.6."),
        (353.0, ALL, "353.0 is 7.9 times what real images of half of the classes (44.8) get; "
                     "those of all classes get 0.6."),
        (9.0, Anchors(real=2.0), "9.0 is 4.5 times what real images of all classes (2.0) get."),
        (9.0, Anchors(real=0.0), "9.0 is more than what real images of all classes (0.0) get."),
        (0.0, Anchors(real=0.0), "0.0 is about what real images of all classes (0.0) get."),
    ],
)  # fmt: skip
def test_a_distance_stands_between_those_of_real_images(
    distance: float, anchors: Anchors, text: str
) -> None:
    assert compared(distance, anchors) == text


@pytest.mark.parametrize(
    ("intervals", "verdict", "due"),
    [
        (0, None, 2),
        (1, None, 2),
        # The last one is always evaluated.
        (2, None, 3),
        (3, None, None),
        (1, Verdict(130, "stopped"), None),
    ],
)
def test_when_a_run_is_evaluated_next(
    tmp_path: Path, intervals: int, verdict: Verdict | None, due: int | None
) -> None:
    folder = write_told(tmp_path / "run", intervals=intervals, verdict=verdict)
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    config["evaluation"]["every_intervals"] = 2
    (folder / CONFIG).write_text(json.dumps(config), "utf-8")
    record = RunRecord.read(folder)
    assert record.next_evaluation == due


@pytest.mark.parametrize(
    ("names", "said"),
    [(3, "client-1, client-2, client-3."), (40, "client-1, client-2, client-3 and 37 more.")],
)
def test_of_many_who_never_trained_three_are_named(tmp_path: Path, names: int, said: str) -> None:
    folder = write_told(tmp_path / "run", intervals=0, verdict=None)
    log = EventLog(folder / EVENTS, role="edge", node="edge-0")
    for number in range(1, names + 1):
        log.write(PeerChanged(peer=f"client-{number}", change="joined", detail=""))
    log.close()
    own = (folder / EVENTS).read_text("utf-8").replace("client-0,client-1,client-2", "")
    (folder / EVENTS).write_text(own, "utf-8")
    found = verdict(RunRecord.read(folder), now=0.0).found
    assert f"Who never trained: {said}" in found
