"""Which versions of Flower this package works with: its own requirement says so."""

from importlib.metadata import requires, version

from packaging.requirements import Requirement

from fedphd.common.errors import StartError

FLOWER = "flwr"


def flower_problem() -> str:
    """What is wrong with the installed version of Flower; "" if it is one that works.

    Some of what is used lies below Flower's public interface, and changes from version to version.
    """
    needed = next(r for r in map(Requirement, requires("fedphd") or ()) if r.name == FLOWER)
    found = version(FLOWER)
    if needed.specifier.contains(found, prereleases=True):
        return ""
    wanted = f"{FLOWER}{needed.specifier}"
    return (
        f"Flower {found} is installed; this version of fedphd works with {wanted}: "
        f"pip install -c constraints.txt '{wanted}'"
    )


def check_flower() -> None:
    """Raise StartError where the installed version of Flower is not one that works."""
    if problem := flower_problem():
        raise StartError(problem)
