"""Inside Flower's ServerApp process: run the cloud or the edge that a role file describes."""

import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedphd.common.config.roles import CloudConfig, EdgeConfig, validate
from fedphd.common.errors import ConfigError, Interrupted, StartError, exit_code_of
from fedphd.common.events import Event, EventLog, Verdict, write_verdict
from fedphd.common.history.events import Ended, Started
from fedphd.common.wire.handover import hand_over_at_once
from fedphd.common.wire.names import BoundNames
from fedphd.common.wire.raypool import replace_lost_actors
from fedphd.deploy.apps.refused import stand_last, words_of
from fedphd.deploy.launch import runs
from fedphd.deploy.launch.origin import origin
from fedphd.deploy.report.leaving import leave_report
from fedphd.deploy.simulation.run_config import client_config, cloud_config, state_folder

logger = logging.getLogger(__name__)

NODES_S = 60.0
SETTLED_S = 0.3


def run_role(grid: Grid, path: Path, *, say: runs.Say | None = None) -> None:
    """Run the role of the file at ``path`` to its end, and leave a verdict whatever happens.

    ``say`` gets a line for people per event; None where a launcher shows them. Raises FedPhDError
    where the role failed; the verdict says so too.
    """
    file = runs.RoleFile.read(path)
    # Flower does not pass on a ServerApp's standard output, so it logs to a file of its own.
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(filename=file.log, level=logging.INFO, format=line)
    # Flower logs every connection attempt and prints a page about each strategy that starts.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    role = "edge" if file.role == "edge" else "cloud"
    node = str(file.config.get("edge_id", "cloud"))

    def on_event(event: Event) -> None:
        if say:
            runs.show_event(event, say)

    events = EventLog(
        Path(file.events), role=role, node=node, on_event=on_event, before=file.events_before
    )
    # Edges are installed alike: who speaks another protocol is refused.
    events.write(Started(pid=os.getpid(), origin=origin() if role == "cloud" else {}))
    verdict = Verdict(Interrupted.exit_code, "stopped")
    try:
        verdict = _run(grid, file, events)
    except Exception as error:
        verdict = Verdict(exit_code_of(error), f"{error}" or type(error).__name__)
        logger.error("%s", traceback.format_exc())
        raise
    finally:
        # SystemExit, by which Flower ends a process on a signal, passes through here too.
        events.write(Ended(exit_code=verdict.exit_code, message=verdict.message))
        events.close()
        write_verdict(Path(file.verdict), verdict)


def run_simulated(grid: Grid, run_config: Mapping[str, Any]) -> None:
    """Run what ``flwr run`` submitted without a launcher: make its folder, show its events.

    Raises:
        ConfigError: a setting of the run configuration is wrong; also printed, and the last
            that Flower says.
    """
    try:
        num_nodes = count_nodes(grid)
        config = cloud_config(run_config, num_nodes)
        runs.check_data(config)
        data = client_config(run_config, 0, num_nodes).data
        split = runs.open_client_data(data, config.num_classes)
    except ConfigError as error:
        print(f"fedphd: {words_of(error)}", flush=True)
        stand_last(error)
        raise
    run_dir = runs.run_folder(None, config.out_dir.absolute())
    print(f"run folder {run_dir}\ndata {split}", flush=True)
    split.write(run_dir)
    file = runs.prepare("simulation", config, run_dir)
    say = partial(print, flush=True)
    try:
        with file.settled():
            run_role(grid, file.path, say=say)
        runs.show_summary(run_dir, say=say)
    finally:
        leave_report(run_dir, say)


def count_nodes(
    grid: Grid, *, within_s: float = NODES_S, sleep: Callable[[float], None] = time.sleep
) -> int:
    """How many nodes are simulated; Flower starts the ServerApp while it still adds them.

    Raises StartError where there is none within ``within_s`` seconds.
    """
    deadline_s = time.monotonic() + within_s
    before = -1
    while (count := len(list(grid.get_node_ids()))) != before or count == 0:
        if time.monotonic() > deadline_s:
            raise StartError(f"Flower simulates no node after {within_s:g} s; see its log")
        before = count
        sleep(SETTLED_S)
    return count


def _run(grid: Grid, file: runs.RoleFile, events: EventLog) -> Verdict:
    bound = BoundNames(Path(file.names)) if file.names else None
    # Each role imports only its own side: an edge needs no diffusion code.
    if file.role == "edge":
        from fedphd.edge import app as edge_app

        edge = validate(EdgeConfig, file.config, source="role file")
        return edge_app.main(grid, edge, events, bound)
    from fedphd.deploy.simulation.virtual_edges import grid_of_edges
    from fedphd.server import app as cloud_app

    cloud = validate(CloudConfig, file.config, source="role file")
    if simulated := file.role == "simulation":
        hand_over_at_once()
        replace_lost_actors()
    kept = runs.state_of(Path(file.run_dir))
    edges = grid_of_edges(
        grid, cloud, events, simulated=simulated, bound=bound, folder=kept, cores=file.cores
    )
    try:
        run_dir = Path(file.run_dir)
        return cloud_app.main(
            edges,
            cloud,
            events,
            run_dir,
            # The edges of a flat federation are this process's own.
            bound=bound if cloud.topology == "hierarchical" else None,
            simulated=simulated,
            resume=file.resumed,
        )
    finally:
        if simulated:
            shutil.rmtree(state_folder(grid.run.run_id), ignore_errors=True)
