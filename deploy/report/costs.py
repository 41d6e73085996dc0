"""What a run moved over its links, what it took, and what pruning took away."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from fedphd.common.unet.costs import LayerChange
from fedphd.deploy.launch.render import human_bytes, human_seconds
from fedphd.deploy.report import axes as units
from fedphd.deploy.report.axes import over_intervals
from fedphd.deploy.report.figures import INK, MUTED, WIDTH, Canvas, Chart, series
from fedphd.deploy.report.record import RunRecord

_FLOAT_BYTES = 4
_MOST_LAYERS = 60
_WAITING = "waiting_for_evaluation"
# Of the longest interval: what is shorter nobody would see.
_SHORT_WAIT = 0.01
# Above the highest bar, for a word.
_ROOM = 1.15
_PHASES = {
    "waiting_for_participants": "waiting for participants",
    "client_statistics": "clients' reference statistics",
    "sparse_training": "sparse training",
    "training": "training",
    _WAITING: "waiting for evaluation",
}


@dataclass(frozen=True)
class IntervalBytes:
    """Bytes of one interval over each kind of link, and what flat FedAvg would have moved.

    ``equal_rounds`` with as many averages at the cloud, ``every_round`` with one per edge round; in
    a flat run these are the same.
    """

    interval: int
    client_edge: int
    edge_cloud: int
    equal_rounds: float
    every_round: float


def bytes_by_interval(record: RunRecord) -> list[IntervalBytes]:
    """What each finished interval moved; the first has what came before it, too."""
    found, before = [], (0, 0)
    # Where there are no edges the cloud averages in every edge round.
    averaged_every = 1 if record.is_flat else record.edge_rounds
    # The dense network is what FedAvg would send.
    dense = record.intervals[0].parameters if record.intervals else 0
    if record.pruned:
        dense = record.pruned.before.parameters
    for ended in record.intervals:
        now = ended.client_edge_bytes, ended.edge_cloud_bytes
        every = 2 * ended.client_rounds * dense * _FLOAT_BYTES
        found.append(
            IntervalBytes(
                ended.interval, now[0] - before[0], now[1] - before[1],
                every / averaged_every, every,
            )
        )  # fmt: skip
        before = now
    return found


def other_way(record: RunRecord) -> str:
    """What a run's bytes are compared with first."""
    how = "unpruned" if record.is_flat else "in as many cloud rounds"
    return f"flat FedAvg in fp32, {how}"


def traffic(record: RunRecord) -> Iterator[Chart]:
    """Bytes of each interval and kind of link, and all of them beside FedAvg's."""
    rows = bytes_by_interval(record)
    if not rows:
        return
    at = np.array([row.interval for row in rows])
    links = [("edge to cloud and back", [row.edge_cloud for row in rows], 0)]
    if record.is_flat:
        links = [("client to cloud and back", links[0][1], 0)]
    else:
        links.append(("client to edge and back", [row.client_edge for row in rows], 1))
    width, canvas = 0.8 / len(links), Canvas()
    flat = [row.equal_rounds for row in rows]
    unit = units.sizes(canvas.axes, max(*flat, *(max(values) for _, values, _ in links)))
    for place, (name, values, colour) in enumerate(links):
        left = at - 0.4 + (place + 0.5) * width
        height = np.array(values) / unit
        canvas.axes.bar(left, height, width * 0.94, color=series(colour), label=name)
    canvas.axes.hlines(
        np.array(flat) / unit, at - 0.45, at + 0.45, color=INK, lw=1.6,
        label=other_way(record),
    )  # fmt: skip
    canvas.legend(columns=2)
    over_intervals(canvas.axes, record, bars=True)
    canvas.axes.set_xlim(at[0] - 0.7, at[-1] + 0.7)
    texts = [f"{name} {human_bytes(sum(values))}" for name, values, _ in links]
    yield canvas.chart(
        "bytes",
        title="Bytes by interval",
        alt=f"Bytes of {len(rows)} intervals together: {', '.join(texts)}; "
        f"{other_way(record)} {human_bytes(sum(flat))}.",
        note="Both directions, as counted by the servers. Lines: what flat FedAvg would have moved "
        "over the cloud's links.",
    )
    yield _totals(rows, links, record)


def _totals(
    rows: Sequence[IntervalBytes], links: Sequence[tuple[str, list[int], int]], record: RunRecord
) -> Chart:
    bars = [(name, float(sum(values)), series(colour)) for name, values, colour in links]
    first = other_way(record).replace(", ", ",\n")
    bars.append((first, sum(r.equal_rounds for r in rows), MUTED))
    if record.edge_rounds > 1 and not record.is_flat:
        every = sum(row.every_round for row in rows)
        bars.append(("flat FedAvg, at the cloud\nin every edge round", every, MUTED))
    canvas = Canvas()
    _horizontal(canvas.axes, bars, human_bytes)
    texts = [f"{name} {human_bytes(value)}".replace("\n", " ") for name, value, _ in bars]
    return canvas.chart(
        "total-bytes",
        title="Bytes in all",
        alt=f"Bytes of the whole run: {'; '.join(texts)}.",
        note="Grey: what flat FedAvg would have moved over the cloud's links, unpruned.",
    )


