"""Imports Flower's typer without the warnings of newer click versions; groups tests for xdist."""

from __future__ import annotations

import warnings
from typing import Final

import pytest

with warnings.catch_warnings():
    # typer 0.20 on click 8.5; the message is about typer's own imports.
    warnings.filterwarnings("ignore", r"'click\.utils\.", DeprecationWarning)
    import typer  # noqa: F401

# They look at the same finished run, which takes a minute.
_SHARE_A_RUN: Final = ("test_report_page.py", "test_simulation.py")


def pytest_itemcollected(item: pytest.Item) -> None:
    """The tests of a file, which share what it has set up, are one worker's (--dist loadgroup)."""
    name = item.path.name
    group = "local-run" if name in _SHARE_A_RUN else str(item.path)
    item.add_marker(pytest.mark.xdist_group(group))
