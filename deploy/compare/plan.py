"""Which runs a comparison consists of, and which of them are there already."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedphd.common.config.roles import CloudConfig, load_config, validate
from fedphd.common.config.run import FederationConfig
from fedphd.common.config.text import flattened
from fedphd.common.errors import ConfigError
from fedphd.common.events import write_json
from fedphd.common.history.summary import SUMMARY
from fedphd.deploy.compare.budget import evaluation_period, method_settings
from fedphd.deploy.compare.methods import Method
from fedphd.deploy.launch.client_data import CLIENT_DEFAULTS
from fedphd.deploy.launch.runs import SIMULATION
from fedphd.deploy.simulation.run_config import SimulatedClients

PLAN = "compare.json"
CONFIG = "config.json"
_ABSENT = "(absent)"
_MOST_SHOWN = 8


@dataclass(frozen=True)
class Common:
    """What all runs of a comparison share.

    Attributes:
        path: the file of ``--config``.
        values: dotted settings that win over it.
        clients: whose data it is.
        out: folder of the comparison; the runs share its cache of feature classifiers.
    """

    path: Path | None
    values: Mapping[str, Any]
    clients: SimulatedClients
    out: Path

    def base(self) -> CloudConfig:
        """The common settings; pruning is left to the methods."""
        return self.load({"pruning.mode": "none"})

    def load(self, values: Mapping[str, Any]) -> CloudConfig:
        """The common settings with ``values`` on top; raises ConfigError."""
        out_dir = str(self.out.resolve())
        return load_config(CloudConfig, self.path, {**self.values, **values, "out_dir": out_dir})

    def identity(self) -> dict[str, Any]:
        """What must not change while a comparison grows; methods and seeds may come along."""
        shown = identity(self.base(), self.clients.data)
        return {key: value for key, value in shown.items() if key not in ("seed", "data.seed")}


@dataclass(frozen=True)
class PlannedRun:
    """One method with one seed."""

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

    def check(self, clients: SimulatedClients) -> None:
        """Raise ConfigError if a finished run in this folder had other settings; names them."""
        if not self.finished:
            return
        config = validate(
            CloudConfig, _read(self.folder / CONFIG), source=str(self.folder / CONFIG)
        )
        ran = identity(config, _read(self.folder / SIMULATION).get("clients", {}))
        wanted = identity(self.config, clients.record(self.config))
        if found := differences(ran, wanted):
            raise ConfigError(
                f"{self.folder} holds a finished run with other settings: {found}; set them as "
                "they were, choose another --out, or move the folder away to run it again"
            )


def plan_runs(
    common: Common,
    methods: Sequence[Method],
    seeds: Iterable[int],
    *,
    intervals: Mapping[str, int] | None = None,
) -> list[PlannedRun]:
    """All runs, every method of a seed before the next seed.

    Args:
        common: what they share.
        methods: to compare.
        seeds: one run of each method for each.
        intervals: cloud rounds of a method; as in the common settings where it is not named.

    Raises:
        ConfigError: a method's settings are impossible; names the method.
    """
    base = common.base()
    runs = []
    for seed in seeds:
        for method in methods:
            rounds = (intervals or {}).get(method.name, base.schedule.intervals)
            folder = common.out / method.name / f"seed-{seed}"
            config = method_config(common, base, method, seed=seed, intervals=rounds)
            runs.append(PlannedRun(method, seed, config, folder))
    return runs


def method_config(
    common: Common, base: CloudConfig, method: Method, *, seed: int, intervals: int
) -> CloudConfig:
    """The settings of a run; raises ConfigError and names the method."""
    settings = {
        **method_settings(method, base, intervals=intervals),
        "seed": seed,
        "evaluation.every_intervals": evaluation_period(base, intervals=intervals),
    }
    try:
        return common.load(settings)
    except ConfigError as error:
        raise ConfigError(f"method {method.name!r} ({method.title}): {error}") from error


def identity(config: CloudConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings that decide a run's numbers: training, evaluation and the clients' data.

    How long a process waits for another, and where files go, do not belong to it.
    """
    values = config.federation().model_dump(mode="json", exclude={"waits"})
    of_data = {"data.seed" if key == "seed" else key: value for key, value in data.items()}
    return {**dict(flattened(values)), **CLIENT_DEFAULTS, **of_data}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Dotted settings that differ, as ``key = before, now other``; "" if none does."""
    keys = sorted(before.keys() | now.keys())
    found = [
        f"{key} = {before.get(key, _ABSENT)!r}, now {now.get(key, _ABSENT)!r}"
        for key in keys
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]
    more = [f"and {len(found) - _MOST_SHOWN} more"] if len(found) > _MOST_SHOWN else []
    return "; ".join(found[:_MOST_SHOWN] + more)


@dataclass
class Plan:
    """What a comparison's folder was ever asked for: nothing asked for drops out of the report.

    Attributes:
        budget: "rounds" or "cloud-bytes".
        cloud_bytes: the number of bytes of the budget "cloud-bytes", once it is known.
        methods, seeds: asked for so far.
        intervals: cloud rounds per method where they differ from the common settings.
        common: what the runs share.
    """

    budget: str
    cloud_bytes: int | None
    methods: list[str]
    seeds: list[int]
    intervals: dict[str, int]
    common: dict[str, Any]

    @classmethod
    def read(cls, out: Path) -> Plan | None:
        """The stored plan of ``out``; None if there is none."""
        return cls(**_read(out / PLAN)) if (out / PLAN).exists() else None

    def write(self, out: Path) -> None:
        """Store it in ``out``."""
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PLAN, self.__dict__)

    def extended(self, earlier: Plan | None, out: Path) -> Plan:
        """This plan and what an earlier one of the same folder asked for.

        Raises:
            ConfigError: the common settings or the budget differ; names them.
        """
        if earlier is None:
            return self
        before, now = ({"budget": plan.budget, **plan.common} for plan in (earlier, self))
        # Settings that came with a newer version had their defaults before.
        defaults = dict(flattened(FederationConfig().model_dump(mode="json", exclude={"waits"})))
        new = {key: value for key, value in defaults.items() if key not in before and key in now}
        found = differences({**new, **before}, now)
        if earlier.cloud_bytes and self.cloud_bytes and earlier.cloud_bytes != self.cloud_bytes:
            found = f"cloud bytes = {earlier.cloud_bytes}, now {self.cloud_bytes}; {found}"
        if found:
            raise ConfigError(
                f"{out} holds a comparison with other settings: {found}; set them as they were, "
                "or choose another --out"
            )
        return Plan(
            budget=self.budget,
            cloud_bytes=self.cloud_bytes or earlier.cloud_bytes,
            methods=list(dict.fromkeys([*earlier.methods, *self.methods])),
            seeds=sorted({*earlier.seeds, *self.seeds}),
            intervals={**earlier.intervals, **self.intervals},
            common=self.common,
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error}; move the folder away to run it again"
        ) from error
    return content
