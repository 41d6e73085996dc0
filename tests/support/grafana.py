"""The dashboard of ``deploy/monitoring``, as a test reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.manuals import ROOT

MONITORING = ROOT / "deploy/monitoring"
DASHBOARD = MONITORING / "grafana/dashboards/fedphd.json"


def panels(path: Path = DASHBOARD) -> list[dict[str, Any]]:
    """The dashboard's panels, but for the rows that they stand in."""
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Each panel's title with each of its queries, over a minute where Grafana would choose."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")
