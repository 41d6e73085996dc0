"""The ``fedphd`` command as a user starts it.

Most of such a process's time is importing. So these are forked off one process that has imported
what commands import, and differ from a user's in nothing else.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

TIMEOUT_S = 120
_OUTPUT, _ERRORS = "stdout", "stderr"
_forking = get_context("forkserver")
# Beside the command itself, what most commands import when they are called.
_forking.set_forkserver_preload(
    ["fedphd.deploy.cli.main", "fedphd.server.app", "fedphd.common.quality.reference"]
)


def fedphd(*arguments: str, cwd: Path | None = None, columns: int = 200) -> CompletedProcess[str]:
    """Run the command in a process of its own, on a terminal without colours."""
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": str(columns), "TERM": "dumb"}
    with TemporaryDirectory() as printed:
        process = _forking.Process(
            target=_run, args=(arguments, cwd or Path.cwd(), environment, Path(printed))
        )
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
        output, errors = ((Path(printed) / name).read_text("utf-8") for name in (_OUTPUT, _ERRORS))
    assert process.exitcode is not None
    return CompletedProcess(arguments, process.exitcode, output, errors)


def _run(arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], printed: Path) -> None:
    """Become the command; what it prints goes into files in the folder ``printed``."""
    from fedphd.deploy.cli.main import main

    for number, name in enumerate((_OUTPUT, _ERRORS), start=1):
        with (printed / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["fedphd", *arguments]
    main()
