"""``fedphd top``: a run's federation, refreshed in place, from the events in its folder."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument

from fedphd.common.config.roles import CloudConfig
from fedphd.common.errors import ConfigError
from fedphd.deploy.launch.launchers import stop_on_signal
from fedphd.deploy.live.show import Board, is_terminal, refreshed

POLL_S = 0.5


def top(
    run: Annotated[
        Path | None,
        Argument(
            help="folder of a run, going on or ended, or an edge's state folder",
            show_default="the newest in runs/",
        ),
    ] = None,
) -> None:
    """Show a run: who works on what, rounds, losses, bytes per second, stragglers, time left.

    On a terminal it is refreshed until the run or an interrupt ends it, else shown once.
    """
    folder = run or newest(CloudConfig().out_dir)
    board = Board(folder, foot="Ctrl-C leaves; the run goes on")
    board.follower.check()
    board.follower.poll()
    console = Console(highlight=False)
    if not is_terminal() or board.follower.federation.ended is not None:
        board.last(console)
        return
    # An exception in the middle of drawing might leave a lock behind; and it only looks on, so that
    # an interrupt is no failure.
    with stop_on_signal() as stop, refreshed(board, console):
        while board.follower.federation.ended is None and not stop.wait(POLL_S):
            pass


def newest(out_dir: Path) -> Path:
    """The newest run's folder in ``out_dir``; raises ConfigError if there is none."""
    folders = [place.parent for place in out_dir.glob("*/config.json")]
    if not folders:
        raise ConfigError(f"no run is in {out_dir}/; name a run's folder: fedphd top FOLDER")
    return max(folders, key=lambda folder: (folder / "config.json").stat().st_mtime)
