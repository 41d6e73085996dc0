"""``table.csv`` and ``table.md``: every finished seed enters, every missing one is named."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedphd.deploy.compare.plan import Plan, identity
from fedphd.deploy.compare.results import (
    DISTANCE,
    Outcome,
    mean_and_spread,
    relative_to,
)
from fedphd.deploy.launch.render import human_bytes, human_seconds

REFERENCE = "fedavg"
_AGAINST = f"against {REFERENCE}"
_COSTS = ("parameters", "macs", "client_edge_bytes", "cloud_bytes", "training_flops", "seconds")
_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda v: f"{v / 1e6:.2f} M"),
    "macs": ("MACs per image", lambda v: f"{v / 1e6:.2f} M"),
    "client_edge_bytes": ("bytes client-edge", human_bytes),
    "cloud_bytes": ("bytes over cloud links", human_bytes),
    "training_flops": ("training FLOPs", lambda v: f"{v:.3g}"),
    "seconds": ("time per run", human_seconds),
}


def metrics_of(outcomes: Iterable[Outcome]) -> list[str]:
    """Names of everything that was measured, the Frechet distance first."""
    found = {name for outcome in outcomes for r in outcome.results for name in r.quality}
    return sorted(found, key=lambda name: (name != DISTANCE, name))


def relative(outcome: Outcome, outcomes: Sequence[Outcome], name: str = DISTANCE) -> float | None:
    """A mean relative to FedAvg's, as a share; None for itself or without it."""
    reference = next((other for other in outcomes if other.name == REFERENCE), None)
    if reference is None or outcome is reference:
        return None
    return relative_to(outcome, reference, name)


def to_csv(outcomes: Sequence[Outcome]) -> str:
    """One line per method: mean and sample standard deviation of everything, plain numbers."""
    names = [*metrics_of(outcomes), *_COSTS]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["method", "n", "cloud_rounds", f"{DISTANCE}_relative_to_{REFERENCE}_percent"]
    writer.writerow([*header, *(f"{name}_{part}" for name in names for part in ("mean", "std"))])
    for outcome in outcomes:
        share = relative(outcome, outcomes)
        row: list[Any] = [
            outcome.name,
            len(outcome.results),
            outcome.config.schedule.intervals,
            "" if share is None else f"{100 * share:.6g}",
        ]
        for name in names:
            values = outcome.values(name)
            mean, spread = mean_and_spread(values) if values else (None, None)
            row += ["" if number is None else f"{number:.8g}" for number in (mean, spread)]
        writer.writerow(row)
    return text.getvalue()


