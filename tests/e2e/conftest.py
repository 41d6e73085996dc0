"""Processes that end with their test, a browser, a finished run that several tests compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from support.browser import browser
from support.processes import SLOW_S, Processes
from support.same import Outcome, run


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts programs in ``tmp_path``; nothing of them is left when the test ends."""
    with Processes(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """``fedphd local`` with the settings of ``support/same.py``."""
    with Processes(tmp_path_factory.mktemp("local-run")) as started:
        return run(started, "local", "run")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Real processes need more time on a busy machine than tests of one process have."""
    if item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(3 * SLOW_S))
