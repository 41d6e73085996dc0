"""``table.csv`` and ``table.md``: every finished run counts, every missing one is named."""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedphd.deploy.compare.budget import Budget
from fedphd.deploy.compare.plan import Plan, decisive_settings
from fedphd.deploy.compare.results import DISTANCE, REFERENCE, MethodResults, relative
from fedphd.deploy.launch.render import human_bytes, human_seconds

# A heading, and the cell of a method below it.
_Column = tuple[str, Callable[[MethodResults], str]]
# A cost's heading, and how its mean is written.
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda v: f"{v / 1e6:.2f} M"),
    "macs": ("MACs per image", lambda v: f"{v / 1e6:.2f} M"),
    "client_edge_bytes": ("bytes client-edge", human_bytes),
    "cloud_bytes": ("bytes over cloud links", human_bytes),
    "training_flops": ("training FLOPs", lambda v: f"{v:.3g}"),
    "seconds": ("time per run", human_seconds),
}
_NOTES = (
    "Mean ± sample standard deviation over seeds; a seed sets the weights, who takes part, "
    f"the choices and the split of the data. Against {REFERENCE}: means over the seeds that "
    "both methods have. Parameters and MACs are those of the final network. Training FLOPs: "
    "6 x MACs x images trained on, all clients together."
)


def metrics_of(every: Iterable[MethodResults]) -> list[str]:
    """Names of all qualities that some run has, the Frechet distance first."""
    found = {name for results in every for run in results.runs for name in run.quality}
    return sorted(found, key=lambda name: (name != DISTANCE, name))


def to_csv(every: Sequence[MethodResults]) -> str:
    """A line per method: mean and sample standard deviation of everything, plain numbers."""
    names = [*metrics_of(every), *_COSTS]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["method", "n", "cloud_rounds", f"{DISTANCE}_relative_to_{REFERENCE}_percent"]
    writer.writerow([*header, *(f"{name}_{part}" for name in names for part in ("mean", "std"))])
    for results in every:
        share = relative(results, every)
        row = [results.method.name, len(results.runs), results.config.schedule.intervals]
        numbers = [number for name in names for number in results.mean_and_spread(name)]
        cells = ["" if number is None else f"{number:.8g}" for number in numbers]
        writer.writerow([*row, "" if share is None else f"{100 * share:.6g}", *cells])
    return text.getvalue()


def to_markdown(
    every: Sequence[MethodResults],
    plan: Plan,
    *,
    command: str,
    plots: Iterable[Path],
    left_out: Iterable[str],
) -> str:
    """The report for people: budget, tables, what is missing, protocol, settings, origin.

    Args:
        command: that wrote it.
        plots: pictures to show, beside the report.
        left_out: methods without any run, and why.
    """
    missing = [
        f"{results.method.name} seed {seed}: {reason}"
        for results in every
        for seed, reason in results.missing.items()
    ]
    sections = [
        "# Methods compared",
        _budget(plan),
        _quality(every),
        _costs(every),
        _NOTES,
        _list("Missing runs", [*left_out, *missing]) or "All planned runs are in the table.",
        _list("Protocol", _protocol(every)),
        *(f"![{path.stem}]({path.name})" for path in plots),
        _list("Settings in which the methods differ", _own_settings(every)),
        _list("Origin", [*_origins(every), f"written by `{command}`"]),
        "## Common settings",
        "\n".join(f"    {key} = {value!r}" for key, value in sorted(plan.common.items())),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _budget(plan: Plan) -> str:
    if plan.budget == Budget.rounds:
        common = plan.common
        amount = common["schedule.edge_rounds"] * common["training.local_amount"]
        return (
            "Budget: equal local work and equal cloud rounds. In each of "
            f"{common['schedule.intervals']} cloud rounds a client that takes part trains {amount} "
            f"local {common['training.local_unit']}; the methods' settings below say how these "
            "are spread over edge rounds."
        )
    known = "not known yet" if plan.cloud_bytes is None else human_bytes(plan.cloud_bytes)
    return (
        f"Budget: equal bytes over the cloud's links, {known}; each method runs as many cloud "
        "rounds as fit, so its local work differs too."
    )


def _quality(every: Sequence[MethodResults]) -> str:
    # How far a kernel distance's own subsets spread is in the CSV; here the seeds' spread counts.
    names = [name for name in metrics_of(every) if not name.endswith("_std")]
    columns: list[_Column] = [
        (name.replace("_", " ").replace(".", " ").capitalize(), partial(_mean, name))
        for name in names
    ]
    columns.insert(1, _against(DISTANCE, every))
    return _table([("n", lambda results: str(len(results.runs))), *columns], every)


def _costs(every: Sequence[MethodResults]) -> str:
    columns: list[_Column] = [(head, partial(_mean, name)) for name, (head, _) in _COSTS.items()]
    columns.insert(list(_COSTS).index("cloud_bytes") + 1, _against("cloud_bytes", every))
    rounds = ("cloud rounds", lambda results: str(results.config.schedule.intervals))
    return _table([rounds, *columns], every)


def _table(columns: Sequence[_Column], every: Sequence[MethodResults]) -> str:
    columns = [("method", lambda results: results.method.title), *columns]
    rows = [[heading for heading, _ in columns]]
    rows += [[cell(results) for _, cell in columns] for results in every]
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(columns) + "|", *lines])


def _against(name: str, every: Sequence[MethodResults]) -> _Column:
    def cell(results: MethodResults) -> str:
        share = relative(results, every, name)
        return "" if share is None else f"{share:+.1%}"

    return f"against {REFERENCE}", cell


def _mean(name: str, results: MethodResults) -> str:
    mean, spread = results.mean_and_spread(name)
    if mean is None:
        return "-"
    if name in _COSTS:
        return _COSTS[name][1](mean)
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"


def _protocol(every: Sequence[MethodResults]) -> list[str]:
    lines = ["sampler DDIM, eta 0, the same noise for all; EMA weights unless the column says raw"]
    found = defaultdict(list)
    for results in every:
        for run in results.runs:
            found[_joined(run.protocol)].append(f"{results.method.name} seed {run.seed}")
    if len(found) == 1:
        return [*lines, *found]
    if found:
        lines.append("**the runs were NOT all evaluated alike; do not compare their distances:**")
    return lines + [f"{text}: {', '.join(runs)}" for text, runs in found.items()]


def _own_settings(every: Sequence[MethodResults]) -> list[str]:
    """What each method sets that another one sets otherwise."""
    settings = [decisive_settings(results.config, {}) for results in every]
    keys = sorted({key for own in settings for key in own} - {"seed"})
    differing = [key for key in keys if len({repr(own.get(key)) for own in settings}) > 1]
    shown = [", ".join(f"{key} = {own.get(key)!r}" for key in differing) for own in settings]
    return [
        f"{results.method.title} ({results.method.reference}): {own or 'nothing of its own'}"
        for results, own in zip(every, shown, strict=True)
    ]


def _origins(every: Sequence[MethodResults]) -> list[str]:
    runs = [run for results in every for run in results.runs]
    origins = Counter(_joined(run.origin) for run in runs)
    splits = {run.seed: run.partition for run in runs if run.partition}
    lines = [f"{count} run(s): {text}" for text, count in origins.items()]
    return lines + [f"split of seed {seed}: {name}" for seed, name in sorted(splits.items())]


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _list(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {line}" for line in lines)]) if lines else ""
