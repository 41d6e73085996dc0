"""The three roles' configurations, read from TOML, checked once at the edge of the program.

The cloud's file holds the whole training run; an edge or a client knows only its own world.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator

from fedphd.common.config.data import DataConfig, Section, setting
from fedphd.common.config.evaluation import check_steps
from fedphd.common.config.links import (
    EdgeSuperLinkConfig,
    HealthConfig,
    NodeConfig,
    SuperLinkConfig,
    check_address,
)
from fedphd.common.config.paths import UserPath
from fedphd.common.config.run import FederationConfig
from fedphd.common.config.text import merged, section_class, with_overrides
from fedphd.common.config.tracking import TrackingConfig
from fedphd.common.errors import ConfigError

PRESETS = ("digits", "cifar10-16", "cifar10", "celeba")
DeviceName = Literal["auto", "cpu", "cuda"]
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")


def check_id(value: str) -> str:
    """Return ``value`` if it may name a participant; raise ValueError otherwise."""
    if not _ID.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a valid name; use 1 to 64 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
    return value


class CheckpointConfig(Section):
    """What is kept of a run's networks."""

    keep: int = setting(1, "checkpoints of the last intervals that are kept", ge=1)


class CloudConfig(FederationConfig):
    """``fedphd cloud``: the training run and the cloud's own machine."""

    preset: Literal["digits", "cifar10-16", "cifar10", "celeba"] = setting(
        "digits", "settings to start from"
    )
    out_dir: UserPath = setting(Path("runs"), "folder in which each run gets a folder")
    state_dir: UserPath = setting(Path(".fedphd/cloud"), "Flower's own state and logs")
    device: DeviceName = setting("auto", "where evaluation runs")
    num_threads: int = setting(2, "CPU threads of this process", ge=1)
    superlink: SuperLinkConfig = Field(default_factory=SuperLinkConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)

    def federation(self) -> FederationConfig:
        """Only the part that defines the training run."""
        return FederationConfig(**{n: getattr(self, n) for n in FederationConfig.model_fields})


class EdgeConfig(Section):
    """``fedphd edge``: one edge aggregator."""

    edge_id: str = setting("edge-0", "stable name of this edge")
    cloud: str = setting("127.0.0.1:9092", "host:port of the cloud's SuperLink")
    state_dir: UserPath | None = setting(
        None, "Flower's own state and logs; absent: .fedphd/EDGE_ID"
    )
    num_threads: int = setting(1, "CPU threads of this process", ge=1)
    superlink: EdgeSuperLinkConfig = Field(default_factory=EdgeSuperLinkConfig)
    node: NodeConfig = Field(default_factory=NodeConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)

    _address = field_validator("cloud")(check_address)
    _id = field_validator("edge_id")(check_id)

    @property
    def state_folder(self) -> Path:
        """Where this edge keeps its state: a folder of its own also beside another edge."""
        return self.state_dir or Path(".fedphd") / self.edge_id


class ClientConfig(Section):
    """``fedphd client``: one client with its private data."""

    client_id: str = setting("client-0", "stable name of this client")
    state_dir: UserPath | None = setting(
        None, "where moments and own parts outlast a restart; absent: .fedphd/CLIENT_ID"
    )
    edges: tuple[str, ...] = setting(
        ("127.0.0.1:9192",), "host:port of every edge that it may choose", min_length=1
    )
    device: DeviceName = setting("auto", "where training runs")
    num_threads: int = setting(1, "CPU threads of this process", ge=1)
    data: DataConfig = Field(default_factory=DataConfig)
    node: NodeConfig = Field(default_factory=NodeConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)

    _id = field_validator("client_id")(check_id)

    @property
    def state_folder(self) -> Path:
        """Where this client keeps its training state."""
        return self.state_dir or Path(".fedphd") / self.client_id

    @field_validator("edges")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # An edge would refuse the second of two nodes that go by one name.
        known: set[tuple[str, int]] = set()
        for address in value:
            host, _, port = check_address(address).rpartition(":")
            place = host.lower(), int(port)
            if place in known:
                raise ValueError(
                    f"edges = {list(value)} names an address twice, {address}; name each edge once"
                )
            known.add(place)
        return value


ConfigT = TypeVar("ConfigT", bound=Section)


ROLES: Final[Mapping[str, type[CloudConfig | EdgeConfig | ClientConfig]]] = {
    "cloud": CloudConfig,
    "edge": EdgeConfig,
    "client": ClientConfig,
}