def _horizontal(axes: Axes, bars: Sequence[tuple[str, float, str]], text: object) -> None:
    """Bars with their names beside and their values at their ends."""
    write = text if callable(text) else str
    names, values, colours = zip(*bars, strict=True)
    places = np.arange(len(bars))
    axes.barh(places, values, color=colours, height=0.62)
    axes.set_yticks(places, names)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.22 * max(*values, 1e-9))
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", labelcolor=INK)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            write(value), (value, place), (4, 0), textcoords="offset points", va="center",
            fontsize=9.5,
        )  # fmt: skip


def phases(record: RunRecord) -> Iterator[Chart]:
    """The seconds of each phase."""
    found = {name: s for name, s in record.phases.items() if s > 0}
    if not found:
        return
    bars = [
        (_PHASES.get(name, name.replace("_", " ")), seconds, series(0))
        for name, seconds in found.items()
    ]
    rest = record.elapsed_s - sum(found.values())
    if rest > 0.01 * record.elapsed_s:
        bars.append(("the rest", rest, MUTED))
    canvas = Canvas(height=max(1.4, 0.5 + 0.42 * len(bars)))
    _horizontal(canvas.axes, bars, human_seconds)
    texts = [f"{name} {human_seconds(seconds)}" for name, seconds, _ in bars]
    yield canvas.chart(
        "phases",
        title="Time by phase",
        alt=f"Time of each phase: {', '.join(texts)}; in all {human_seconds(record.elapsed_s)}.",
        note="Wall time at the cloud. Evaluations run beside the next interval: what counts is how "
        "long they were waited for.",
    )
    if len(record.intervals) > 1:
        yield _by_interval(record, height=max(2.2, 0.5 + 0.42 * len(bars)))


def _by_interval(record: RunRecord, height: float) -> Chart:
    """The seconds of each interval, and how long an evaluation was waited for after it."""
    waited = [one.phases.get(_WAITING, 0.0) for one in record.intervals]
    times = [one.seconds for one in record.intervals]
    most = max(map(sum, zip(times, waited, strict=True)))
    canvas = Canvas(height=height)
    unit = units.seconds(canvas.axes, most)
    for name, colour, sparse in (("sparse training", 3, True), ("training", 0, False)):
        if chosen := [one for one in record.intervals if one.sparse is sparse]:
            canvas.axes.bar(
                [one.interval for one in chosen], [one.seconds / unit for one in chosen], 0.75,
                color=series(colour), label=name,
            )  # fmt: skip
    long = {at: s for at, s in enumerate(waited) if s > _SHORT_WAIT * most}
    if long:
        canvas.axes.bar(
            [record.intervals[at].interval for at in long], [s / unit for s in long.values()], 0.75,
            bottom=[times[at] / unit for at in long], color=MUTED, label=_PHASES[_WAITING],
        )  # fmt: skip
    texts = [
        f"{human_seconds(s)} after interval {record.intervals[at].interval}"
        for at, s in long.items()
    ]
    canvas.axes.set_ylim(0, _ROOM * max(most / unit, 1e-9))
    canvas.legend()
    over_intervals(canvas.axes, record, bars=True)
    canvas.axes.set_xlim(0.3, record.intervals[-1].interval + 0.7)
    return canvas.chart(
        "interval-seconds",
        title="Time by interval",
        alt=f"Time of an interval: from {human_seconds(min(times))} to "
        f"{human_seconds(max(times))}"
        + (f"; an evaluation was waited for {', '.join(texts)}." if texts else "."),
        note="Grey: the next interval began later, since an evaluation was not done yet."
        if texts
        else "",
    )


def layers(record: RunRecord) -> Iterator[Chart]:
    """Each layer's parameters before and after pruning."""
    if record.pruned is None or not (found := in_order(record.pruned.layers)):
        return
    rows = [(one.name, *one.parameters) for one in found]
    if len(rows) > _MOST_LAYERS:
        rows = _by_block(rows)
    names, before, after = zip(*rows, strict=True)
    canvas = Canvas(2 * WIDTH, 0.9 + 0.15 * len(rows))
    axes, places = canvas.axes, np.arange(len(rows))
    axes.barh(places, before, height=0.8, color=series(0), alpha=0.35, label="before")
    axes.barh(places, after, height=0.8, color=series(0), label="after")
    axes.set_yticks(places, names, fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.01 * max(before))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g} k" if value else "0")
    )
    axes.set_xlabel("parameters")
    canvas.legend()
    largest = max(found, key=lambda one: one.parameters[0] - one.parameters[1])
    costs = record.pruned
    yield canvas.chart(
        "layers",
        title="Parameters of each layer",
        alt=f"{len(found)} layers with {costs.before.parameters} parameters before and "
        f"{costs.after.parameters} after pruning; most left in {largest.name}: "
        f"{largest.parameters[0]} to {largest.parameters[1]}.",
        note="" if len(rows) == len(found) else "Layers of a block are added up.",
        wide=True,
    )


_ORDER = ("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks")


def in_order(layers: Sequence[LayerChange]) -> list[LayerChange]:
    """Layers as an image passes them; torch has the middle block after the decoder."""

    def place(layer: LayerChange) -> int:
        top = layer.name.partition(".")[0]
        return _ORDER.index(top) if top in _ORDER else len(_ORDER)

    return sorted(layers, key=place)


def _by_block(rows: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for name, before, after in rows:
        block = ".".join(name.split(".")[:4])
        old = found.get(block, (0, 0))
        found[block] = old[0] + before, old[1] + after
    return [(name, *numbers) for name, numbers in found.items()]
