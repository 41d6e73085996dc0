"""The methods that can be compared, and what each of them sets (``methods.toml``)."""

import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from fedphd.common.config.data import Section
from fedphd.common.config.roles import check_id, read_toml, validate
from fedphd.common.config.run import FederationConfig
from fedphd.common.config.text import flattened, merged, setting_keys
from fedphd.common.errors import ConfigError

# What makes a method: where its entry in the table does not set one of these, the default, plain
# averaging's, holds.
PLAIN = ("objective.method", "exchange.parts")
# Set for each method or run, so not common to all.
_OWN = ("topology", "seed", "pruning.mode", "pruning.sparse_rounds", *PLAIN)


class Method(Section):
    """One entry of the table of methods."""

    name: str = Field(description="name on the command line and of the folder of its runs")
    # Matplotlib's legends leave out what begins with an underscore.
    title: str = Field(
        min_length=1, pattern="^[^_]", description="name in tables and plots; not _ at first"
    )
    reference: str = Field(min_length=1, description="where the method is described")
    paper: bool = Field(False, description="part of the comparison of arXiv:2507.06449")
    topology: Literal["flat", "hierarchical"] = Field(description="as the setting topology")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="dotted settings that make the method what it is"
    )
    pooled: bool = Field(
        False, description="one client with all images does the steps of all clients"
    )
    tunes: tuple[str, ...] = Field((), description="dotted settings that are its own to tune")
    base: str | None = Field(None, description="method on which the entry builds")
    tuned_like: str | None = Field(
        None, description="method whose tuned values it takes over; it is not tuned itself"
    )

    _name = field_validator("name")(check_id)

    @property
    def prunes_half_way(self) -> bool:
        """Whether the first half of the cloud rounds trains the dense network."""
        return self.settings.get("pruning.mode") == "scheduled"


def read_methods(path: Path | None = None) -> dict[str, Method]:
    """The table of methods by name, with those of a TOML file, which may build on known ones.

    Raises ConfigError if the file cannot be read, or an entry is wrong; names it.
    """
    tables = tomllib.loads((resources.files(__package__) / "methods.toml").read_text("utf-8"))
    if path is not None:
        more = read_toml(path, flag="--methods-file")
        if both := sorted(tables.keys() & more.keys()):
            raise ConfigError(
                f"{path}: {', '.join(both)}: a method with this name exists already; rename yours"
            )
        tables |= more
    methods = {
        name: validate(Method, _entry(name, tables), source=f"method {name!r}") for name in tables
    }
    for name, method in methods.items():
        if method.tuned_like not in (None, *methods):
            raise ConfigError(
                f"method {name!r}: tuned_like = {method.tuned_like!r}: there is no such method; "
                f"known: {', '.join(methods)}"
            )
    return methods


def tuned_keys(method: Method, table: Mapping[str, Method], keys: Iterable[str]) -> list[str]:
    """Which of ``keys`` are tuned for ``method``: those of all methods, and its own.

    What some method lists in ``tunes`` is its own, what a method sets defines it.
    """
    if method.tuned_like is not None:
        return []
    owned = {key for other in table.values() for key in other.tunes}
    return [
        key
        for key in keys
        if key not in method.settings and (key in method.tunes or key not in owned)
    ]


def _entry(name: str, tables: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of an entry on top of those of its ``base``."""
    own = tables.get(name)
    if not isinstance(own, dict):
        raise ConfigError(f"method {name!r}: there is no [{name}]; known: {', '.join(tables)}")
    values = {**own, "name": name}
    if (base := values.get("base")) is None:
        return values
    if base in (name, *above):
        raise ConfigError(f"method {name!r}: base = {base!r} leads back to itself")
    # It is another method than its base, so it does not go by the same title.
    return merged(_entry(str(base), tables, (name, *above)), {"title": name, **values})


def choose_methods(table: Mapping[str, Method], names: Iterable[str] | None) -> list[Method]:
    """The named methods in the table's order; None: those of the paper.

    Raises ConfigError if a name is unknown, or a method sets what this version does not have.
    """
    wanted = {name for name, method in table.items() if method.paper} if names is None else {*names}
    if unknown := sorted(wanted - table.keys()):
        raise ConfigError(
            f"--methods: {', '.join(unknown)}: unknown; choose among {', '.join(table)}"
        )
    chosen = [method for name, method in table.items() if name in wanted]
    known = set(setting_keys())
    for method in chosen:
        if missing := [key for key in method.settings if key not in known]:
            raise ConfigError(
                f"method {method.name!r} ({method.title}) needs {', '.join(missing)}: no such "
                "setting in this version of fedphd; leave the method out (--methods), or correct "
                "its entry in the table of methods"
            )
    return chosen


@cache
def default_settings() -> Mapping[str, Any]:
    """Every dotted setting of a training run, at its default."""
    return dict(flattened(FederationConfig().model_dump(mode="json")))


def check_common(keys: Iterable[str]) -> None:
    """Raise ConfigError if ``keys``, to be set for all methods, has one that each method sets."""
    for key in keys:
        if key in _OWN:
            raise ConfigError(
                f"{key} cannot be set for all methods: each method or run has its own (--methods, "
                "--seeds); write a method with `base` and `settings`, and name its file by "
                "--methods-file"
            )
