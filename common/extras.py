"""Optional packages, which an extra of this package installs."""

import importlib.util

from fedphd.common.errors import ConfigError


def require_extra(what: str, extra: str, *modules: str) -> None:
    """Raise ConfigError, with the command that installs ``extra``, unless ``modules`` are there.

    ``what`` names the flag or setting that needs them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs packages that are not installed, {', '.join(missing)}: "
            f"pip install 'fedphd[{extra}]'"
        )
