"""What Flower runs: apps that import the installed package, so no code travels."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedphd.deploy.stock import client_app

__all__ = ["client_app", "server_app"]

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the role that the run's role file names."""
    from fedphd.deploy.roles import run_role

    run_role(grid, str(context.run_config["role-file"]))
