"""Events as lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from fedphd.common.config.run import INCEPTION
from fedphd.common.events import Event
from fedphd.common.history.evaluation import EvaluationRecord
from fedphd.common.history.events import (
    Evaluated,
    IntervalEnded,
    LinkChanged,
    PeerChanged,
    Pruned,
    RoundEnded,
    Said,
    StatisticsCollected,
)
from fedphd.common.history.summary import LinkBytes, Summary
from fedphd.common.wire.metrics import MetricValues


def render(event: Event) -> str | None:
    """One aligned line for an event, or None for what people need not see."""
    text = _text(event)
    return None if text is None else f"{event.node:<9} {text}"


def _text(event: Event) -> str | None:
    match event:
        case PeerChanged():
            return f"{event.peer} {event.change}{f': {event.detail}' if event.detail else ''}"
        case LinkChanged():
            return f"cloud {event.server} {event.change}"
        case RoundEnded():
            return _round(event)
        case IntervalEnded():
            return _interval(event)
        case Pruned():
            return _pruned(event)
        case Evaluated():
            return _evaluated(event)
        case StatisticsCollected():
            return (
                f"reference statistics of {event.num_images} images of {len(event.clients)} "
                f"clients | {event.seconds:.1f} s{_without(event.failures)}"
            )
        case Said():
            return event.text
    return None


def _without(failures: Sequence[str]) -> str:
    return f" | without {'; '.join(failures)}" if failures else ""


def human_bytes(count: float) -> str:
    """A number of bytes with a unit, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(round(count, 1)) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """A duration as ``42 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def render_summary(summary: Summary) -> str:
    """The end of a run, from its ``summary.json``."""
    sizes, macs = summary.parameters, summary.macs
    rows = [
        *_quality(summary),
        ("parameters", f"{sizes.before / 1e6:.2f} M -> {sizes.after / 1e6:.2f} M"),
        ("MACs per image", f"{macs.before / 1e6:.2f} M -> {macs.after / 1e6:.2f} M"),
        *_links(summary),
        (
            "time",
            ", ".join(
                f"{k.replace('_', ' ')} {human_seconds(v)}" for k, v in summary.seconds.items()
            ),
        ),
    ]
    return "\n".join(f"  {name:<18} {value}" for name, value in rows)


def _links(summary: Summary) -> list[tuple[str, str]]:
    """Rows on the bytes of each kind of link that there was."""
    moved = summary.bytes
    if summary.topology == "flat":
        return [("bytes client-cloud", human_bytes(moved.edge_cloud))]
    return [
        ("bytes client-edge", human_bytes(moved.client_edge)),
        ("bytes edge-cloud", _saving(moved)),
    ]


def _quality(summary: Summary) -> list[tuple[str, str]]:
    """Rows on the samples: the distance over the run, and the last evaluation's other numbers."""
    measured = [e for e in summary.evaluations if e.frechet_distance is not None]
    if not measured:
        none = "none: the configuration names no reference data (evaluation.reference)"
        return [("Frechet distance", none)]
    path = " -> ".join(f"{e.frechet_distance:.1f}" for e in measured)
    last = measured[-1]
    how = (
        f"(features of {last.features}, {last.num_samples} samples, "
        f"{last.sampling_steps} DDIM steps, EMA weights)"
    )
    rows = [(distance_name(last), f"{path} {how}")]
    if others := other_numbers(last):
        rows.append(("samples", ", ".join(others)))
    return rows


def distance_name(evaluation: EvaluationRecord) -> str:
    """What the distance is called: FID in Inception's features, and only there."""
    return "FID" if evaluation.features == INCEPTION else "Frechet distance"


def other_numbers(evaluation: EvaluationRecord) -> list[str]:
    """What an evaluation says beside the distance, each with its name."""
    kernel = "KID" if evaluation.features == INCEPTION else "kernel distance"
    formats = (
        ("kernel_distance", f"{kernel} {{:.3g}}"),
        ("inception_score", "Inception score {:.2f}"),
        ("precision", "precision {:.2f}"),
        ("recall", "recall {:.2f}"),
    )
    given = {key: getattr(evaluation, key) for key, _ in formats}
    found = [text.format(given[key]) for key, text in formats if given[key] is not None]
    if evaluation.least_class_ratio is not None:
        label, ratio = evaluation.least_class, evaluation.least_class_ratio
        found.append(f"class {label} at {ratio:.0%} of its share")
    raw = evaluation.raw
    if raw and raw.frechet_distance is not None:
        found.append(f"raw weights {raw.frechet_distance:.1f}")
    return found


def _saving(moved: LinkBytes) -> str:
    flat = moved.flat_fedavg_client_cloud
    if moved.cloud_saving is None:
        return human_bytes(moved.edge_cloud)
    return (
        f"{human_bytes(moved.edge_cloud)}; flat FedAvg would have moved {human_bytes(flat)} "
        f"over the cloud's links ({-moved.cloud_saving:+.0%})"
    )


def _round(event: RoundEnded) -> str:
    clients = ",".join(name.removeprefix("client-") for name in event.clients)
    work = f"{_losses(event)} | {len(event.clients)} clients ({clients})"
    idle = "no client here, the model stays as it is"
    moved = human_bytes(event.sent_bytes + event.received_bytes)
    left = f"about {human_seconds(event.left_s)} left{_without(event.failures)}"
    return (
        f"interval {event.interval:>2} round {event.edge_round}  "
        f"{work if event.clients else idle} | {moved} so far | {event.seconds:.1f} s | {left}"
    )


def _losses(event: MetricValues) -> str:
    """The training's loss, and that of the weights which it began with on held out images."""
    loss, validation = event.loss, event.validation_loss
    before = "" if validation is None else f", validation before {validation:.4f}"
    return "no loss" if loss is None else f"loss {loss:.4f}{before}"


def _interval(event: IntervalEnded) -> str:
    # Flat: the cloud averages its clients itself, as its own only edge.
    flat = list(event.edge_weights) == ["cloud"]
    shares = " ".join(f"{name} {share:.0%}" for name, share in event.edge_weights.items())
    edges = "" if flat else f"edges {shares or 'none'} | "
    link = "client-cloud" if flat else "edge-cloud"
    return (
        f"interval {event.interval:>2} of {event.intervals}  {_losses(event)} | "
        f"{edges}{event.parameters / 1e6:.2f} M parameters | "
        f"{human_bytes(event.edge_cloud_bytes)} {link} | "
        f"about {human_seconds(event.left_s)} left{_without(event.failures)}"
    )


def _pruned(event: Pruned) -> str:
    before, after = event.before, event.after
    return (
        f"pruned to {1 - event.achieved_ratio:.0%} of the widths: parameters "
        f"{before.parameters / 1e6:.2f} M -> {after.parameters / 1e6:.2f} M, MACs "
        f"{before.macs / 1e6:.2f} M -> {after.macs / 1e6:.2f} M"
    )


def _evaluated(event: Evaluated) -> str:
    distance = event.frechet_distance
    value = (
        "no reference data, no distance"
        if distance is None
        else (f"{distance_name(event)} {distance:.1f} in features of {event.features}")
    )
    others = "".join(f" | {text}" for text in other_numbers(event))
    return (
        f"evaluated {event.what}: {value}{others} "
        f"({event.num_samples} samples, {event.sampling_steps} DDIM steps, "
        f"{event.seconds:.1f} s)"
    )
