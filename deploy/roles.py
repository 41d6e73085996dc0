"""Inside Flower's ServerApp process: run the cloud or the edge that a role file describes."""

from __future__ import annotations

import json
import logging
import os
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedphd.common.config import CloudConfig, EdgeConfig, validate
from fedphd.common.errors import Interrupted, exit_code_of
from fedphd.common.events import EventLog, Verdict, write_json, write_verdict

if TYPE_CHECKING:
    from flwr.serverapp import Grid

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoleFile:
    """Hand-over from the launcher to the ServerApp: what to run, and where to write."""

    role: Literal["cloud", "edge"]
    config: dict[str, object]
    run_dir: str
    events: str
    verdict: str
    log: str

    def write(self, path: Path) -> None:
        """Store as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> RoleFile:
        """Load what ``write`` stored."""
        return cls(**json.loads(path.read_text("utf-8")))


def run_role(grid: Grid, role_file: str) -> None:
    """Run to the end; leave a verdict whatever happens."""
    file = RoleFile.read(Path(role_file))
    # Flower keeps a ServerApp's standard output to itself, so it logs to a file of its own.
    logging.basicConfig(
        filename=file.log,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # Flower logs every connection attempt and prints a page about each strategy that starts.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    node = str(file.config.get("edge_id", "cloud"))
    events = EventLog(Path(file.events), role=file.role, node=node)
    events.write("started", pid=os.getpid())
    verdict = Verdict(Interrupted.exit_code, "stopped")
    try:
        verdict = _run(grid, file, events)
    except Exception as error:
        verdict = Verdict(exit_code_of(error), f"{error}" or type(error).__name__)
        logger.error("%s", traceback.format_exc())
    finally:
        # SystemExit, by which Flower ends a process on a signal, passes through here too.
        events.write("ended", exit_code=verdict.exit_code, message=verdict.message)
        events.close()
        write_verdict(Path(file.verdict), verdict)


def _run(grid: Grid, file: RoleFile, events: EventLog) -> Verdict:
    # Each role imports only its own side; a machine with an edge needs no diffusion code.
    if file.role == "edge":
        from fedphd.edge import app as edge_app

        edge = validate(EdgeConfig, file.config, source="role file")
        return edge_app.main(grid, edge, events)
    from fedphd.server import app as cloud_app

    cloud = validate(CloudConfig, file.config, source="role file")
    return cloud_app.main(grid, cloud, events, Path(file.run_dir))
