"""What happens in a run, a type per kind of event, for those who write it and those who read it.

An event log holds one JSON object per line. A reader passes over kinds that it does not know.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from fedphd.common.errors import ConfigError
from fedphd.common.events import Event
from fedphd.common.history.evaluation import EvaluationRecord
from fedphd.common.unet.costs import PruneReport
from fedphd.common.wire.metrics import MetricValues
from fedphd.common.wire.traffic import Traffic


class Started(Event):
    """A ServerApp runs, as the process ``pid``; the cloud's says version, commit and machine."""

    event: Literal["started"] = "started"
    pid: int
    origin: dict[str, str] = Field(default_factory=dict)


class Ended(Event):
    """The verdict on a ServerApp; its last event."""

    event: Literal["ended"] = "ended"
    exit_code: int
    message: str


class Said(Event):
    """A sentence for people."""

    event: Literal["message"] = "message"
    text: str


# A change of an edge that the cloud sees: which clients it has, in the event's detail.
SERVES = "serves"


class PeerChanged(Event):
    """A peer "joined", "left", was "refused", "failed" or "late"; an edge "serves" clients."""

    event: Literal["peer"] = "peer"
    peer: str
    change: str
    detail: str


class LinkChanged(Event):
    """What became of an edge's connection to the cloud at ``server``."""

    event: Literal["link"] = "link"
    server: str
    change: str


class Working(Event):
    """A part of the work that takes long: ``done`` of ``total`` steps of ``what``."""

    event: Literal["working"] = "working"
    what: str
    done: int
    total: int


class RoundBegan(Event):
    """An edge has asked ``clients``, who chose it, to train; numbers as in ``RoundEnded``."""

    event: Literal["round_began"] = "round_began"
    interval: int
    edge_round: int
    round: int
    rounds: int
    clients: list[str]


class Replied(Event):
    """A client's weights came, ``seconds`` after it was asked, and are whole."""

    event: Literal["replied"] = "replied"
    interval: int
    edge_round: int
    client: str
    loss: float | None
    seconds: float


class RoundEnded(Event, MetricValues):
    """An edge round; it is number ``round`` of the run's ``rounds``. Bytes: since the start.

    Attributes:
        homogeneity: 2 less the distance of ``label_distribution`` from ``target_distribution``.
        failed: clients that were left out, by why, one of ``FAILURE_KINDS``.
        phases: seconds of the round's phases, which add up to ``seconds``.
        update_norm, largest_update_norm: median and largest 2-norm of the clients' updates, per
            optimiser step; None where ``aggregation.max_update_ratio`` is 0 or nobody answered.
    """

    event: Literal["round"] = "round"
    interval: int
    edge_round: int
    round: int
    rounds: int
    clients: list[str]
    num_samples: int
    label_distribution: list[float]
    failures: list[str]
    sent_bytes: int
    received_bytes: int
    seconds: float
    left_s: float
    target_distribution: list[float] = Field(default_factory=list)
    homogeneity: float | None = None
    failed: dict[str, int] = Field(default_factory=dict)
    phases: dict[str, float] = Field(default_factory=dict)
    update_norm: float | None = None
    largest_update_norm: float | None = None


class EdgeFigures(BaseModel):
    """An edge's part in an interval; the names of clients are by edge round.

    ``label_distribution`` is of all that trained there in the interval.
    """

    trained: list[list[str]] = Field(default_factory=list)
    left_out: list[list[str]] = Field(default_factory=list)
    label_distribution: list[float] = Field(default_factory=list)


class IntervalFigures(BaseModel):
    """Counts and shares of an interval at the cloud.

    The moving average has seen ``ema_steps`` client steps, and covers the last ``ema_span``.
    ``failed`` and ``phases`` are as in ``RoundEnded``, of edges; ``update_norm`` is that of the
    change of the global weights.
    """

    interval: int
    num_samples: float = 0.0
    mean_steps: float = 0.0
    ema_steps: float = 0.0
    ema_span: float = 0.0
    images: int = 0
    edge_weights: dict[str, float] = Field(default_factory=dict)
    edge_homogeneity: dict[str, float] = Field(default_factory=dict)
    clients: list[str] = Field(default_factory=list)
    client_rounds: int = 0
    edges: dict[str, EdgeFigures] = Field(default_factory=dict)
    failures: list[str] = Field(default_factory=list)
    client_edge: Traffic = Traffic()
    seconds: float = 0.0
    failed: dict[str, int] = Field(default_factory=dict)
    phases: dict[str, float] = Field(default_factory=dict)
    update_norm: float | None = None


