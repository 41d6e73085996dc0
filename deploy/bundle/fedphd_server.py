"""What Flower runs as ServerApp: it imports the installed package, so no code travels."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a launcher's role file, or else simulate what the run configuration describes."""
    from fedphd.deploy.apps.roles import run_role, run_simulated

    role_file = str(context.run_config["role-file"])
    if role_file:
        run_role(grid, Path(role_file))
    else:
        run_simulated(grid, context.run_config)
