"""What Flower runs as ServerApp: it imports the installed package, so no code travels."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the role that the run's role file names."""
    from fedphd.deploy.roles import run_role

    run_role(grid, str(context.run_config["role-file"]))
