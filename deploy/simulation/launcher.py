"""``fedphd simulate``: the whole federation by Flower's simulation, on a SuperLink of our own."""

from __future__ import annotations

import threading
from pathlib import Path

from fedphd.common.config.roles import CloudConfig
from fedphd.common.errors import EXIT_OK
from fedphd.common.events import Verdict, write_json
from fedphd.deploy.launch.launchers import serve, started
from fedphd.deploy.launch.origin import origin
from fedphd.deploy.launch.runs import ROLE_FILE, SIMULATION, RoleFile, Say, prepare, show_summary
from fedphd.deploy.launch.superlink import SuperLink
from fedphd.deploy.simulation.run_config import SimulatedClients


def run_simulation(
    config: CloudConfig,
    *,
    clients: SimulatedClients,
    run_dir: Path,
    stop: threading.Event,
    say: Say,
) -> Verdict:
    """Simulate cloud, edges and clients by ``flwr run`` on a SuperLink of our own.

    Args:
        config: the training run.
        clients: who is simulated.
        run_dir: the run's folder, where Flower's home goes too, so that simulations can run
            side by side.
        stop: set from outside to end early.
        say: gets the lines for people.
    """
    config = config.model_copy(update={"state_dir": run_dir / "state"})
    path = prepare("simulation", config, run_dir)
    run_config, federation = clients.run_config(config), clients.federation(config)
    record = {"clients": run_config, "federation": federation, "origin": origin()}
    write_json(run_dir / SIMULATION, record)
    with started(SuperLink(config.superlink, config.state_dir, simulation=True)) as link:
        submitted = link.submit({**run_config, ROLE_FILE: str(path.resolve())}, federation)
        say(f"running   {submitted}")
        verdict = serve(link, RoleFile.read(path), stop, say)
    if verdict.exit_code == EXIT_OK:
        show_summary(run_dir, say)
    return verdict
