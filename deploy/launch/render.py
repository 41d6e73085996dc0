"""Events as lines for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedphd.common.config.run import INCEPTION


class Tail:
    """Reads the JSON lines that are appended to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def new_events(self) -> Iterator[dict[str, Any]]:
        """The events that came since the last call; an unfinished last line waits."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                yield json.loads(line)


def render(event: dict[str, Any]) -> str | None:
    """One aligned line for an event, or None for what people need not see."""
    formatter = _FORMATS.get(event["event"])
    text = formatter(event) if formatter else None
    return None if text is None else f"{event['node']:<9} {text}"


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


def render_summary(summary: dict[str, Any]) -> str:
    """The end of a run, from its ``summary.json``."""
    sizes, macs = summary["parameters"], summary["macs"]
    rows = [
        *_quality(summary),
        ("parameters", f"{sizes['before'] / 1e6:.2f} M -> {sizes['after'] / 1e6:.2f} M"),
        ("MACs per image", f"{macs['before'] / 1e6:.2f} M -> {macs['after'] / 1e6:.2f} M"),
        *_links(summary),
        (
            "time",
            ", ".join(
                f"{k.replace('_', ' ')} {human_seconds(v)}" for k, v in summary["seconds"].items()
            ),
        ),
    ]
    return "\n".join(f"  {name:<18} {value}" for name, value in rows)


def _links(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows on the bytes of each kind of link that there was."""
    moved = summary["bytes"]
    if summary["topology"] == "flat":
        return [("bytes client-cloud", human_bytes(moved["edge_cloud"]))]
    return [
        ("bytes client-edge", human_bytes(moved["client_edge"])),
        ("bytes edge-cloud", _saving(moved)),
    ]


def _quality(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows on the samples: the distance over the run, and the last evaluation's other numbers."""
    measured = [e for e in summary["evaluations"] if e["frechet_distance"] is not None]
    if not measured:
        none = "none: the configuration names no reference data (evaluation.reference)"
        return [("Frechet distance", none)]
    path = " -> ".join(f"{e['frechet_distance']:.1f}" for e in measured)
    last = measured[-1]
    how = (
        f"(features of {last['features']}, {last['num_samples']} samples, "
        f"{last['sampling_steps']} DDIM steps, EMA weights)"
    )
    rows = [(distance_name(last), f"{path} {how}")]
    if others := other_numbers(last):
        rows.append(("samples", ", ".join(others)))
    return rows


def distance_name(evaluation: dict[str, Any]) -> str:
    """What the distance is called: FID in Inception's features, and only there."""
    return "FID" if evaluation["features"] == INCEPTION else "Frechet distance"


def other_numbers(evaluation: dict[str, Any]) -> list[str]:
    """What an evaluation says beside the distance, each with its name."""
    kernel = "KID" if evaluation["features"] == INCEPTION else "kernel distance"
    formats = (
        ("kernel_distance", f"{kernel} {{:.3g}}"),
        ("inception_score", "Inception score {:.2f}"),
        ("precision", "precision {:.2f}"),
        ("recall", "recall {:.2f}"),
    )
    given = {key: evaluation.get(key) for key, _ in formats}
    found = [text.format(given[key]) for key, text in formats if given[key] is not None]
    if evaluation.get("least_class_ratio") is not None:
        label, ratio = evaluation["least_class"], evaluation["least_class_ratio"]
        found.append(f"class {label} at {ratio:.0%} of its share")
    raw = evaluation.get("raw")
    if raw and raw["frechet_distance"] is not None:
        found.append(f"raw weights {raw['frechet_distance']:.1f}")
    return found


def _saving(moved: dict[str, Any]) -> str:
    flat = moved["flat_fedavg_client_cloud"]
    if not flat:
        return human_bytes(moved["edge_cloud"])
    return (
        f"{human_bytes(moved['edge_cloud'])}; flat FedAvg would have moved {human_bytes(flat)} "
        f"over the cloud's links ({-moved['cloud_saving']:+.0%})"
    )


def _peer(event: dict[str, Any]) -> str:
    detail = f": {event['detail']}" if event["detail"] else ""
    return f"{event['peer']} {event['change']}{detail}"


def _link(event: dict[str, Any]) -> str:
    return f"cloud {event['server']} {event['change']}"


def _round(event: dict[str, Any]) -> str:
    clients = ",".join(name.removeprefix("client-") for name in event["clients"])
    work = f"{_losses(event)} | {len(event['clients'])} clients ({clients})"
    idle = "no client here, the model stays as it is"
    failed = f" | without {'; '.join(event['failures'])}" if event["failures"] else ""
    moved = event["sent_bytes"] + event["received_bytes"]
    return (
        f"interval {event['interval']:>2} round {event['edge_round']}  "
        f"{work if event['clients'] else idle} | {human_bytes(moved)} so far | "
        f"{event['seconds']:.1f} s | about {human_seconds(event['left_s'])} left{failed}"
    )


def _losses(event: dict[str, Any]) -> str:
    """The training's loss, and that of the weights which it began with on held out images."""
    loss, validation = event["loss"], event.get("validation_loss")
    before = "" if validation is None else f", validation before {validation:.4f}"
    return "no loss" if loss is None else f"loss {loss:.4f}{before}"


def _interval(event: dict[str, Any]) -> str:
    # Flat: the cloud averages its clients itself, as its own only edge.
    flat = list(event["edge_weights"]) == ["cloud"]
    shares = " ".join(f"{name} {share:.0%}" for name, share in event["edge_weights"].items())
    edges = "" if flat else f"edges {shares or 'none'} | "
    link = "client-cloud" if flat else "edge-cloud"
    failed = f" | without {'; '.join(event['failures'])}" if event["failures"] else ""
    return (
        f"interval {event['interval']:>2} of {event['intervals']}  {_losses(event)} | "
        f"{edges}{event['parameters'] / 1e6:.2f} M parameters | "
        f"{human_bytes(event['edge_cloud_bytes'])} {link} | "
        f"about {human_seconds(event['left_s'])} left{failed}"
    )


def _pruned(event: dict[str, Any]) -> str:
    before, after = event["before"], event["after"]
    return (
        f"pruned to {1 - event['achieved_ratio']:.0%} of the widths: parameters "
        f"{before['parameters'] / 1e6:.2f} M -> {after['parameters'] / 1e6:.2f} M, MACs "
        f"{before['macs'] / 1e6:.2f} M -> {after['macs'] / 1e6:.2f} M"
    )


def _evaluated(event: dict[str, Any]) -> str:
    distance = event["frechet_distance"]
    value = (
        "no reference data, no distance"
        if distance is None
        else (f"{distance_name(event)} {distance:.1f} in features of {event['features']}")
    )
    others = "".join(f" | {text}" for text in other_numbers(event))
    return (
        f"evaluated {event['what']}: {value}{others} "
        f"({event['num_samples']} samples, {event['sampling_steps']} DDIM steps, "
        f"{event['seconds']:.1f} s)"
    )


def _client_statistics(event: dict[str, Any]) -> str:
    failed = f" | without {'; '.join(event['failures'])}" if event["failures"] else ""
    return (
        f"reference statistics of {event['num_images']} images of {len(event['clients'])} clients "
        f"| {event['seconds']:.1f} s{failed}"
    )


def _message(event: dict[str, Any]) -> str:
    return str(event["text"])


_FORMATS = {
    "peer": _peer,
    "link": _link,
    "round": _round,
    "interval": _interval,
    "pruned": _pruned,
    "evaluated": _evaluated,
    "client_statistics": _client_statistics,
    "message": _message,
}
