"""Processes that end with their test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import Processes


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts programs in ``tmp_path``; nothing of them is left when the test ends."""
    with Processes(tmp_path) as started:
        yield started
