"""What came out of a run, in words; or how and why it failed."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from fedphd.common.errors import EXIT_OK, Interrupted
from fedphd.deploy.launch.render import distance_name, human_bytes, human_seconds
from fedphd.deploy.report.costs import bytes_by_interval
from fedphd.deploy.report.record import RunRecord

# What an exit code means, and what to do.
EXIT_CODES: Final = {
    1: ("an internal error", "Look at the log that the message names."),
    2: ("a bad configuration", "Correct the setting that the message names."),
    3: ("it could not start", "Free what is in the way, such as a port in use."),
    4: ("too few participants", "Start the missing ones, or ask for fewer."),
    5: ("a connection was lost", "Start it again."),
    Interrupted.exit_code: ("it was interrupted", "Go on with --resume and the run's folder."),
}


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
    if sentence := _quality(record):
        yield sentence
    if pruned := record.pruned:
        before, after = pruned.before, pruned.after
        sizes = (_unbroken(f"{costs.parameters / 1e6:.2f} M") for costs in (before, after))
        when = f"after interval {pruned.interval}" if pruned.interval else "before training"
        yield (
            f"The network was pruned {when} to {1 - pruned.achieved_ratio:.0%} of its widths: "
            "{} parameters became {}.".format(*sizes)
        )
    if rows := bytes_by_interval(record):
        moved, flat = sum(r.edge_cloud for r in rows), sum(r.equal_rounds for r in rows)
        text = f"The cloud's links carried {_unbroken(human_bytes(moved))}"
        if flat:
            share = 1 - moved / flat
            than = f"flat FedAvg in as many cloud rounds ({_unbroken(human_bytes(flat))})"
            text += f", {abs(share):.0%} {'less' if share >= 0 else 'more'} than {than}"
        yield f"{text}."
    if clients := record.client_names:
        edges = len(record.edges)
        place = "the cloud" if record.is_flat else f"{edges} edge{'' if edges == 1 else 's'}"
        of_rounds = [one for by_edge in record.members.values() for one in by_edge.values()]
        missed = sum(len(members.left_out) for members in of_rounds)
        left_out = f"{missed} times one was left out" if missed else "nobody was left out"
        yield f"{len(clients)} clients trained at {place}; {left_out} of an edge round."


def _unbroken(text: str) -> str:
    """A number with its unit, on one line."""
    return text.replace(" ", "\u00a0")


def _quality(record: RunRecord) -> str:
    measured = [e for e in record.evaluations if e.frechet_distance is not None]
    if not measured:
        return ""
    first, last = measured[0], measured[-1]
    name, value = distance_name(last), last.frechet_distance or 0.0
    if len(measured) == 1:
        text = f"The samples have a {name} of {value:.1f} to real images"
    else:
        before = first.frechet_distance or 0.0
        way = "came down" if value < before else "went"
        since = "before training" if not first.interval else f"after interval {first.interval}"
        text = f"The samples' {name} to real images {way} from {before:.1f} {since} to {value:.1f}"
    if last.anchors:
        text += f"; as many real images have {last.anchors.real:.1f}"
    return f"{text}."


def tiles(record: RunRecord) -> list[Tile]:
    """The numbers that stand out."""
    found = []
    measured = [e for e in record.evaluations if e.frechet_distance is not None]
    if measured:
        last = measured[-1]
        beside = f"from {measured[0].frechet_distance:.1f}" if len(measured) > 1 else ""
        if last.anchors:
            beside += f"{', ' if beside else ''}real images {last.anchors.real:.1f}"
        found.append(Tile(distance_name(last), f"{last.frechet_distance:.1f}", beside))
    if record.intervals:
        now = record.intervals[-1].parameters
        before = ""
        if record.pruned:
            now = record.pruned.after.parameters
            before = f"from {record.pruned.before.parameters / 1e6:.2f} M"
        found.append(Tile("Parameters", f"{now / 1e6:.2f} M", before))
    if rows := bytes_by_interval(record):
        moved, flat = sum(r.edge_cloud for r in rows), sum(r.equal_rounds for r in rows)
        beside = ""
        if flat:
            beside = f"{moved / flat - 1:+.0%} against flat FedAvg".replace("-", "\u2212")
        found.append(Tile("Over the cloud\u2019s links", human_bytes(moved), beside))
    if record.num_intervals:
        beside = f"{len(record.intervals)} of {record.num_intervals} intervals"
        found.append(Tile("Time", human_seconds(record.elapsed_s), beside))
    return found


def at(time_s: float) -> str:
    """A Unix time for people, with its zone."""
    return datetime.fromtimestamp(time_s).astimezone().strftime("%Y-%m-%d %H:%M %Z")