def load_config(
    cls: type[ConfigT],
    path: Path | None = None,
    overrides: dict[str, Any] | None = None,
    *,
    source: str = "command line",
) -> ConfigT:
    """Read a role's configuration from a TOML file; a CloudConfig starts from its preset.

    Args:
        overrides: dotted keys and values that win over the file, such as
            ``{"schedule.intervals": 12}``; None unsets an optional one.
        source: what an error names as the place of ``overrides``, beside the file.

    Raises:
        ConfigError: the file cannot be read, or a field is wrong; names field, value and fix.
    """
    of_file = read_toml(path) if path else {}
    values = with_overrides(of_file, overrides or {})
    if issubclass(cls, CloudConfig):
        values = merged(read_preset(values.get("preset", "digits")), values)
    places = [*([str(path)] if path else []), *([source] if overrides or not path else [])]
    try:
        config = validate(cls, values, source=" and ".join(places))
        # Not in the class: former runs, whose configuration it reads, had any number.
        if isinstance(config, CloudConfig):
            check_steps(config.evaluation.sampling_steps, config.diffusion.num_train_timesteps)
        return config
    except ConfigError as error:
        if role := _role_of_file(of_file, cls):
            raise ConfigError(
                f"{error}\n  its keys are those of another role: `fedphd {role} --config {path}`"
            ) from error
        raise


def _role_of_file(values: Mapping[str, Any], cls: type[BaseModel]) -> str | None:
    """The role whose settings all of a file's are, where some are not those of ``cls``."""
    if values.keys() <= cls.model_fields.keys():
        return None
    fitting = [role for role, one in ROLES.items() if values.keys() <= one.model_fields.keys()]
    return fitting[0] if len(fitting) == 1 else None


def validate(cls: type[ConfigT], values: dict[str, Any], *, source: str) -> ConfigT:
    """Check plain values (as TOML or JSON give them) against ``cls``; raise ConfigError."""
    try:
        return cls.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(explain(cls, error, source)) from error


def read_preset(name: object) -> dict[str, Any]:
    """Return the values of a built-in preset of the cloud's configuration; raises ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"preset = {name!r}: unknown; choose one of {', '.join(PRESETS)}")
    folder = resources.files("fedphd.common.config.presets")
    return tomllib.loads((folder / f"{name}.toml").read_text("utf-8"))


def explain(cls: type[BaseModel], error: ValidationError, source: str) -> str:
    """Say for each wrong field what it is, what it holds and what to do about it."""
    lines = [f"{source}: {error.error_count()} setting(s) refused"]
    for item in error.errors(include_url=False):
        where, text = ".".join(map(str, item["loc"])), item["msg"]
        if item["type"] == "extra_forbidden":
            lines.append(f"  {where}: unknown key{_did_you_mean(cls, item['loc'])}")
        elif item["type"] == "value_error":
            # Settings that are wrong only together have no place: their text names them.
            place = f"{where}: " if where else ""
            lines.append(f"  {place}{text.removeprefix('Value error, ')}")
        else:
            problem = text[:1].lower() + text[1:]
            lines.append(f"  {where} = {item['input']!r}: {problem}{_meaning(cls, item['loc'])}")
    return "\n".join(lines)


def read_toml(path: Path, *, flag: str = "--config") -> dict[str, Any]:
    """The values of the TOML file that ``flag`` names; raises ConfigError."""
    try:
        # With a byte order mark or without; editors on Windows write one.
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: not valid TOML: {error}") from error


def _section(cls: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The section class that holds the field at ``loc``."""
    current: type[BaseModel] | None = cls
    for part in loc[:-1]:
        field = current.model_fields.get(str(part)) if current else None
        current = section_class(field.annotation) if field else None
    return current


def _did_you_mean(cls: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    section = _section(cls, loc)
    if section is None:
        return ""
    if near := difflib.get_close_matches(str(loc[-1]), section.model_fields, n=1):
        return f"; did you mean {'.'.join([*map(str, loc[:-1]), near[0]])!r}?"
    return f"; known keys: {', '.join(sorted(section.model_fields))}"


def _meaning(cls: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    named = tuple(part for part in loc if isinstance(part, str))
    section = _section(cls, named) if named else None
    field = section.model_fields.get(named[-1]) if section else None
    return f" ({field.description})" if field and field.description else ""
