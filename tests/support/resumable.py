"""A small federation in a process of its own, which a test may kill at any moment.

``python -m support.resumable FOLDER SETTINGS`` begins the run in the folder, or goes on with it;
the settings are JSON. It prints a line per event of the cloud.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from support.federation import Federation

from fedphd.common.events import Event, EventLog
from fedphd.deploy.launch.resuming import rewind
from fedphd.deploy.launch.runs import Resumed

SETTINGS = {
    "reproducible": True,
    "schedule.intervals": 4,
    "schedule.edge_rounds": 2,
    "schedule.participation": 0.75,
    "training.local_amount": 1,
    "pruning.mode": "scheduled",
    "pruning.sparse_rounds": 4,
    "evaluation.every_intervals": 2,
    "evaluation.num_samples": 4,
    "evaluation.grid_rows": 1,
    "waits.offer_s": 60.0,
    "waits.query_s": 120.0,
}


def main(folder: Path, settings: dict[str, object]) -> None:
    """Run to the end, and say so."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    federation = Federation(folder, {**SETTINGS, **settings})
    resumed = Resumed()
    if federation.run_dir.exists():
        resumed = rewind(federation.run_dir, folder / "state", lambda line: print(line, flush=True))
    write = EventLog.write

    def say(log: EventLog, event: Event) -> None:
        write(log, event)
        # In one piece, since edges write at the same time.
        print(f"event {event.event}\n", end="", flush=True)

    EventLog.write = say  # type: ignore[method-assign]
    verdict = federation.run(resumed=resumed)
    print(f"code {verdict.exit_code}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