def to_markdown(
    outcomes: Sequence[Outcome],
    plan: Plan,
    *,
    command: str,
    plots: Iterable[Path] = (),
    left_out: Sequence[str] = (),
) -> str:
    """The report for people: budget, protocol, table, what is missing, settings, origin.

    Args:
        outcomes: all runs, by method.
        plan: what the comparison was asked for.
        command: that wrote it.
        plots: pictures to show, beside the report.
        left_out: methods without any run, and why.
    """
    sections = [
        "# Methods compared",
        _budget(outcomes, plan),
        _quality(outcomes),
        _costs(outcomes),
        _notes(outcomes),
        _missing(outcomes, left_out),
        _list("Protocol", _protocol(outcomes)),
        *(f"![{path.stem}]({path.name})" for path in plots),
        _settings(outcomes),
        _list("Origin", [*_origins(outcomes), f"written by `{command}`"]),
        _common(plan),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _budget(outcomes: Sequence[Outcome], plan: Plan) -> str:
    if plan.budget == "rounds":
        rounds = plan.common["schedule.intervals"]
        return (
            f"Budget: equal local work and equal cloud rounds. Between two of {rounds} cloud "
            "rounds a client that takes part trains "
            f"{plan.common['schedule.edge_rounds'] * plan.common['training.local_amount']} "
            f"local {plan.common['training.local_unit']}; how they are spread is below."
        )
    known = "as yet unknown" if plan.cloud_bytes is None else human_bytes(plan.cloud_bytes)
    return (
        f"Budget: equal bytes over the cloud's links, {known}; each method runs as many cloud "
        "rounds as fit, so its local work differs too."
    )


def _quality(outcomes: Sequence[Outcome]) -> str:
    # How far a kernel distance's own subsets spread is in the CSV; here the seeds' spread counts.
    metrics = [name for name in metrics_of(outcomes) if not name.endswith("_std")]
    first, others = metrics[:1], metrics[1:]
    rows = [["method", "n", *map(_heading, first), _AGAINST, *map(_heading, others)]]
    for outcome in outcomes:
        measured = [_measured(outcome.values(name)) for name in metrics]
        share = _share(relative(outcome, outcomes))
        count = str(len(outcome.results))
        rows.append([outcome.title, count, *measured[:1], share, *measured[1:]])
    return _rows(rows)


def _costs(outcomes: Sequence[Outcome]) -> str:
    names = [_SHOWN[name][0] for name in _COSTS]
    place = _COSTS.index("cloud_bytes") + 1
    rows = [["method", "cloud rounds", *names[:place], _AGAINST, *names[place:]]]
    for outcome in outcomes:
        costs = [_cost(outcome, name) for name in _COSTS]
        share = _share(relative(outcome, outcomes, "cloud_bytes"))
        rounds = str(outcome.config.schedule.intervals)
        rows.append([outcome.title, rounds, *costs[:place], share, *costs[place:]])
    return _rows(rows)


def _rows(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:+.1%}"


def _heading(metric: str) -> str:
    return metric.replace("_", " ").replace(".", " ").capitalize()


def _measured(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"


def _cost(outcome: Outcome, name: str) -> str:
    values = outcome.values(name)
    return _SHOWN[name][1](mean_and_spread(values)[0]) if values else "-"


def _notes(outcomes: Sequence[Outcome]) -> str:
    return (
        "Mean ± sample standard deviation over seeds; a seed sets the weights, who takes part, "
        f"the choices and the split of the data. Against {REFERENCE}: means over the seeds that "
        "both methods have. Parameters and MACs are those of the final network. Training FLOPs: "
        "6 x MACs x images trained on, all clients together."
    )


def _missing(outcomes: Sequence[Outcome], left_out: Sequence[str]) -> str:
    lines = [
        *left_out,
        *(
            f"{outcome.name} seed {seed}: {reason}"
            for outcome in outcomes
            for seed, reason in outcome.missing.items()
        ),
    ]
    return _list("Missing runs", lines) if lines else "All planned runs are in the table."


def _protocol(outcomes: Sequence[Outcome]) -> list[str]:
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        for result in outcome.results:
            text = ", ".join(f"{key} {value}" for key, value in result.protocol.items())
            found.setdefault(text, []).append(f"{outcome.name} seed {result.seed}")
    lines = ["sampler DDIM, eta 0, the same noise for all; EMA weights unless the column says raw"]
    if len(found) == 1:
        return [*lines, next(iter(found))]
    if found:
        lines.append("**the runs were NOT all evaluated alike; their distances do not compare:**")
    return lines + [f"{text}: {', '.join(runs)}" for text, runs in found.items()]


def _settings(outcomes: Sequence[Outcome]) -> str:
    """How the methods differ from one another, in settings."""
    every = {o.name: identity(o.config, {}) for o in outcomes}
    keys = sorted({key for values in every.values() for key in values} - {"seed"})
    differing = [key for key in keys if len({repr(v.get(key)) for v in every.values()}) > 1]
    lines = []
    for outcome in outcomes:
        shown = ", ".join(f"{key} = {every[outcome.name].get(key)!r}" for key in differing)
        lines.append(f"{outcome.title} ({outcome.reference}): {shown or 'nothing of its own'}")
    return _list("Settings in which the methods differ", lines)


def _origins(outcomes: Sequence[Outcome]) -> list[str]:
    found: dict[str, int] = {}
    splits: dict[int, str] = {}
    for outcome in outcomes:
        for result in outcome.results:
            text = ", ".join(f"{key} {value}" for key, value in result.origin.items())
            found[text] = found.get(text, 0) + 1
            if result.partition:
                splits[result.seed] = result.partition
    lines = [f"{count} run(s): {text}" for text, count in found.items()]
    return lines + [f"split of seed {seed}: {name}" for seed, name in sorted(splits.items())]


def _common(plan: Plan) -> str:
    shown = [f"    {key} = {value!r}" for key, value in sorted(plan.common.items())]
    return "\n".join(["## Common settings", "", *shown])


def _list(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {line}" for line in lines)]) if lines else ""
