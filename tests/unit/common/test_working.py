"""Who hears how far long work is."""

from __future__ import annotations

import threading

import torch

from fedphd.common.quality.extractor import Extractor
from fedphd.common.working import Steps, telling, tracked

Told = list[tuple[str, int, int]]


def test_each_item_counts_as_done_when_the_next_is_asked() -> None:
    told: Told = []
    with telling(lambda *step: told.append(step)):
        assert list(tracked("ab", "reading", 2)) == ["a", "b"]
    assert told == [("reading", 0, 2), ("reading", 1, 2), ("reading", 2, 2)]


def test_without_a_listener_the_work_is_the_same() -> None:
    assert list(tracked("ab", "reading", 2)) == ["a", "b"]
    Steps("sampling", 3).advance()


def test_a_listener_hears_only_its_own_thread_and_block() -> None:
    told: Told = []
    with telling(lambda *step: told.append(step)):
        other = threading.Thread(target=Steps, args=("elsewhere", 1))
        other.start()
        other.join()
    Steps("afterwards", 1)
    assert told == []


def test_features_are_tracked_by_batches() -> None:
    told: Told = []
    extractor = Extractor(torch.nn.Flatten(), scores=lambda x: x, spec=None)  # type: ignore[arg-type]
    images = torch.zeros(5, 1, 2, 2)
    with telling(lambda *step: told.append(step)):
        features = extractor.features(images, batch_size=2, device=torch.device("cpu"))
    assert features.shape == (5, 4)
    assert told[-1] == ("computing features", 3, 3)
