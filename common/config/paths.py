"""Paths in settings."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def expanded(path: Path) -> Path:
    """``path`` with the home folder that a leading ``~`` or ``~NAME`` means; else as it is.

    Files, ``--set`` and service managers hand it over as it stands: no shell has seen it. Raises
    ValueError where there is no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{str(path)!r} begins with the home folder of a user that this machine does not have; "
            "write the whole path"
        ) from error


UserPath = Annotated[Path, AfterValidator(expanded)]
