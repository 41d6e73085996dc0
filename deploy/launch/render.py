"""Events as lines for people."""

from collections.abc import Iterator, Sequence

from fedphd.common.config.run import INCEPTION
from fedphd.common.events import Event
from fedphd.common.history import events
from fedphd.common.history.evaluation import Anchors, EvaluationRecord
from fedphd.common.history.summary import LinkBytes, Summary
from fedphd.common.wire.metrics import MetricValues


def render(event: Event) -> str | None:
    """One aligned line for an event, or None for what people need not see."""
    match event:
        case events.PeerChanged(change=events.SERVES):
            return None
        case events.PeerChanged():
            text = f"{event.peer} {event.change}{f': {event.detail}' if event.detail else ''}"
        case events.LinkChanged():
            text = f"cloud {event.server} {event.change}"
        case events.RoundEnded():
            text = _round(event)
        case events.IntervalEnded():
            text = _interval(event)
        case events.Pruned():
            text = _pruned(event)
        case events.Evaluated():
            text = _evaluated(event)
        case events.StatisticsCollected():
            text = (
                f"reference statistics of {event.num_images} images of {len(event.clients)} "
                f"clients | {event.seconds:.1f} s{_without(event.failures)}"
            )
        case events.Said() | events.Drawn():
            text = event.text
        case _:
            return None
    return f"{event.node:<9} {text}"


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
    times = (f"{k.replace('_', ' ')} {human_seconds(v)}" for k, v in summary.seconds.items())
    rows = [
        *_quality(summary),
        ("parameters", _millions(sizes.before, sizes.after)),
        ("MACs per image", _millions(macs.before, macs.after)),
        *_links(summary),
        ("time", ", ".join(times)),
    ]
    return "\n".join(f"  {name:<18} {value}" for name, value in rows)


def _millions(before: float, after: float) -> str:
    return f"{before / 1e6:.2f} M -> {after / 1e6:.2f} M"


def _links(summary: Summary) -> list[tuple[str, str]]:
    """Rows on the bytes of each kind of link that there was."""
    moved = summary.bytes
    if summary.topology == "flat":
        return [("bytes client-cloud", human_bytes(moved.edge_cloud))]
    return [
        ("bytes client-edge", human_bytes(moved.client_edge)),
        ("bytes edge-cloud", human_bytes(moved.edge_cloud)),
        *_savings(moved),
    ]


def _quality(summary: Summary) -> list[tuple[str, str]]:
    """Rows on the samples: the distance over the run, and the last evaluation's other numbers."""
    measured = [e for e in summary.evaluations if e.frechet_distance is not None]
    if not measured:
        none = "none: the configuration names no reference data (evaluation.reference)"
        return [("Frechet distance", none)]
    last, path = measured[-1], " -> ".join(f"{e.frechet_distance:.1f}" for e in measured)
    how = f"{last.num_samples} samples, {last.sampling_steps} DDIM steps, EMA weights"
    rows = [(distance_name(last), f"{path} (features of {last.features}, {how})")]
    if last.anchors:
        rows.append(("", scale(last.anchors)))
    if summary.ema_steps:
        span = f"covers the last {summary.ema_span:.0f} of {summary.ema_steps:.0f} client steps"
        rows.append(("moving average", span))
    others = ", ".join(other_numbers(last))
    return [*rows, ("samples", others)] if others else rows


def distance_name(evaluation: EvaluationRecord) -> str:
    """What the distance is called: FID in Inception's features, and only there."""
    return "FID" if evaluation.features == INCEPTION else "Frechet distance"


def scale(anchors: Anchors) -> str:
    """What real images get, beside which a distance can be read."""
    texts = (
        (anchors.real, "{:.1f}"),
        (anchors.one_class_missing, "without one class {:.1f}"),
        (anchors.half_of_the_classes, "of half of the classes {:.1f}"),
    )
    found = [text.format(value) for value, text in texts if value is not None]
    return f"real images get {', '.join(found)}"


def other_numbers(evaluation: EvaluationRecord) -> list[str]:
    """What an evaluation says beside the distance, each with its name."""
    kernel = "KID" if evaluation.features == INCEPTION else "kernel distance"
    raw = evaluation.raw
    texts = (
        (evaluation.kernel_distance, f"{kernel} {{:.3g}}"),
        (evaluation.inception_score, "Inception score {:.2f}"),
        (evaluation.precision, "precision {:.2f}"),
        (evaluation.recall, "recall {:.2f}"),
        (evaluation.least_class_ratio, f"class {evaluation.least_class} at {{:.0%}} of its share"),
        (raw and raw.frechet_distance, "raw weights {:.1f}"),
        *_worst_class(evaluation),
    )
    return [text.format(value) for value, text in texts if value is not None]


def _worst_class(evaluation: EvaluationRecord) -> Iterator[tuple[float, str]]:
    """The class that a class-conditional network draws worst."""
    distances = dict(enumerate(evaluation.class_distances or ()))
    known = {label: value for label, value in distances.items() if value is not None}
    if known:
        worst = max(known, key=lambda label: known[label])
        yield known[worst], f"class {worst} worst with {{:.1f}}"


def _savings(moved: LinkBytes) -> Iterator[tuple[str, str]]:
    """A row for each way in which flat FedAvg would use the cloud's links."""
    ways = (
        (moved.cloud_saving_equal_cloud_rounds, moved.flat_fedavg_equal_cloud_rounds,
         "in as many cloud rounds"),
        (moved.cloud_saving, moved.flat_fedavg_client_cloud, "at the cloud in every edge round"),
    )  # fmt: skip
    for saving, flat, how in ways:
        if saving is not None:
            yield "", f"{-saving:+.0%} against flat FedAvg in fp32, {how} ({human_bytes(flat)})"


def _round(event: events.RoundEnded) -> str:
    numbered = all(name.startswith("client-") for name in event.clients)
    between = "," if numbered else ", "
    clients = between.join(name.removeprefix("client-") for name in event.clients)
    noun = "client" if len(event.clients) == 1 else "clients"
    work = f"{_losses(event)} | {len(event.clients)} {noun} ({clients})"
    idle = "no client here, the model stays as it is"
    moved = human_bytes(event.sent_bytes + event.received_bytes)
    return (
        f"interval {event.interval:>2} round {event.edge_round}  "
        f"{work if event.clients else idle} | {moved} so far | {event.seconds:.1f} s | "
        f"about {human_seconds(event.left_s)} left{_without(event.failures)}"
    )


def _losses(event: MetricValues) -> str:
    """The training's loss, and that of the weights which it began with on held out images."""
    loss, validation = event.loss, event.validation_loss
    before = "" if validation is None else f", validation before {validation:.4f}"
    return "no loss" if loss is None else f"loss {loss:.4f}{before}"


def _interval(event: events.IntervalEnded) -> str:
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


def _pruned(event: events.Pruned) -> str:
    before, after = event.before, event.after
    return (
        f"pruned to {1 - event.achieved_ratio:.0%} of the widths: parameters "
        f"{_millions(before.parameters, after.parameters)}, MACs "
        f"{_millions(before.macs, after.macs)}"
    )


def _evaluated(event: events.Evaluated) -> str:
    value = "no reference data, no distance"
    if (distance := event.frechet_distance) is not None:
        value = f"{distance_name(event)} {distance:.1f} in features of {event.features}"
    return (
        f"evaluated {event.what}: {' | '.join([value, *other_numbers(event)])} "
        f"({event.num_samples} samples, {event.sampling_steps} DDIM steps, {event.seconds:.1f} s)"
    )
