"""A run's folder, read whole: of a run that ended well, failed, was cut off or is under way."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ValidationError

from fedphd.common.config.roles import CloudConfig, read_preset, validate
from fedphd.common.config.text import flattened, merged
from fedphd.common.data.partition import PARTITION_FILE
from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.events import Event, Verdict, read_verdict
from fedphd.common.history import events as kinds
from fedphd.common.history.summary import SUMMARY, Summary
from fedphd.deploy.launch.runs import (
    CLIENTS,
    CONFIG,
    EDGE_EVENTS,
    EVENTS,
    SIMULATION,
    VERDICT,
)

EventT = TypeVar("EventT", bound=Event)

ABSENT = "(absent)"
# Those that leave in the last seconds were told that the run is over.
_LEAVING_S = 5.0
# What says where a machine's things are, and nothing about the training.
_OF_THE_MACHINE = ("superlink", "state_dir", "out_dir", "health", "preset", "device")


@dataclass
class Members:
    """Who trained at an edge in an edge round, and who was left out of it."""

    trained: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Problem:
    """What went wrong with one participant, ``times`` in the ``intervals``."""

    who: str
    why: str
    times: int
    intervals: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """A setting, and what the preset or the default would be."""

    key: str
    value: Any
    usual: Any


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run; ``config``, ``verdict`` and ``summary`` are None where not written.

    ``partition``, ``clients`` and ``simulation`` are empty then.
    """

    folder: Path
    config: CloudConfig | None
    verdict: Verdict | None
    summary: Summary | None
    events: Sequence[Event]
    partition: dict[str, Any]
    clients: dict[str, Any]
    simulation: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The run in ``folder``; also the events of edges that a local run has not merged yet.

        Raises ConfigError if no run has begun there, or one of its files cannot be read.
        """
        if not any((folder / name).exists() for name in (CONFIG, EVENTS, VERDICT)):
            raise ConfigError(
                f"{folder}: no run here ({CONFIG}, {EVENTS}); name the folder of a run, such as "
                "runs/20261124-154906"
            )
        try:
            config = _json(folder / CONFIG)
            logs = (folder / EVENTS, *sorted(folder.glob(f"state/edge-*/{EDGE_EVENTS}")))
            return cls(
                folder=folder,
                config=validate(CloudConfig, config, source=CONFIG) if config else None,
                verdict=read_verdict(folder / VERDICT),
                summary=Summary.read(folder) if (folder / SUMMARY).exists() else None,
                events=[*filter(None, map(kinds.read_event, kinds.merged_lines(logs)))],
                partition=_json(folder / PARTITION_FILE),
                clients=_json(folder / CLIENTS),
                simulation=_json(folder / SIMULATION),
            )
        except (OSError, ValueError, ValidationError, FedPhDError) as error:
            raise ConfigError(f"{folder}: its files cannot be read: {error}") from error

    @cached_property
    def intervals(self) -> list[kinds.IntervalEnded]:
        """The finished intervals."""
        return _of(self.events, kinds.IntervalEnded)

    @cached_property
    def rounds(self) -> list[kinds.RoundEnded]:
        """The edge rounds that are known one by one: those of a machine's own edges."""
        return _of(self.events, kinds.RoundEnded)

    @cached_property
    def evaluations(self) -> list[kinds.Evaluated]:
        """All evaluations, by interval."""
        return _of(self.events, kinds.Evaluated)

    @cached_property
    def measured(self) -> list[kinds.Evaluated]:
        """Those evaluations that have a distance."""
        return [one for one in self.evaluations if one.frechet_distance is not None]

    @property
    def next_evaluation(self) -> int | None:
        """The interval after which is evaluated next; None if the run has ended."""
        if self.config is None or self.verdict is not None:
            return None
        last = max((one.interval or 0 for one in self.evaluations), default=0)
        every = self.config.evaluation.every_intervals
        due = min(last // every * every + every, self.num_intervals)
        return due if due > last else None

    @cached_property
    def pruned(self) -> kinds.Pruned | None:
        """The pruning, once there was one."""
        return next(iter(_of(self.events, kinds.Pruned)), None)

    @property
    def origin(self) -> dict[str, str]:
        """Version, commit and machine, as far as they were recorded."""
        started = [event.origin for event in _of(self.events, kinds.Started) if event.origin]
        found = dict(self.simulation.get("origin", {}))
        if self.summary:
            found.setdefault("fedphd_version", self.summary.fedphd_version)
        return found | (started[-1] if started else {})

    @property
    def edge_rounds(self) -> int:
        """Edge rounds of an interval."""
        return self.config.schedule.edge_rounds if self.config else 1

    @property
    def num_intervals(self) -> int:
        """Intervals that were asked for."""
        return self.config.schedule.intervals if self.config else len(self.intervals)

    @property
    def is_flat(self) -> bool:
        """Whether clients train at the cloud itself."""
        return self.config is not None and self.config.topology == "flat"

    @cached_property
    def members(self) -> dict[int, dict[str, Members]]:
        """By number of the edge round in the run, from 1, and by edge: who trained there."""
        found: dict[int, dict[str, Members]] = defaultdict(dict)
        for ended in self.rounds:
            left_out = [text.partition(":")[0] for text in ended.failures]
            found[ended.round][ended.node] = Members(ended.clients, left_out)
        for interval in self.intervals:
            first = (interval.interval - 1) * self.edge_rounds + 1
            for edge, figures in interval.edges.items():
                for number, trained in enumerate(figures.trained):
                    left_out = figures.left_out[number] if number < len(figures.left_out) else []
                    found[first + number][edge] = Members(trained, left_out)
        return dict(sorted(found.items()))

    @cached_property
    def edges(self) -> list[str]:
        """Every edge that took part, sorted by name."""
        trained = {edge for by_edge in self.members.values() for edge in by_edge}
        weighed = {edge for interval in self.intervals for edge in interval.edge_weights}
        return sorted(trained | weighed, key=natural)

    @cached_property
    def client_names(self) -> list[str]:
        """Every client that an edge had or that took part, sorted by name."""
        found: set[str] = set()
        for by_edge in self.members.values():
            for members in by_edge.values():
                found |= {*members.trained, *members.left_out}
        for change in _of(self.events, kinds.PeerChanged):
            if change.change == kinds.SERVES:
                found |= set(filter(None, change.detail.split(",")))
            # Who joins the cloud is an edge, in a flat run the one that is the cloud's own.
            elif change.change == "joined" and change.role == "edge":
                found.add(change.peer)
        # A client may be called as an edge is: what it did says which of them it is.
        return sorted(found, key=natural)

    def rounds_at(self, edge: str) -> Counter[str]:
        """In how many edge rounds each client trained at ``edge``."""
        return Counter(
            name
            for by_edge in self.members.values()
            for name in by_edge.get(edge, Members()).trained
        )

    @cached_property
    def problems(self) -> list[Problem]:
        """Who was left out or refused, and why; those with the same reason in one line."""
        last = max((ended.interval for ended in self.intervals), default=0)
        texts = [(one.interval, text) for one in self.intervals for text in one.failures]
        texts += [
            (one.interval, text)
            for one in self.rounds
            if one.interval > last
            for text in one.failures
        ]
        texts += [
            (0, f"{change.peer}: refused: {change.detail}")
            for change in _of(self.events, kinds.PeerChanged)
            if change.change == "refused"
        ]
        texts += self._departures
        times: dict[str, list[int]] = defaultdict(list)
        for interval, text in texts:
            times[text].append(interval)
        found = []
        for text, where in times.items():
            who, _, why = text.partition(": ")
            found.append(Problem(who, why, len(where), tuple(sorted({*where} - {0}))))
        return found

    @property
    def _departures(self) -> list[tuple[int, str]]:
        """Who left before the end, and in which interval; once, however many edges saw it."""
        found, interval, ends = [], 1, []
        for event in self.events:
            if isinstance(event, kinds.IntervalEnded):
                interval = event.interval + 1
            elif isinstance(event, kinds.Ended) and event.role == "cloud":
                # When it is interrupted, others end too; it may go on with them.
                ends.append(event.time)
            elif isinstance(event, kinds.PeerChanged) and event.change == "left":
                found.append((event.time, interval, f"{event.peer}: left"))
        ends = ends or [event.time for event in self.events[-1:]]
        alone = [
            (i, text)
            for at, i, text in found
            if at < ends[-1] and all(abs(end - at) > _LEAVING_S for end in ends)
        ]
        return sorted({pair for pair in alone if pair[0] <= self.num_intervals})

    @cached_property
    def settings(self) -> list[Setting]:
        """What differs from the preset, or from the defaults where that says nothing."""
        if self.config is None:
            return []
        name = self.config.preset
        usual = validate(CloudConfig, merged(read_preset(name), {"preset": name}), source=name)
        now, before = (
            dict(flattened(config.model_dump(mode="json", exclude=set(_OF_THE_MACHINE))))
            for config in (self.config, usual)
        )
        keys = [key for key in {**now, **before} if now.get(key, ABSENT) != before.get(key, ABSENT)]
        return [Setting(key, now.get(key, ABSENT), before.get(key, ABSENT)) for key in keys]

    @property
    def elapsed_s(self) -> float:
        """Seconds from the start to the end, or to the last event, without those between processes.

        A run that was resumed had several; before the last of them only the cloud's events count,
        since edges may wait for it.
        """
        if self.summary and "total" in self.summary.seconds:
            return self.summary.seconds["total"]
        cloud = [event for event in self.events if event.role == "cloud"]
        starts = [number for number, one in enumerate(cloud) if isinstance(one, kinds.Started)]
        ends = [cloud[number - 1].time for number in starts[1:]]
        ends += [event.time for event in self.events[-1:]]
        times = [cloud[number].time for number in starts]
        times = times or [event.time for event in self.events[:1]]
        return sum(max(0.0, end - start) for start, end in zip(times, ends, strict=True))

    @cached_property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase; put together from the events where there is no summary."""
        if self.summary:
            return {name: s for name, s in self.summary.seconds.items() if name != "total"}
        found: dict[str, float] = defaultdict(float)
        for ended in self.intervals:
            found["sparse_training" if ended.sparse else "training"] += ended.seconds
        return dict(found)


def when(interval: int | None) -> str:
    """When an interval's samples or network were made."""
    return f"after interval {interval}" if interval else "before training"


def natural(name: str) -> tuple[object, ...]:
    """A key that sorts ``client-10`` after ``client-9``."""
    digits = name.rstrip("0123456789")
    return digits, int(name[len(digits) :] or -1), name


def _of(events: Iterable[Event], kind: type[EventT]) -> list[EventT]:
    return [event for event in events if isinstance(event, kind)]


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content
