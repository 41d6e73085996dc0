"""``/metrics`` for Prometheus: events become numbers here, and nowhere else.

The process that serves health sees its role's events pass; a scrape reads what they left, the
process's status, and /proc. So nobody who trains waits for a scrape. Imported only where
``health.metrics`` asks for it.
"""

import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    Summary,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from fedphd.common.config.links import HealthConfig
from fedphd.common.events import Event
from fedphd.common.history import events as kinds
from fedphd.common.history.evaluation import Quality
from fedphd.common.history.status import CONNECTED, Status, StatusBoard
from fedphd.common.wire.metrics import MetricValues
from fedphd.common.wire.traffic import Traffic
from fedphd.deploy.launch.processes import descendants
from fedphd.deploy.launch.series import MOST_NAMES, NAMES, PREFIX, SERIES, Series

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
_OTHER: Final = "other"
_BUCKETS_S: Final = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, float("inf"))
_OF_PROCESS: Final = (
    "process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"
)  # fmt: skip

# A name, its value, and the values of its labels.
Sample = tuple[str, float, dict[str, str]]


class Metrics(Collector):
    """What a process tells Prometheus.

    Args:
        board: the process's status, whose events are counted from now on.
        folders: whose disks are watched, by the name that they get: "state", "run".
    """

    def __init__(
        self, config: HealthConfig, board: StatusBoard, folders: Mapping[str, Path]
    ) -> None:
        # Else each counter would have a second series with the time of its making.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._config, self._board, self._folders = config, board, folders
        self._role = board.snapshot().role
        self._registry = CollectorRegistry()
        self._made: dict[str, Counter | Gauge | Histogram | Summary] = {}
        self._names: dict[str, set[str]] = {}
        self._lock = threading.Lock()
        self._serverapp: int | None = None
        self._moved = Traffic()
        self._last_end: dict[str, float] = {}
        self._lowest: dict[str, float] = {}
        self._averaged: set[str] = set()
        self._flat = False
        self._begin(self._role)
        self._registry.register(self)
        board.on_event = self.event

    def text(self) -> bytes:
        """The answer to a scrape, as ``CONTENT_TYPE`` says."""
        return generate_latest(self._registry)

    def event(self, event: Event) -> None:
        """Take note of an event of this process."""
        # A client's rounds may end at the same time.
        with self._lock:
            match event:
                case kinds.Started():
                    self._serverapp = event.pid
                case kinds.PeerChanged():
                    self._peer(event)
                case kinds.RoundEnded():
                    self._round(event)
                case kinds.IntervalEnded():
                    self._interval(event)
                case kinds.Pruned():
                    self._set("cloud_pruned_ratio", event.achieved_ratio)
                case kinds.Evaluated():
                    self._evaluated(event)
                case kinds.Trained():
                    self._trained(event)
                case _:
                    pass

    def _peer(self, event: kinds.PeerChanged) -> None:
        if event.change == kinds.SERVES:
            count = len(event.detail.split(",")) if event.detail else 0
            self._named("cloud_edge_clients", "edge", {event.peer: count})
            return
        kind = "client" if event.role == "edge" else "edge"
        self._add("peer_changes_total", 1, kind=kind, change=event.change)

    def _round(self, event: kinds.RoundEnded) -> None:
        if self._role == "cloud" and not self._flat:
            self._flat = True
            self._begin("flat cloud")
        self._set("edge_round", event.round)
        self._set("edge_rounds", event.rounds)
        self._set("edge_remaining_seconds", event.left_s)
        self._ended("edge_round", "edge_last_round_timestamp_seconds", event, event.seconds)
        self._phases("edge_round_phase_seconds_total", event.phases)
        self._set("edge_round_clients", len(event.clients), outcome="trained")
        self._set("edge_round_clients", sum(event.failed.values()), outcome="failed")
        self._set("edge_round_images", event.num_samples)
        self._add("edge_client_rounds_total", len(event.clients))
        for reason, count in event.failed.items():
            self._add("edge_client_failures_total", count, reason=reason)
        self._set("edge_homogeneity_score", event.homogeneity)
        if self._config.class_shares:
            both = {"clients": event.label_distribution, "target": event.target_distribution}
            for of, shares in both.items():
                by_class = {str(number): share for number, share in enumerate(shares)}
                self._named("edge_class_share_ratio", "class", by_class, add=True, of=of)
        self._set("edge_update_norm", event.update_norm, statistic="median")
        self._set("edge_update_norm", event.largest_update_norm, statistic="largest")
        self._means("edge", event)
        total = Traffic(sent_bytes=event.sent_bytes, received_bytes=event.received_bytes)
        moved, self._moved = total.minus(self._moved), total
        hop = "client_cloud" if self._flat else "client_edge"
        self._traffic("link_bytes_total", moved, hop=hop)

    def _interval(self, event: kinds.IntervalEnded) -> None:
        self._set("cloud_interval", event.interval)
        self._set("cloud_intervals", event.intervals)
        self._set("cloud_remaining_seconds", event.left_s)
        self._ended("cloud_interval", "cloud_last_interval_timestamp_seconds", event, event.seconds)
        self._phases("cloud_interval_phase_seconds_total", event.phases)
        self._set("cloud_sparse", event.sparse)
        self._set("cloud_interval_clients", len(event.clients))
        self._add("cloud_client_rounds_total", event.client_rounds)
        of_edges = sum(event.failed.values())
        self._add("cloud_client_failures_total", max(0, len(event.failures) - of_edges))
        for reason, count in event.failed.items():
            self._add("cloud_edge_failures_total", count, reason=reason)
        # Whoever was in the last average and is not in this one has no weight in it.
        gone = self._averaged - event.edge_weights.keys()
        self._averaged = set(event.edge_weights)
        shares = dict.fromkeys(gone, 0.0) | event.edge_weights
        self._named("cloud_edge_weight_ratio", "edge", shares, add=True)
        scores = dict.fromkeys(gone, math.nan) | event.edge_homogeneity
        self._named("cloud_edge_homogeneity_score", "edge", scores)
        # The bytes of a flat federation came with its rounds.
        if not self._flat:
            self._traffic("link_bytes_total", event.edge_cloud, hop="edge_cloud")
            self._traffic("cloud_edges_link_bytes_total", event.client_edge)
        self._set("cloud_update_norm", event.update_norm)
        self._add("cloud_images_total", event.images)
        self._add("cloud_training_flops_total", event.training_flops)
        self._set("cloud_parameters", event.parameters)
        self._set("cloud_macs", event.macs)
        self._means("cloud", event)

    def _evaluated(self, event: kinds.Evaluated) -> None:
        self._set("cloud_evaluated_interval", event.interval)
        self._observe("cloud_evaluation_seconds", event.seconds)
        self._gpu(event.gpu_memory)
        self._quality(event, "ema")
        if event.raw:
            self._quality(event.raw, "raw")

    def _quality(self, found: Quality, weights: str) -> None:
        distance = found.frechet_distance
        self._set("cloud_frechet_distance", distance, weights=weights)
        if distance is not None:
            self._lowest[weights] = min(distance, self._lowest.get(weights, distance))
            self._set("cloud_lowest_frechet_distance", self._lowest[weights], weights=weights)
        self._set("cloud_kernel_distance", found.kernel_distance, weights=weights)
        self._set("cloud_precision_ratio", found.precision, weights=weights)
        self._set("cloud_recall_ratio", found.recall, weights=weights)
        self._set("cloud_least_class_ratio", found.least_class_ratio, weights=weights)

    def _trained(self, event: kinds.Trained) -> None:
        self._set("client_interval", event.interval)
        self._set("client_edge_round", event.edge_round)
        self._set("client_last_round_timestamp_seconds", event.time)
        self._observe("client_round_seconds", event.seconds)
        self._phases("client_round_phase_seconds_total", event.phases)
        self._add("client_steps_total", event.steps)
        self._set("client_images", event.images)
        self._means("client", event)
        self._gpu(event.gpu_memory)

    def _ended(self, what: str, when: str, event: Event, seconds: float) -> None:
        """A round or an interval ended."""
        self._observe(f"{what}_seconds", seconds)
        if what in self._last_end:
            self._observe(f"{what}_cycle_seconds", max(0.0, event.time - self._last_end[what]))
        self._last_end[what] = event.time
        self._set(when, event.time)

    def _phases(self, name: str, phases: Mapping[str, float]) -> None:
        for phase, seconds in phases.items():
            self._add(name, seconds, phase=phase)

    def _means(self, prefix: str, event: MetricValues) -> None:
        for name in MetricValues.model_fields:
            self._set(f"{prefix}_{name}", getattr(event, name))

    def _traffic(self, name: str, moved: Traffic, **labels: str) -> None:
        self._add(name, moved.sent_bytes, direction="down", **labels)
        self._add(name, moved.received_bytes, direction="up", **labels)

    def _gpu(self, memory: Mapping[str, int]) -> None:
        for kind, size in memory.items():
            self._set("gpu_memory_bytes", size, kind=kind)

    def collect(self) -> Iterator[Metric]:
        """What is looked up at a scrape, for the library."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, value, labels in self._now():
            if name not in families:
                one = SERIES[name]
                of_kind = CounterMetricFamily if one.kind == "counter" else GaugeMetricFamily
                families[name] = of_kind(PREFIX + name, one.text, labels=list(one.labels))
            families[name].add_metric([labels[label] for label in SERIES[name].labels], value)
        yield from families.values()

    def describe(self) -> list[Metric]:
        """Nothing: the names are known."""
        return []

    def _now(self) -> Iterator[Sample]:
        status = self._board.snapshot()
        hidden = status.role == "client" and not self._config.client_names
        node = "" if hidden else status.node
        yield "info", 1, {"role": status.role, "node": node, "version": status.version}
        yield "live", status.live, {}
        yield "ready", status.ready, {}
        yield "start_time_seconds", status.started, {}
        if status.last_event:
            yield "last_event_timestamp_seconds", status.last_event, {}
        if status.role == "client":
            yield from self._of_process("client", os.getpid())
        else:
            yield from self._peers(status)
            yield from self._processes()
        if status.role != "cloud":
            connected = sum(change == CONNECTED for change in status.upstream.values())
            yield "upstream_connections", connected, {}
        for name, folder in self._folders.items():
            with suppress(OSError):
                disk = shutil.disk_usage(folder)
                yield "disk_free_bytes", disk.free, {"folder": name}
                yield "disk_size_bytes", disk.total, {"folder": name}

    def _peers(self, status: Status) -> Iterator[Sample]:
        labels = SERIES["peers"].labels
        counts = dict.fromkeys(product(*labels.values()), 0)
        for peer in status.peers.values():
            counts[peer.kind, peer.state] += 1
        for key, count in counts.items():
            yield "peers", count, dict(zip(labels, key, strict=True))
        clients = [(n, p) for n, p in sorted(status.peers.items()) if p.kind == "client"]
        if self._config.client_names:
            for name, peer in clients[:MOST_NAMES]:
                yield "client_connected", peer.state == CONNECTED, {"client": name}

    def _processes(self) -> Iterator[Sample]:
        own, serverapp = os.getpid(), self._serverapp
        yield from self._of_process("launcher", own)
        flower = descendants(own) - {serverapp}
        if serverapp is not None:
            yield from self._of_process("serverapp", serverapp)
        found = [dict(_figures(pid)).get(_OF_PROCESS[0], 0.0) for pid in flower]
        yield _OF_PROCESS[0], sum(found), {"process": "flower"}

    def _of_process(self, process: str, pid: int) -> Iterator[Sample]:
        for name, value in _figures(pid):
            yield name, value, {"process": process}

    def _begin(self, process: str) -> None:
        """Make the counters and durations of a process, so that they begin at 0."""
        for one in SERIES.values():
            if process not in one.of or one.kind == "gauge" or one.name in _OF_PROCESS:
                continue
            # Which links there are is seen from their first bytes.
            if "hop" in one.labels:
                continue
            made = self._get(one.name)
            for values in product(*one.labels.values()) if one.labels else ():
                made.labels(*values)

    def _get(self, name: str) -> Counter | Gauge | Histogram | Summary:
        # A gauge is there once it is known.
        if name not in self._made:
            self._made[name] = _made(SERIES[name], self._registry)
        return self._made[name]

    def _child(self, name: str, labels: Mapping[str, str]) -> Counter | Gauge | Histogram | Summary:
        made, known = self._get(name), SERIES[name].labels
        if not known:
            return made
        return made.labels(*(self._value(name, label, labels[label]) for label in known))

    def _value(self, name: str, label: str, value: str) -> str:
        """A label's value; peers cannot add to their number without end."""
        if SERIES[name].labels[label] != NAMES:
            return value if value in SERIES[name].labels[label] else _OTHER
        names = self._names.setdefault(label, set())
        if value not in names and len(names) >= MOST_NAMES:
            return _OTHER
        names.add(value)
        return value

    def _set(self, name: str, value: float | None, **labels: str) -> None:
        """Set a gauge; what is not known any more is NaN, what never was is not there."""
        if value is None and name not in self._made:
            return
        gauge = self._child(name, labels)
        assert isinstance(gauge, Gauge)
        gauge.set(float("nan") if value is None else value)

    def _named(
        self, name: str, label: str, values: Mapping[str, float], *, add: bool = False, **of: str
    ) -> None:
        """Set a gauge for each of the names that have a value in ``label``.

        What the others have is one sum, if all ``values`` are given at once that may be added.
        """
        shown: dict[str, float] = {}
        for given, value in values.items():
            known = self._value(name, label, given)
            if known != _OTHER or add:
                shown[known] = shown.get(known, 0.0) + value
        for known, value in shown.items():
            self._set(name, value, **{label: known}, **of)

    def _add(self, name: str, amount: float, **labels: str) -> None:
        counter = self._child(name, labels)
        assert isinstance(counter, Counter)
        counter.inc(amount)

    def _observe(self, name: str, seconds: float) -> None:
        kept = self._child(name, {})
        assert isinstance(kept, Histogram | Summary)
        kept.observe(seconds)


def _made(one: Series, registry: CollectorRegistry) -> Counter | Gauge | Histogram | Summary:
    name, labels = PREFIX + one.name, list(one.labels)
    match one.kind:
        case "counter":
            return Counter(name, one.text, labels, registry=registry)
        case "gauge":
            return Gauge(name, one.text, labels, registry=registry)
        case "histogram":
            return Histogram(name, one.text, labels, registry=registry, buckets=_BUCKETS_S)
        case "summary":
            return Summary(name, one.text, labels, registry=registry)


def _figures(pid: int) -> Iterator[tuple[str, float]]:
    """A process's memory, processor time and files, by series; nothing if it has ended."""
    registry = CollectorRegistry()
    ProcessCollector(pid=lambda: pid, registry=registry)
    for family in registry.collect():
        for sample in family.samples:
            if sample.name in _OF_PROCESS:
                yield sample.name, sample.value
