"""The notebook of the manuals runs, and shows what it is committed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[2] / "docs" / "tour.ipynb"
MOST_BYTES = 200_000


def outputs(notebook: Any, kind: str) -> list[str]:
    """What the cells put out as ``kind``, such as "image/png", or printed ("text")."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    if kind == "text":
        return [output.text for output in found if output.output_type == "stream"]
    return [output.data[kind] for output in found if kind in output.get("data", ())]


def test_the_notebook_is_committed_with_its_pictures_and_stays_small() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    assert len(outputs(notebook, "image/png")) == 3
    assert "pruned to 75% of the widths" in outputs(notebook, "text")[0]
    assert not [o for c in notebook.cells for o in c.get("outputs", ()) if o.output_type == "error"]
    assert TOUR.stat().st_size < MOST_BYTES


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs_to_its_end() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    before = outputs(notebook, "text")
    NotebookClient(notebook, timeout=3000, kernel_name="python3").execute()
    assert len(outputs(notebook, "image/png")) == 3
    # Reproducible, but other processors round otherwise.
    (told, cost), (told_before, cost_before) = outputs(notebook, "text"), before
    assert told.count("interval") == told_before.count("interval")
    assert cost.splitlines()[1] == cost_before.splitlines()[1]
