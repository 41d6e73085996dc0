"""Figures that take the page's colours, font and names."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from fedphd.deploy.report.figures import INK, Canvas, series, style


def drawn(key: str) -> str:
    with style():
        canvas = Canvas()
        canvas.axes.plot([0, 1], [2, 3], color=series(1), marker="o", label="one & <two>")
        canvas.axes.axhline(2.5, color=INK)
        canvas.axes.set_xlabel("interval")
        canvas.legend()
        return canvas.chart(key, alt='A line, "rising" & <more>', title="t").svg


def test_colours_are_the_pages_variables() -> None:
    svg = drawn("a")
    assert {"var(--s1)", "var(--ink)", "var(--muted)", "var(--line)"} <= set(
        re.findall(r"var\(--\w+\)", svg)
    )
    # matplotlib's own are nowhere: black text could not be read in the dark.
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []


def test_text_stays_text_in_the_pages_font() -> None:
    texts = {"".join(node.itertext()) for node in ElementTree.fromstring(drawn("a")).iter("text")}
    assert {"interval", "one & <two>"} <= texts
    assert "DejaVu" not in drawn("a")


def test_alternative_text_is_escaped() -> None:
    root = ElementTree.fromstring(drawn("a"))
    assert (root.get("role"), root.get("aria-label")) == ("img", 'A line, "rising" & <more>')


def test_it_holds_no_address() -> None:
    assert "http" not in drawn("a")
    assert "xmlns" not in drawn("a")


def test_names_in_two_figures_of_a_page_differ_and_lead_somewhere() -> None:
    names = []
    for key in ("a", "b"):
        root = ElementTree.fromstring(drawn(key))
        own = {node.get("id") for node in root.iter()} - {None}
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawn(key)))
        assert used
        assert used == own
        names.append(own)
    assert not names[0] & names[1]
