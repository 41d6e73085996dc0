"""``fedphd config``: every setting of a role, explained."""

from collections.abc import Iterator
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer import Argument

from fedphd.common.config.data import Section
from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig, load_config
from fedphd.common.config.text import section_class, toml_value
from fedphd.deploy.cli.flags import say

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >="}
ROLES: dict[str, type[Section]] = {"cloud": CloudConfig, "edge": EdgeConfig, "client": ClientConfig}


def explain_config(
    role: Annotated[Literal["cloud", "edge", "client"], Argument(help="whose configuration")],
) -> None:
    """List every setting of a role with its default, range and meaning, as valid TOML."""
    say(f"# Settings of `fedphd {role}`, with their defaults. A file for --config needs only")
    say("# the lines that you change; or set one by --set KEY=VALUE. Names in _s are in seconds.")
    # The cloud's settings start from a preset, so the fields' own defaults do not tell.
    for line in _explain(load_config(ROLES[role]), ""):
        say(line)


def _explain(config: BaseModel, prefix: str, *, absent: bool = False) -> Iterator[str]:
    """Lines on all fields; those of an ``absent`` section are comments."""
    for name, field in type(config).model_fields.items():
        key, value = f"{prefix}{name}", getattr(config, name)
        missing = absent or value is None
        section = section_class(field.annotation)
        if section is None:
            yield f"\n# {field.description}{_limits(field)}"
            text = "(absent)" if value is None else toml_value(value)
            yield f"{'# ' if missing else ''}{key} = {text}"
            continue
        meaning = field.description or str(section.__doc__).replace("``", "`")
        yield f"\n# {key}: {meaning}{' (absent by default)' if value is None else ''}"
        yield from _explain(value or section(), f"{key}.", absent=missing)


def _limits(field: FieldInfo) -> str:
    """The range of a field in words, from its annotation."""
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(limit, name)
    ]
    if get_origin(field.annotation) is Literal:
        limits.append(" | ".join(get_args(field.annotation)))
    return f"  [{', '.join(limits)}]" if limits else ""
