"""``fedphd config``: every setting of a role, explained."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer import Argument

from fedphd.common.config.roles import ROLES, CloudConfig, load_config
from fedphd.common.config.text import section_class, toml_value
from fedphd.common.errors import ConfigError
from fedphd.deploy.cli.flags import Preset, say

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >="}


def explain_config(
    role: Annotated[Literal["cloud", "edge", "client"], Argument(help="whose configuration")],
    key: Annotated[
        str | None,
        Argument(help="a setting, or a section; else all of them", show_default=False),
    ] = None,
    preset: Preset = None,
) -> None:
    """List every setting of a role with its default, range and meaning, as valid TOML."""
    if preset and role != "cloud":
        raise ConfigError(f"--preset {preset}: the {role} has none; presets are the cloud's")
    # The cloud's settings start from a preset, so the fields' own defaults do not tell.
    config = load_config(ROLES[role], None, {"preset": preset} if preset else None)
    found = [(k, text) for k, text in _explain(config, "") if key is None or _is_of(k, key)]
    if not found:
        near = get_close_matches(str(key), [k for k, _ in _explain(config, "")], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"`fedphd config {role}` lists all"
        raise ConfigError(f"{key}: the {role} has no such setting; {hint}")
    whose = f"`fedphd {role}`"
    if isinstance(config, CloudConfig):
        whose += f", preset {config.preset}"
    say(f"# Settings of {whose}, with their defaults. A file for --config needs only")
    say("# the lines that you change; or set one by --set KEY=VALUE. Names in _s are in seconds.")
    for _, text in found:
        say(text)


def _is_of(key: str, wanted: str) -> bool:
    return key == wanted or key.startswith(f"{wanted}.")


def _explain(config: BaseModel, prefix: str, *, absent: bool = False) -> Iterator[tuple[str, str]]:
    """Each field's key and lines; those of an ``absent`` section are comments."""
    for name, field in type(config).model_fields.items():
        key, value = f"{prefix}{name}", getattr(config, name)
        missing = absent or value is None
        section = section_class(field.annotation)
        if section is None:
            text = "(absent)" if value is None else toml_value(value)
            setting = f"{'# ' if missing else ''}{key} = {text}"
            yield key, f"\n# {field.description}{_limits(field)}\n{setting}"
            continue
        meaning = field.description or str(section.__doc__).replace("``", "`")
        yield key, f"\n# {key}: {meaning}{' (absent by default)' if value is None else ''}"
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
