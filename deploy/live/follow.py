"""Reads a run's event logs as they grow, and says which events people must see at once."""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedphd.common.config.roles import CloudConfig
from fedphd.common.errors import EXIT_OK, ConfigError, Interrupted
from fedphd.common.events import Event
from fedphd.common.history import events as kinds
from fedphd.common.history.events import Tail, read_event
from fedphd.common.history.status import CONNECTED
from fedphd.deploy.launch.render import render
from fedphd.deploy.launch.resuming import holds_run, stored_config
from fedphd.deploy.launch.runs import CLIENTS, EDGE_EVENTS, EVENTS
from fedphd.deploy.live.model import Federation

_SAID = 200
_LOUD = ("failed", "left", "refused", "late")


@dataclass
class Log:
    """An event log that grows, and may be replaced: cut when a run goes on, merged at its end."""

    path: Path
    _tail: Tail | None = None
    _file: int = 0

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """What came since the last call; all of it again where the file is another one."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return
        is_new = self._tail is None or status.st_ino != self._file
        if self._tail is None or is_new or status.st_size < self._tail.position:
            self._tail, self._file = Tail(self.path), status.st_ino
        yield from self._tail.new_lines()


@dataclass
class Follower:
    """Follows the run in ``folder``, that of a cloud, of a whole federation, or of one edge.

    Attributes:
        federation: what the events say so far.
        loud: lines of the events that people must see, in their order.
    """

    folder: Path
    federation: Federation = field(default_factory=Federation)
    loud: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._logs: dict[Path, Log] = {}
        self._seen: set[int] = set()
        self._shown: set[str] = set()
        self._said: deque[str] = deque(maxlen=_SAID)
        self._expected = False

    def check(self) -> None:
        """Raise ConfigError unless the folder holds a run, or an edge's state."""
        if not holds_run(self.folder) and not any(path.exists() for path in self._paths()):
            raise ConfigError(
                f"{self.folder}: no run is there ({EVENTS}); name a run's folder, such as "
                "runs/20261124-154906"
            )

    def shows(self, line: str) -> bool:
        """Whether a line for people is that of an event."""
        return line in self._shown

    def poll(self) -> None:
        """Take in what has happened since the last call."""
        self._read_config()
        lines = [line for path in self._paths() for line in self._new_of(path)]
        for line in sorted(lines, key=lambda line: float(line.get("time", 0.0))):
            try:
                event = read_event(line)
            except ValueError:
                # Of another version: the rest can be shown all the same.
                continue
            if event is not None:
                self._take(event)

    def expect(self, config: CloudConfig, *, launched: bool = True) -> None:
        """What the run will be, and who will come where one command has ``launched`` all."""
        self._expected = True
        edges = 0 if config.topology == "flat" else config.schedule.num_edges
        # Elsewhere participants have names of their own.
        names = (edges, config.schedule.min_clients) if launched else (0, 0)
        self.federation.expect(*names, config.schedule.intervals)

    def _read_config(self) -> None:
        if holds_run(self.folder) and not self._expected:
            launched = (self.folder / CLIENTS).exists()
            self.expect(stored_config(self.folder), launched=launched)

    def _paths(self) -> Iterable[Path]:
        own = (self.folder / EVENTS, self.folder / EDGE_EVENTS)
        return [*own, *sorted(self.folder.glob(f"state/edge-*/{EDGE_EVENTS}"))]

    def _new_of(self, path: Path) -> Iterator[dict[str, Any]]:
        log = self._logs.setdefault(path, Log(path))
        for line in log.new_lines():
            # Merged logs bring the edges' events a second time.
            key = hash(json.dumps(line, sort_keys=True))
            if key not in self._seen:
                self._seen.add(key)
                yield line

    def _take(self, event: Event) -> None:
        self.federation.fold(event)
        if line := render(event):
            self._shown.add(line)
        self.loud += self._loud_lines(event)

    def _loud_lines(self, event: Event) -> Iterator[str]:
        match event:
            case kinds.PeerChanged() if event.change in _LOUD:
                # Who left did so without a word, which is no failure that could come again.
                if event.detail:
                    self._said.append(f"{event.peer}: {event.detail}")
                yield render(event) or ""
            case kinds.LinkChanged() if event.change != CONNECTED:
                yield render(event) or ""
            case kinds.RoundEnded() | kinds.IntervalEnded() | kinds.StatisticsCollected():
                for failure in event.failures:
                    # A round's failures have been said one by one, an interval's by its edges.
                    if not any(_is_that(failure, said) for said in self._said):
                        self._said.append(failure)
                        yield f"{event.node:<9} without {failure}"
            case kinds.Ended() if event.exit_code not in (EXIT_OK, Interrupted.exit_code):
                yield f"{event.node:<9} ended: {event.message}"
            case _:
                pass


def _is_that(failure: str, said: str) -> bool:
    """Whether a failure is the one that was ``said``; the cloud puts an edge's name in front."""
    return said in (failure, failure.partition(": ")[2])
