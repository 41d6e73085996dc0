"""``fedphd report``."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fedphd.common.errors import ConfigError
from fedphd.deploy.cli.flags import say


def report(
    run: Annotated[Path, Argument(help="folder of a run, also of one that is under way")],
    out: Annotated[
        Path | None,
        Option(help="file to write", show_default="report.html in the run's folder"),
    ] = None,
) -> None:
    """Write a page on a run: samples, curves, who trained where, traffic, settings; one file."""
    from fedphd.deploy.report.page import write_report

    if out is not None and (out.is_dir() or not out.name):
        raise ConfigError(
            f"--out {out}: is a folder; name a file in it, such as {out / 'report.html'}"
        )
    try:
        say(f"wrote     {write_report(run, out)}")
    except OSError as error:
        raise ConfigError(f"{out or run}: cannot be written: {error.strerror or error}") from error
