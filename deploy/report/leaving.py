"""The report that a run leaves at its end."""

import logging
from pathlib import Path

from fedphd.deploy.launch.runs import Say

logger = logging.getLogger(__name__)


def leave_report(run_dir: Path, say: Say) -> None:
    """Write ``report.html`` on a run that ended, however it did, and say where it is.

    A report that cannot be written is a warning: what the run achieved does not depend on it.
    """
    try:
        # They take a second to import, and much memory, which no process has to spare before.
        from fedphd.deploy.report.page import write_report

        say(f"report    {write_report(run_dir)}")
    except Exception as error:
        logger.warning("%s: no report was written: %s", run_dir, error, exc_info=True)
