"""What came out of a run, in words; or how and why it failed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from fedphd.common.errors import EXIT_OK, Interrupted
from fedphd.common.history.evaluation import Anchors
from fedphd.deploy.launch.render import distance_name, human_bytes, human_seconds
from fedphd.deploy.report.costs import IntervalBytes, bytes_by_interval, other_way
from fedphd.deploy.report.record import RunRecord, when

# What an exit code means, and what to do.
EXIT_CODES: Final = {
    1: ("an internal error", "Look at the log that the message names."),
    2: ("a bad configuration", "Correct the setting that the message names."),
    3: ("it could not start", "Free what is in the way, such as a port in use."),
    4: ("too few participants", "Start the missing ones, or ask for fewer."),
    5: ("a connection was lost", "Start it again."),
    Interrupted.exit_code: ("it was interrupted", "Go on with --resume and the run's folder."),
}
# Distances whose ratio is at most this are about the same.
_ABOUT: Final = 1.1
# Of many clients, so many are named in a sentence.
_NAMED: Final = 3
# Half of the last digit that is written.
_SHOWN: Final = 0.05


@dataclass(frozen=True)
class Verdict:
    """How a run ended: "good", "bad", "stopped" or "open", in a word and a sentence.

    ``found`` are sentences on what came out, ``reason`` is why it failed.
    """

    kind: str
    word: str
    lead: str
    found: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class Tile:
    """A number that stands out: what it is, the number, and what it was before or beside."""

    name: str
    value: str
    beside: str = ""


def verdict(record: RunRecord, now: float) -> Verdict:
    """How ``record`` ended; ``now`` is a Unix time."""
    done, asked = len(record.intervals), record.num_intervals
    took, ended = human_seconds(record.elapsed_s), record.verdict
    found = tuple(_came_out(record))
    if ended is None:
        last = max((event.time for event in record.events), default=now)
        text = (
            f"{done} of {asked} intervals are done. The run has left no verdict: it is under way, "
            f"or was killed. Its last event came {human_seconds(max(0.0, now - last))} before this "
            "page was written."
        )
        return Verdict("open", "Under way", text, found)
    if ended.exit_code == EXIT_OK:
        return Verdict("good", "Finished", f"{_intervals(done)} in {took}.", found)
    meaning, fix = EXIT_CODES.get(ended.exit_code, ("an unknown reason", ""))
    kind, word, reason = "bad", "Failed", ended.message
    if ended.exit_code == Interrupted.exit_code:
        kind, word, reason = "stopped", "Interrupted", ""
    text = f"It ended after {done} of {asked} intervals and {took}: {meaning} (exit code "
    lead = f"{text}{ended.exit_code}). {fix}".strip()
    return Verdict(kind, word, lead, found, reason)


def _intervals(number: int) -> str:
    return f"{number} interval{'' if number == 1 else 's'}"


def _came_out(record: RunRecord) -> Iterator[str]:
    """A sentence for each thing that is known."""
    yield from _quality(record)
    if pruned := record.pruned:
        before, after = pruned.before, pruned.after
        sizes = (_unbroken(f"{costs.parameters / 1e6:.2f} M") for costs in (before, after))
        yield (
            f"The network was pruned {when(pruned.interval)} to "
            f"{1 - pruned.achieved_ratio:.0%} of its widths: "
            "{} parameters became {}.".format(*sizes)
        )
    if rows := bytes_by_interval(record):
        moved, flat = sum(r.edge_cloud for r in rows), sum(r.equal_rounds for r in rows)
        text = f"The cloud's links carried {_unbroken(human_bytes(moved))}"
        if flat:
            share = 1 - moved / flat
            than = f"{other_way(record)} ({_unbroken(human_bytes(flat))})"
            text += f", {abs(share):.0%} {'less' if share >= 0 else 'more'} than {than}"
        if not record.is_flat:
            nearby = human_bytes(sum(r.client_edge for r in rows))
            text += f"; those between clients and edges carried {_unbroken(nearby)}"
        yield f"{text}."
    if clients := record.client_names:
        edges = len(record.edges)
        place = "the cloud" if record.is_flat else f"{edges} edge{'' if edges == 1 else 's'}"
        of_rounds = [one for by_edge in record.members.values() for one in by_edge.values()]
        trained = {name for members in of_rounds for name in members.trained}
        missed = sum(len(members.left_out) for members in of_rounds)
        often = "once" if missed == 1 else f"{missed} times"
        left_out = f"{often} one was left out" if missed else "nobody was left out"
        of = "" if len(trained) == len(clients) else f" of {len(clients)}"
        noun = "client" if len(trained) == 1 and not of else "clients"
        yield f"{len(trained)}{of} {noun} trained at {place}; {left_out} of an edge round."
        if never := [name for name in clients if name not in trained]:
            more = f" and {len(never) - _NAMED} more" if len(never) > _NAMED else ""
            yield f"Who never trained: {', '.join(never[:_NAMED])}{more}."


def _unbroken(text: str) -> str:
    """A number with its unit, on one line."""
    return text.replace(" ", "\u00a0")


def _quality(record: RunRecord) -> Iterator[str]:
    """How far the samples are from real images, since when, and what that compares with."""
    if not record.measured:
        return
    first, last = record.measured[0], record.measured[-1]
    name, value = distance_name(last), last.frechet_distance or 0.0
    if len(record.measured) == 1:
        since = when(last.interval).capitalize()
        text = f"{since} the samples' {name} to real images was {value:.1f}"
    else:
        before = first.frechet_distance or 0.0
        way = "came down" if value < before else "went"
        text = (
            f"The samples' {name} to real images {way} from {before:.1f} {when(first.interval)} "
            f"to {value:.1f} {when(last.interval)}"
        )
    if due := record.next_evaluation:
        text += f"; it is measured next {when(due)}"
    yield f"{text}."
    if last.anchors:
        yield compared(value, last.anchors)


def compared(distance: float, anchors: Anchors) -> str:
    """A sentence on where a distance stands between those of real images."""
    text = f"{distance:.1f} is {_place(distance, anchors)}"
    # What can be hoped for, where that is not what it stands beside.
    best = "" if "all classes (" in text else f"; those of all classes get {anchors.real:.1f}"
    return f"{text}{best}."


def _place(distance: float, anchors: Anchors) -> str:
    named = (
        (anchors.real, "all classes"),
        (anchors.one_class_missing, "all classes but one"),
        (anchors.half_of_the_classes, "half of the classes"),
    )
    known = sorted((value, of) for value, of in named if value is not None)
    for value, of in known:
        is_near = value <= distance * _ABOUT and distance <= value * _ABOUT
        if is_near or abs(distance - value) < _SHOWN:
            return f"about what real images of {of} ({value:.1f}) get"
    below = [pair for pair in known if pair[0] < distance]
    above = [pair for pair in known if pair[0] > distance]
    if not below:
        value, of = above[0]
        return f"less than what real images of {of} ({value:.1f}) get"
    value, of = below[-1]
    if above:
        most, others = above[0]
        return f"between what real images of {of} ({value:.1f}) and of {others} ({most:.1f}) get"
    far = f"{distance / value:.1f} times" if value > 0 else "more than"
    return f"{far} what real images of {of} ({value:.1f}) get"


def tiles(record: RunRecord) -> list[Tile]:
    """The numbers that stand out."""
    found = []
    if record.measured:
        last = record.measured[-1]
        beside = when(last.interval)
        if len(record.measured) > 1:
            beside += f", from {record.measured[0].frechet_distance:.1f}"
        if last.anchors:
            beside += f"; real images {last.anchors.real:.1f}"
        found.append(Tile(distance_name(last), f"{last.frechet_distance:.1f}", beside))
    if record.intervals:
        now = record.intervals[-1].parameters
        before = ""
        if record.pruned:
            now = record.pruned.after.parameters
            before = f"from {record.pruned.before.parameters / 1e6:.2f} M"
        found.append(Tile("Parameters", f"{now / 1e6:.2f} M", before))
    if rows := bytes_by_interval(record):
        found.append(_traffic(record, rows))
    if record.num_intervals:
        done = f"{len(record.intervals)} of {record.num_intervals} intervals"
        found.append(Tile("Time", human_seconds(record.elapsed_s), done))
    return found


def _traffic(record: RunRecord, rows: Sequence[IntervalBytes]) -> Tile:
    """The cloud's bytes, and beside them what was moved elsewhere instead."""
    moved, flat = sum(r.edge_cloud for r in rows), sum(r.equal_rounds for r in rows)
    beside = []
    if flat:
        share = f"{moved / flat - 1:+.0%}".replace("-", "\u2212")
        beside.append(f"{share} against {other_way(record)}")
    if not record.is_flat:
        nearby = human_bytes(sum(r.client_edge for r in rows))
        beside.append(f"{_unbroken(nearby)} between clients and edges")
    return Tile("Over the cloud\u2019s links", human_bytes(moved), "; ".join(beside))


def flops_convention(record: RunRecord) -> str:
    """How the summary counts arithmetic, without what concerns MOON alone where nobody used it."""
    text = record.summary.training_cost.convention if record.summary else ""
    is_moon = record.config is not None and record.config.objective.method == "moon"
    return text if is_moon else text.partition("; MOON")[0]


def at(time_s: float) -> str:
    """A Unix time for people, with its zone."""
    return datetime.fromtimestamp(time_s).astimezone().strftime("%Y-%m-%d %H:%M %Z")
