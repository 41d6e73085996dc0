"""``fedphd simulate``: the whole federation by Flower's simulation, on a SuperLink of our own."""

import shutil
import threading
from pathlib import Path

from fedphd.common.config.roles import CloudConfig
from fedphd.common.errors import EXIT_OK
from fedphd.common.events import Verdict, write_json
from fedphd.deploy.launch.launchers import serve, started
from fedphd.deploy.launch.origin import origin
from fedphd.deploy.launch.runs import (
    ROLE_FILE,
    SIMULATION,
    Resumed,
    Say,
    clients_folder,
    prepare,
    show_summary,
    state_of,
)
from fedphd.deploy.launch.superlink import SuperLink
from fedphd.deploy.simulation.cluster import Cluster
from fedphd.deploy.simulation.run_config import SimulatedClients


def run_simulation(
    config: CloudConfig,
    *,
    clients: SimulatedClients,
    run_dir: Path,
    stop: threading.Event,
    say: Say,
    resumed: Resumed | None = None,
    cluster: Cluster | None = None,
) -> Verdict:
    """Simulate cloud, edges and clients by ``flwr run`` on a SuperLink of our own.

    Flower's home goes into ``run_dir`` too, so that simulations can run side by side. ``stop`` is
    set from outside to end early; ``say`` gets the lines for people. ``resumed`` says how far the
    run in ``run_dir`` is, if it goes on. Clients train on the ``cluster``, whose machines must all
    see ``run_dir``; None: on this machine.
    """
    config = config.model_copy(update={"state_dir": state_of(run_dir)})
    file = prepare("simulation", config, run_dir, resumed, cluster.cpus if cluster else 0)
    federation = clients.federation(config)
    record = {"clients": clients.record(config), "federation": federation, "origin": origin()}
    write_json(run_dir / SIMULATION, record)
    if cluster is not None:
        say(f"cluster   {cluster}")
    address = cluster.address if cluster else None
    link = SuperLink(config.superlink, config.state_dir, simulation=True, ray_address=address)
    with started(link):
        run_config = {**clients.run_config(config), ROLE_FILE: str(file.path)}
        say(f"running   {link.submit(run_config, federation)}")
        with file.settled():
            verdict = serve(link, file, stop, say)
    if verdict.exit_code == EXIT_OK:
        shutil.rmtree(clients_folder(run_dir), ignore_errors=True)
        show_summary(run_dir, say)
    return verdict
