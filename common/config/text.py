"""Settings as text: dotted keys, ``KEY=VALUE``, TOML, and what Flower's command line takes.

The only place that parses or writes any of them.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from fedphd.common.config.run import FederationConfig
from fedphd.common.errors import ConfigError

_WORD = re.compile(r"\S*")
_ABSENT = "(absent)"
_MOST_SHOWN = 8


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The section class in a field's annotation (``Section`` or ``Section | None``), if any."""
    if get_origin(annotation) in (Union, UnionType):
        return next(filter(None, map(section_class, get_args(annotation))), None)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def setting_keys(cls: type[BaseModel] = FederationConfig, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a section; of a training run, unless told otherwise."""
    keys: list[str] = []
    for name, field in cls.model_fields.items():
        section = section_class(field.annotation)
        keys += setting_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Dotted settings that differ, as ``key = before, now other``; "" if none does."""
    found = [
        f"{key} = {old!r}, now {new!r}"
        for key in sorted(before.keys() | now.keys())
        if (old := before.get(key, _ABSENT)) != (new := now.get(key, _ABSENT))
    ]
    more = [f"and {len(found) - _MOST_SHOWN} more"] if len(found) > _MOST_SHOWN else []
    return "; ".join(found[:_MOST_SHOWN] + more)


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested ``values`` in which those at dotted keys are replaced.

    Raises ConfigError, which names the key, if a dotted key leads through a single value.
    """
    copied = copy.deepcopy(dict(values))
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        section = copied
        for parent in parents:
            # What is absent, as a stored reference may be, is begun.
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise ConfigError(f"{dotted}: {parent} is a single value, not a section")
        section[last] = value
    return copied


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested ``base`` with ``over`` on top; lists and single values are replaced whole."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def parse_settings(settings: Iterable[str], *, source: str = "--set") -> dict[str, Any]:
    """``["a.b=3"]`` -> ``{"a.b": 3}``; a value is JSON, or else plain text.

    Raises ConfigError, which names ``source`` as their place, if one is not ``KEY=VALUE``.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"{source} {setting}: write KEY=VALUE, such as num_threads=4")
        try:
            values[key.strip()] = json.loads(text)
        except json.JSONDecodeError:
            values[key.strip()] = text
    return values


def split_settings(text: str) -> list[str]:
    """``"a=[1, 2] b=x"`` -> ``["a=[1, 2]", "b=x"]``: split at white space outside of JSON."""
    settings = []
    while text := text.strip():
        key, equals, rest = text.partition("=")
        end = 0
        with suppress(json.JSONDecodeError):
            end = json.JSONDecoder().raw_decode(rest)[1]
        # Plain text ends at the next space, also where it begins like JSON: 2-classes.
        end = _WORD.match(rest, end).end()  # type: ignore[union-attr]  # It matches "" too.
        settings.append(key + equals + rest[:end])
        text = rest[end:]
    return settings


def settings_text(values: Mapping[str, Any]) -> str:
    """Dotted keys and values as ``split_settings`` and ``parse_settings`` read them back.

    Without line breaks and single quotes, which nothing in Flower's command line escapes.
    """
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    return text.replace("'", "\\u0027")


def flower_pairs(values: Mapping[str, object]) -> str:
    """Keys and values as ``flwr`` takes them: TOML, separated by spaces."""
    return " ".join(f"{key}={_flower_value(value)}" for key, value in values.items())


def _flower_value(value: object) -> str:
    """A value as TOML, such that ``flwr`` finds its end: it knows no escaped quotes."""
    return f"'{value}'" if isinstance(value, str) and '"' in value else toml_value(value)


def toml_value(value: object) -> str:
    """A string, path, number, boolean or list of such as TOML; its strings are JSON's but for DEL.

    Raises ValueError if it is, or holds, NaN or an infinity.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    return text.replace("\x7f", "\\u007f")


def to_toml(values: Mapping[str, object], prefix: str = "") -> str:
    """Nested values as TOML, a section's own values before its sections; None is left out."""
    own = {k: v for k, v in values.items() if not isinstance(v, Mapping) and v is not None}
    lines = [f"{key} = {toml_value(value)}" for key, value in own.items()]
    for key, value in values.items():
        if isinstance(value, Mapping):
            section = f"{prefix}{key}"
            lines += ["", f"[{section}]", to_toml(value, f"{section}.")]
    return "\n".join(lines) + "\n"


def write_config(path: Path, values: Mapping[str, object]) -> list[str]:
    """Write nested values to ``path`` as TOML; return the flags by which ``fedphd`` reads them.

    TOML has no null, and what is absent here, but in the preset, would come back: so the flags
    unset each such key.
    """
    path.write_text(to_toml(values), encoding="utf-8")
    unset = [key for key, value in flattened(values) if value is None]
    return ["--config", str(path), *(w for key in unset for w in ("--set", f"{key}=null"))]
