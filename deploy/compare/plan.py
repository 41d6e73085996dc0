"""Which runs a comparison consists of, and which of them are finished."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError

from fedphd.common.config.roles import CloudConfig, explain, load_config, validate
from fedphd.common.config.text import differences, flattened
from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.events import Event, write_json
from fedphd.common.history.events import IntervalEnded, Tail
from fedphd.common.history.summary import SUMMARY, Summary
from fedphd.deploy.compare.budget import Budget, Workload, evaluation_period, method_settings
from fedphd.deploy.compare.methods import Method, default_settings
from fedphd.deploy.compare.rows import Row
from fedphd.deploy.launch.client_data import CLIENT_DEFAULTS, KIND, PRESET, data_of
from fedphd.deploy.launch.origin import DIRTY
from fedphd.deploy.launch.runs import CONFIG, EVENTS, SIMULATION, open_client_data
from fedphd.deploy.simulation.run_config import SimulatedClients

PLAN = "compare.json"
_ABSENT = "(absent)"


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
        base = self.base()
        shown = {PRESET: base.preset, **decisive_settings(base, self.clients.data)}
        return {key: value for key, value in shown.items() if key not in ("seed", "data.seed")}


@dataclass(frozen=True)
class PlannedRun:
    """One method with one seed.

    Attributes:
        clients: their data and resources.
        purpose: marks the name of a run that is no result; "" for one that is.
        tuning: whether it serves to choose settings.
        row: what is known of the finished run without its folder.
    """

    method: Method
    seed: int
    config: CloudConfig
    folder: Path
    clients: SimulatedClients
    purpose: str = ""
    tuning: bool = False
    row: Row | None = None

    @property
    def name(self) -> str:
        """For people and for the names of logs."""
        return f"{self.purpose}{self.method.name}-seed-{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether the run has a row, or left its summary."""
        return self.row is not None or (self.folder / SUMMARY).exists()

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

    @property
    def decisive(self) -> dict[str, Any]:
        """Dotted settings that decide its numbers."""
        return decisive_settings(self.config, self.clients.record(self.config))

    def check(self, common: Mapping[str, Any]) -> None:
        """Raise ConfigError if it is finished, but with other settings; names them.

        A row's settings are those that differ from the ``common`` ones.
        """
        if not self.finished:
            return
        if self.row is not None:
            before = {**default_settings(), **common, **self.row.settings}
            before = {key: value for key, value in before.items() if key in self.decisive}
        else:
            before = self._settings_of_folder()
        if found := differences(before, self.decisive):
            raise ConfigError(
                f"{self.folder} holds a finished run with other settings: {found}; set them as "
                "they were, choose another --out, or move the folder away to run it again"
            )

    def goes_on(self, origin: Mapping[str, str]) -> bool:
        """Whether what an interrupted run left can go on, by the code and machine of ``origin``.

        Other settings, other data, another commit or machine would make numbers of two kinds; and
        of a checkout with changes nobody knows whether it is still the same.
        """
        if origin["commit"].endswith(DIRTY):
            return False
        try:
            same = _read(self.folder / SIMULATION).get("origin") == origin
            return same and not differences(self._settings_of_folder(), self.decisive)
        except ConfigError:
            return False

    def _settings_of_folder(self) -> dict[str, Any]:
        """The decisive settings that its folder was begun with; raises ConfigError."""
        path = self.folder / CONFIG
        config = validate(CloudConfig, _read(path), source=str(path))
        return decisive_settings(config, _read(self.folder / SIMULATION).get("clients", {}))

    def own_settings(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Its decisive settings that differ from the ``common`` ones, for its row."""
        return {
            key: value for key, value in self.decisive.items() if common.get(key, _ABSENT) != value
        }


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
    tuned: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PlannedRun:
    """A run of ``method``; raises ConfigError that names it if its settings are impossible.

    Args:
        seed: of the weights, of who takes part, of the choices and of the split of the data.
        intervals: cloud rounds; None: as in the common settings.
        tuned: dotted settings that were chosen for the method; what defines it wins over them.
        settings: dotted settings that win over all of these.
    """
    base = common.base()
    intervals = base.schedule.intervals if intervals is None else intervals
    own = {
        **(tuned or {}),
        **method_settings(method, base, intervals=intervals),
        "seed": seed,
        "evaluation.every_intervals": evaluation_period(base, intervals=intervals),
        **(settings or {}),
    }
    try:
        config = common.load(own)
        clients = common.clients
        if method.pooled:
            config, clients = _pooled(common, config, own)
    except ConfigError as error:
        raise ConfigError(f"method {method.name!r} ({method.title}): {error}") from error
    return PlannedRun(method, seed, config, common.out / method.name / f"seed-{seed}", clients)


def _pooled(
    common: CommonSettings, config: CloudConfig, own: Mapping[str, Any]
) -> tuple[CloudConfig, SimulatedClients]:
    """One client with all images that takes as many steps as the others together."""
    data = tuple(sorted(common.clients.data.items()))
    sizes = _training_sizes(
        config.preset, config.seed, config.schedule.min_clients, config.num_classes, data
    )
    work = Workload.of(config, sizes)
    steps = {
        "schedule.min_clients": 1,
        "schedule.num_edges": 1,
        "schedule.participation": 1.0,
        "training.local_unit": "steps",
        "training.local_amount": round(work.participants * work.steps_per_round),
    }
    pooled = replace(common.clients, data={**common.clients.data, KIND: "iid"})
    return common.load({**own, **steps}), pooled


@cache
def _training_sizes(
    preset: str, seed: int, num_clients: int, num_classes: int, data: tuple[tuple[str, Any], ...]
) -> tuple[int, ...]:
    """Images that each client trains on; opening the data takes seconds."""
    first = data_of(dict(data), 0, num_clients, seed=seed, preset=preset)
    return open_client_data(first, num_classes).training_sizes(first.validation_fraction)


def decisive_settings(config: CloudConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings that decide a run's numbers, so neither waits nor where files are written."""
    values = config.federation().model_dump(mode="json", exclude={"waits"})
    of_data = {"data.seed" if key == "seed" else key: value for key, value in data.items()}
    return {**dict(flattened(values)), **CLIENT_DEFAULTS, **of_data}


class Tuning(BaseModel, extra="forbid"):
    """Settings that each method chose for itself, by one rule, on seeds that no table shows."""

    grid: dict[str, list[Any]] = Field(description="values by dotted key, in the order of tuning")
    seeds: list[int]
    intervals: int = Field(description="cloud rounds of a tuning run")
    chosen: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="by method: the chosen value of each of its keys"
    )
    taken_from: str | None = Field(None, description="the comparison that chose them")

    def of(self, method: Method) -> dict[str, Any]:
        """What was chosen for ``method``, or for the one that it follows."""
        return self.chosen.get(method.tuned_like or method.name, {})

    def differences(self, earlier: Self) -> str:
        """How this asks for another tuning than ``earlier``; "" if it does not."""
        before, now = (
            {"--tune": one.grid, "--tuning-seeds": one.seeds, "--tuning-intervals": one.intervals}
            for one in (earlier, self)
        )
        return differences(before, now)


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
    tuning: Tuning | None = Field(None, description="how methods got settings of their own")
    defined: dict[str, Method] = Field(
        default_factory=dict, description="methods of --methods-file, by name"
    )

    def completing(self, table: Mapping[str, Method]) -> dict[str, Method]:
        """The ``table`` of methods with those of a file that was named before."""
        return {**table, **{n: method for n, method in self.defined.items() if n not in table}}

    def tuned(self, method: Method) -> dict[str, Any]:
        """Dotted settings that were chosen for ``method``, perhaps none yet."""
        return self.tuning.of(method) if self.tuning else {}

    @classmethod
    def read(cls, out: Path) -> Self | None:
        """The plan stored in ``out``; None if there is none; raises ConfigError."""
        path = out / PLAN
        if not path.exists():
            return None
        try:
            # As JSON, which has no tuples.
            return cls.model_validate_json(json.dumps(_read(path)))
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
            return self._with_other_seeds()
        # Settings that came with a newer version, of the clients' data too, had their defaults
        # before.
        defaults = {**default_settings(), **CLIENT_DEFAULTS}
        new = {key: value for key, value in defaults.items() if key in self.common}
        new[PRESET] = CloudConfig.model_fields[PRESET].default
        before = {"budget": earlier.budget.value, **new, **earlier.common}
        found = differences(before, {"budget": self.budget.value, **self.common})
        if earlier.cloud_bytes and self.cloud_bytes and earlier.cloud_bytes != self.cloud_bytes:
            found = f"cloud bytes = {earlier.cloud_bytes}, now {self.cloud_bytes}; {found}"
        if self.tuning and earlier.tuning and (other := self.tuning.differences(earlier.tuning)):
            found = f"{found}; {other}" if found else other
        if found:
            raise ConfigError(
                f"{out} holds a comparison with other settings: {found}; set them as they were, "
                "or choose another --out"
            )
        # What another comparison has chosen may have grown there.
        grown = self.tuning is not None and self.tuning.taken_from is not None
        both = earlier.model_copy(
            update={
                "cloud_bytes": self.cloud_bytes or earlier.cloud_bytes,
                "methods": list(dict.fromkeys([*earlier.methods, *self.methods])),
                "seeds": sorted({*earlier.seeds, *self.seeds}),
                "common": self.common,
                "tuning": self.tuning if grown else earlier.tuning or self.tuning,
                "defined": {**earlier.defined, **self.defined},
            }
        )
        return both._with_other_seeds()

    def _with_other_seeds(self) -> Self:
        """This plan; raises ConfigError if it shows seeds on which settings were chosen."""
        if self.tuning and (both := sorted({*self.tuning.seeds} & {*self.seeds})):
            raise ConfigError(
                f"--seeds and --tuning-seeds: both have {both}; settings must be chosen on seeds "
                "that no table shows"
            )
        return self


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error}; move the folder away to run it again"
        ) from error
    return content
