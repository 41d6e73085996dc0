"""Ticks that say what they are at."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fedphd.deploy.report.axes import labels_beside, seconds, shares, sizes
from fedphd.deploy.report.figures import Canvas


def ticks(canvas: Canvas) -> list[str]:
    canvas.figure.canvas.draw()
    low, high = canvas.axes.get_ylim()
    return [
        label.get_text()
        for at, label in zip(canvas.axes.get_yticks(), canvas.axes.get_yticklabels(), strict=True)
        if low <= at <= high
    ]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0.21, ["0%", "5%", "10%", "15%", "20%"]),
        (0.11, ["0%", "2%", "4%", "6%", "8%", "10%"]),
        (0.011, ["0%", "0.2%", "0.4%", "0.6%", "0.8%", "1%"]),
    ],
)
def test_shares_are_not_rounded(most: float, expected: list[str]) -> None:
    canvas = Canvas()
    canvas.axes.set_ylim(0, most)
    shares(canvas.axes)
    assert ticks(canvas) == expected


@pytest.mark.parametrize(
    ("most", "name", "unit"),
    [(119.0, "seconds", 1), (125.0, "minutes", 60), (7199.0, "minutes", 60), (9e4, "hours", 3600)],
)
def test_times_have_one_unit(most: float, name: str, unit: int) -> None:
    canvas = Canvas()
    assert seconds(canvas.axes, most) == unit
    canvas.axes.set_ylim(0, most / unit)
    assert canvas.axes.get_ylabel() == name
    assert all(text.replace(".", "").isdigit() for text in ticks(canvas))


def test_bytes_have_one_unit() -> None:
    canvas = Canvas()
    assert sizes(canvas.axes, 180e6) == 1e6
    canvas.axes.set_ylim(0, 180)
    assert canvas.axes.get_ylabel() == "MB"
    assert ticks(canvas) == ["0", "50", "100", "150"]
    assert (sizes(canvas.axes, 0), canvas.axes.get_ylabel()) == (1, "bytes")


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_words_beside_the_axes_stay_apart(scale: str) -> None:
    canvas = Canvas()
    canvas.axes.set_yscale(scale)
    canvas.axes.set_ylim(1, 100)
    labels_beside(canvas.axes, [(10.0, "ten"), (10.5, "more"), (1.0, "one")])
    canvas.figure.canvas.draw()
    boxes = sorted(text.get_window_extent().extents.tolist() for text in canvas.axes.texts)
    right = canvas.axes.get_window_extent().x1
    assert all(left >= right for left, *_ in boxes)
    heights = sorted((bottom, top) for _, bottom, _, top in boxes)
    assert all(top <= bottom for (_, top), (bottom, _) in pairwise(heights))