class IntervalEnded(Event, IntervalFigures, MetricValues):
    """An interval, one of ``intervals``. Bytes over the links: since the run's start.

    ``edge_cloud`` is what this interval alone moved between the cloud and its edges, or clients.
    The validation loss is of the weights that the interval began with.
    """

    event: Literal["interval"] = "interval"
    sparse: bool
    intervals: int
    parameters: int
    macs: int
    client_edge_bytes: int
    edge_cloud_bytes: int
    training_flops: float
    left_s: float
    edge_cloud: Traffic = Traffic()


class Pruned(Event, PruneReport):
    """The U-Net became smaller after ``interval``."""

    event: Literal["pruned"] = "pruned"
    interval: int


class Evaluated(Event, EvaluationRecord):
    """Samples of ``weights`` ("ema" or "raw") were measured.

    ``gpu_memory`` is as ``common/unet/model.py: gpu_memory`` says.
    """

    event: Literal["evaluated"] = "evaluated"
    what: str
    weights: str
    gpu_memory: dict[str, int] = Field(default_factory=dict)


class Trained(Event, MetricValues):
    """A client trained for an edge round; ``phases`` add up to ``seconds``.

    A client writes no log: this reaches its own status and metrics only.
    """

    event: Literal["trained"] = "trained"
    interval: int
    edge_round: int
    images: int
    steps: int
    seconds: float
    phases: dict[str, float] = Field(default_factory=dict)
    gpu_memory: dict[str, int] = Field(default_factory=dict)


class Drawn(Event):
    """Samples of the averaged weights after ``interval`` are in the file ``path``."""

    event: Literal["drawn"] = "drawn"
    interval: int
    path: str

    @property
    def text(self) -> str:
        """The same as a sentence for people."""
        return f"first samples, after interval {self.interval}: {self.path}"


class StatisticsFigures(BaseModel):
    """Reference statistics that the clients computed, and the bytes that this moved."""

    num_images: int
    label_counts: list[int]
    clients: list[str]
    failures: list[str]
    client_edge_bytes: int
    edge_cloud_bytes: int


class StatisticsCollected(Event, StatisticsFigures):
    """The clients gave the reference statistics."""

    event: Literal["client_statistics"] = "client_statistics"
    seconds: float


_TYPES: dict[str, type[Event]] = {
    kind.model_fields["event"].default: kind
    for kind in (
        Started, Ended, Said, Working, PeerChanged, LinkChanged, RoundBegan, Replied, RoundEnded,
        IntervalEnded, Pruned, Evaluated, Drawn, StatisticsCollected, Trained,
    )
}  # fmt: skip


def read_event(line: dict[str, Any]) -> Event | None:
    """The event in a log's line; None of an unknown kind; raises ValueError if it is malformed."""
    kind = _TYPES.get(line.get("event", ""))
    return None if kind is None else kind.model_validate(line)


@dataclass
class Tail:
    """Reads the JSON lines that are appended to a file; the next one is at ``position``."""

    path: Path
    position: int = 0

    def skip(self, size: int) -> None:
        """Pass over the first ``size`` bytes, whole lines."""
        self.position = size

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """What came since the last call, as plain values; an unfinished last line waits.

        Raises ConfigError for a line that is no event; names the file and the line.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if (event := parsed(line)) is None:
                    # As after a power failure: what was written last came only in part.
                    if not file.read(1):
                        break
                    raise self.broken(self.position + len(line))
                self.position += len(line)
                yield event

    def broken(self, end: int) -> ConfigError:
        """The error about the line that ends at byte ``end`` of the file: it is no event."""
        with self.path.open("rb") as file:
            number = file.read(end).count(b"\n")
        return no_event(self.path, number)

    def new_events(self) -> Iterator[Event]:
        """The events that came since the last call; raises ValueError as ``read_event``."""
        yield from filter(None, map(read_event, self.new_lines()))


def parsed(line: bytes) -> dict[str, Any] | None:
    """The values of a log's line; None if it is not that of an event."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def no_event(path: Path, number: int) -> ConfigError:
    """The error about line ``number``, from 1, of the event log ``path``."""
    return ConfigError(
        f"{path}, line {number}: is not an event, as after a fault of the disk; remove that line, "
        "or put the whole file back"
    )


def merged_lines(logs: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of several logs by time, each once; a log that is not there is empty.

    Those of one log keep their order, also where its clock was set back. Raises ConfigError as
    ``Tail.new_lines``.
    """
    found: dict[str, tuple[float, dict[str, Any]]] = {}
    for log in logs:
        latest, tail = -math.inf, Tail(log)
        for line in tail.new_lines():
            try:
                latest = max(latest, float(line["time"]))
            except (KeyError, TypeError, ValueError) as error:
                raise tail.broken(tail.position) from error
            found.setdefault(json.dumps(line), (latest, line))
    return [line for _, line in sorted(found.values(), key=itemgetter(0))]
