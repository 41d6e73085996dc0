"""Settings as text and as dotted keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from fedphd.common.config.roles import section_class
from fedphd.common.config.run import FederationConfig


def setting_keys(cls: type[BaseModel] = FederationConfig, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a training run."""
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
