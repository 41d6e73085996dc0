"""Which runs a comparison consists of, and which of them are finished."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError

from fedphd.common.config.roles import CloudConfig, explain, load_config, validate
from fedphd.common.config.text import flattened
from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.events import Event, write_json
from fedphd.common.history.events import IntervalEnded, Tail
from fedphd.common.history.summary import SUMMARY, Summary
from fedphd.deploy.compare.budget import Budget, evaluation_period, method_settings
from fedphd.deploy.compare.methods import Method, default_settings
from fedphd.deploy.launch.client_data import CLIENT_DEFAULTS
from fedphd.deploy.launch.runs import EVENTS, SIMULATION
from fedphd.deploy.simulation.run_config import SimulatedClients

PLAN = "compare.json"
_ABSENT = "(absent)"
_MOST_SHOWN = 8


@dataclass(frozen=True)
class CommonSettings:
    """What all runs of a comparison share: dotted ``settings`` win over the TOML file ``path``.

    They also share ``out``, the comparison's folder, and in it a cache of feature classifiers.
    """

    path: Path | None
    settings: Mapping[str, Any]
    clients: SimulatedClients
    out: Path

    def base(self) -> CloudConfig:
        """The configuration that the methods change; pruning is left to them."""
        return self.load({"pruning.mode": "none"})

    def load(self, settings: Mapping[str, Any]) -> CloudConfig:
        """The common configuration with ``settings`` on top; raises ConfigError."""
        own = {**self.settings, **settings, "out_dir": str(self.out.resolve())}
        return load_config(CloudConfig, self.path, own)

    def fixed(self) -> dict[str, Any]:
        """Settings that stay the same while methods and seeds are added to a comparison."""
        shown = decisive_settings(self.base(), self.clients.data)
        return {key: value for key, value in shown.items() if key not in ("seed", "data.seed")}


@dataclass(frozen=True)
class PlannedRun:
    """One method with one seed; ``purpose`` marks the name of a run that is not in the report."""

    method: Method
    seed: int
    config: CloudConfig
    folder: Path
    purpose: str = ""

    @property
    def name(self) -> str:
        """For people and for the names of logs."""
        return f"{self.purpose}{self.method.name}-seed-{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether the run left its summary."""
        return (self.folder / SUMMARY).exists()

    def summary(self) -> Summary:
        """What the finished run left; raises FedPhDError if it is damaged."""
        with readable(self.folder):
            return Summary.read(self.folder)

    def events(self) -> Iterator[Event]:
        """What has happened in the run so far; raises FedPhDError if its log is damaged."""
        with readable(self.folder):
            yield from Tail(self.folder / EVENTS).new_events()

    def cloud_rounds(self) -> list[IntervalEnded]:
        """The cloud rounds so far, as ``events``."""
        return [event for event in self.events() if isinstance(event, IntervalEnded)]

    def check(self, clients: SimulatedClients) -> None:
        """Raise ConfigError if a finished run in this folder had other settings; names them."""
        if not self.finished:
            return
        path = self.folder / "config.json"
        config = validate(CloudConfig, _read(path), source=str(path))
        data = _read(self.folder / SIMULATION).get("clients", {})
        wanted = decisive_settings(self.config, clients.record(self.config))
        if found := differences(decisive_settings(config, data), wanted):
            raise ConfigError(
                f"{self.folder} holds a finished run with other settings: {found}; set them as "
                "they were, choose another --out, or move the folder away to run it again"
            )


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raise FedPhDError that names a finished run's folder if what is read of it is damaged."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError) as error:
        problem = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise FedPhDError(
            f"{folder}: not a complete finished run ({problem}); move the folder away to run it "
            "again"
        ) from error


def plan_run(
    common: CommonSettings,
    method: Method,
    seed: int,
    *,
    intervals: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PlannedRun:
    """A run of ``method``; raises ConfigError that names it if its settings are impossible.

    Args:
        seed: of the weights, of who takes part, of the choices and of the split of the data.
        intervals: cloud rounds; None: as in the common settings.
        settings: dotted settings that win over all of these.
    """
    base = common.base()
    intervals = base.schedule.intervals if intervals is None else intervals
    own = {
        **method_settings(method, base, intervals=intervals),
        "seed": seed,
        "evaluation.every_intervals": evaluation_period(base, intervals=intervals),
    }
    try:
        config = common.load({**own, **(settings or {})})
    except ConfigError as error:
        raise ConfigError(f"method {method.name!r} ({method.title}): {error}") from error
    return PlannedRun(method, seed, config, common.out / method.name / f"seed-{seed}")


def decisive_settings(config: CloudConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings that decide a run's numbers, so neither waits nor where files are written."""
    values = config.federation().model_dump(mode="json", exclude={"waits"})
    of_data = {"data.seed" if key == "seed" else key: value for key, value in data.items()}
    return {**dict(flattened(values)), **CLIENT_DEFAULTS, **of_data}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Dotted settings that differ, as ``key = before, now other``; "" if none does."""
    found = [
        f"{key} = {old!r}, now {new!r}"
        for key in sorted(before.keys() | now.keys())
        if (old := before.get(key, _ABSENT)) != (new := now.get(key, _ABSENT))
    ]
    more = [f"and {len(found) - _MOST_SHOWN} more"] if len(found) > _MOST_SHOWN else []
    return "; ".join(found[:_MOST_SHOWN] + more)


class Plan(BaseModel, extra="forbid"):
    """All that was ever asked for in a comparison's folder, as ``compare.json`` stores it.

    A later call adds methods and seeds; the report always covers all of them.
    """

    budget: Budget = Field(description="what every method gets the same amount of")
    cloud_bytes: int | None = Field(description="bytes of Budget.cloud_bytes, once known")
    methods: list[str]
    seeds: list[int]
    intervals: dict[str, int] = Field(
        default_factory=dict, description="cloud rounds by method, where Budget.cloud_bytes sets it"
    )
    common: dict[str, Any] = Field(description="CommonSettings.fixed")

    @classmethod
    def read(cls, out: Path) -> Self | None:
        """The plan stored in ``out``; None if there is none; raises ConfigError."""
        path = out / PLAN
        if not path.exists():
            return None
        try:
            return cls.model_validate(_read(path))
        except ValidationError as error:
            raise ConfigError(explain(cls, error, str(path))) from error

    def write(self, out: Path) -> None:
        """Store it in ``out``."""
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PLAN, self.model_dump(mode="json"))

    def extending(self, out: Path) -> Self:
        """This plan and the one in ``out``, if any; raises ConfigError that names differences."""
        earlier = self.read(out)
        if earlier is None:
            return self
        # Settings that came with a newer version had their defaults before.
        new = {key: value for key, value in default_settings().items() if key in self.common}
        before = {"budget": earlier.budget.value, **new, **earlier.common}
        found = differences(before, {"budget": self.budget.value, **self.common})
        if earlier.cloud_bytes and self.cloud_bytes and earlier.cloud_bytes != self.cloud_bytes:
            found = f"cloud bytes = {earlier.cloud_bytes}, now {self.cloud_bytes}; {found}"
        if found:
            raise ConfigError(
                f"{out} holds a comparison with other settings: {found}; set them as they were, "
                "or choose another --out"
            )
        return earlier.model_copy(
            update={
                "cloud_bytes": self.cloud_bytes or earlier.cloud_bytes,
                "methods": list(dict.fromkeys([*earlier.methods, *self.methods])),
                "seeds": sorted({*earlier.seeds, *self.seeds}),
                "common": self.common,
            }
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error}; move the folder away to run it again"
        ) from error
    return content
