"""How good a run's samples are, and its losses, over the intervals."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedphd.common.history.evaluation import EvaluationRecord
from fedphd.common.history.events import RoundEnded
from fedphd.deploy.launch.render import distance_name
from fedphd.deploy.report.axes import labels_beside, over_intervals, shares
from fedphd.deploy.report.figures import (
    DASHES,
    INK,
    MARKERS,
    MUTED,
    WIDTH,
    Canvas,
    Chart,
    series,
)
from fedphd.deploy.report.record import RunRecord, when

_ANCHORS = {
    "real": "real images",
    "one_class_missing": "all classes but one",
    "half_of_the_classes": "half of the classes",
}
# Beyond that a scale of powers is easier to read.
_LOG_RATIO = 10.0


def quality(record: RunRecord) -> Iterator[Chart]:
    """The distance over the run, beside what real images get."""
    if not (measured := record.measured):
        return
    canvas, name = Canvas(), distance_name(measured[-1])
    axes = canvas.axes
    x = [e.interval or 0 for e in measured]
    y = [e.frechet_distance or 0.0 for e in measured]
    axes.plot(x, y, color=series(0), marker=MARKERS[0], label="averaged weights (EMA)", zorder=3)
    low = [*y]
    if any(e.raw and e.raw.frechet_distance is not None for e in measured):
        raw = [(e.raw.frechet_distance if e.raw else None) or np.nan for e in measured]
        low += [value for value in raw if value == value]
        axes.plot(x, raw, color=series(1), marker=MARKERS[1], ls="--", label="raw weights")
    real = []
    for anchor, text in _ANCHORS.items():
        anchors = measured[-1].anchors
        if anchors and (value := getattr(anchors, anchor)) is not None:
            axes.axhline(value, color=MUTED, lw=1, ls=":")
            real.append((value, f"{text} {value:.1f}"))
    low += [value for value, _ in real]
    canvas.legend()
    positive = [value for value in low if value > 0]
    axes.set_ylabel("distance")
    if positive and max(positive) > _LOG_RATIO * min(positive):
        axes.set_yscale("log")
        axes.set_ylabel("distance, logarithmic")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    over_intervals(axes, record)
    labels_beside(axes, real)
    path = ", ".join(f"{value:.1f} {when(at)}" for at, value in zip(x, y, strict=True))
    yield canvas.chart(
        "distance",
        title=f"{name} to real images",
        alt=f"{name} of the samples, less is better: {path}.",
        note=f"Less is better. {how_measured(measured[-1])}"
        + (" Dotted: what real images get." if real else ""),
    )


def classes(record: RunRecord, *, wide: bool = False) -> Iterator[Chart]:
    """In which classes the last samples are, beside the target."""
    last = record.evaluations[-1] if record.evaluations else None
    if last is None or not last.class_shares or record.config is None:
        return
    canvas, target = Canvas(2 * WIDTH, 2.4) if wide else Canvas(), record.config.target_distribution
    found = last.class_shares
    at = np.arange(len(found))
    canvas.axes.bar(at, found, color=series(0), width=0.78)
    if len(target) == len(found):
        borders = [-0.5, *at + 0.5]
        canvas.axes.step(borders, [*target, target[-1]], "--", where="post", color=INK, lw=1.2)
    shares(canvas.axes)
    canvas.axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    canvas.axes.set(xlabel="class", ylabel="share of the samples", xlim=(-0.7, len(found) - 0.3))
    texts = [f"{label} {share:.0%}" for label, share in enumerate(found[:100])]
    yield canvas.chart(
        "classes",
        title=f"Classes of the samples {when(last.interval)}",
        alt=f"Share of the samples {when(last.interval)} in each class, by the classifier: "
        f"{', '.join(texts)}.",
        note="Where the classifier puts the samples. Dashed: the target.",
        wide=wide,
    )


def told_classes(record: RunRecord) -> Iterator[Chart]:
    """How good the last samples of each class are, of a network that was told which to draw."""
    last = record.evaluations[-1] if record.evaluations else None
    if last is None or not last.class_distances:
        return
    known = {label: d for label, d in enumerate(last.class_distances) if d is not None}
    if not known:
        return
    canvas = Canvas()
    canvas.axes.bar([*known], [*known.values()], color=series(0), width=0.78)
    for label, share in enumerate(last.class_coverages or ()):
        if label in known and share is not None:
            canvas.axes.annotate(
                f"{share:.0%}", (label, known[label]), (0, 3), textcoords="offset points",
                ha="center", fontsize=8.4, color=MUTED,
            )  # fmt: skip
    canvas.axes.set_ylim(0, 1.15 * max(known.values()))
    canvas.axes.set(xlabel="class", ylabel="Frechet distance")
    canvas.axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    texts = [f"{label} {distance:.1f}" for label, distance in known.items()][:100]
    yield canvas.chart(
        "told_classes",
        title=f"How good each class is {when(last.interval)}",
        alt=f"Frechet distance of the samples of each class: {', '.join(texts)}.",
        note="Distance of the samples of a class to its real images, and above it the share of "
        "these that have a sample nearby (coverage). A class has few images: compare the bars with "
        "one another only.",
    )


def how_measured(evaluation: EvaluationRecord) -> str:
    """What a distance needs beside it to be compared."""
    return (
        f"{evaluation.num_samples} samples in {evaluation.sampling_steps} DDIM steps against "
        f"{evaluation.num_reference_images} real images, in features of {evaluation.features}."
    )


def losses(record: RunRecord) -> Iterator[Chart]:
    """The training's loss, by edge and edge round where that is known; the validation loss."""
    trained = [(one.interval, one.loss) for one in record.intervals if one.loss is not None]
    if trained:
        yield _training_loss(record, trained)
    # Validated are the weights that an interval begins with.
    checked = [
        (one.interval - 1, one.validation_loss)
        for one in record.intervals
        if one.validation_loss is not None
    ]
    if checked:
        canvas = Canvas()
        canvas.axes.plot(*zip(*checked, strict=True), color=series(2), marker=MARKERS[2])
        canvas.axes.set_ylim(bottom=0)
        canvas.axes.set_ylabel("loss")
        over_intervals(canvas.axes, record)
        (_, first), (at, last) = checked[0], checked[-1]
        yield canvas.chart(
            "validation",
            title="Validation loss",
            alt=f"Loss on held out images: {first:.4f} before training, {last:.4f} after interval "
            f"{at}.",
            note="Of the cloud's weights, on images that the clients hold out.",
        )


def _training_loss(record: RunRecord, trained: Sequence[tuple[int, float]]) -> Chart:
    canvas = Canvas()
    by_edge: dict[str, list[RoundEnded]] = defaultdict(list)
    for ended in record.rounds:
        if ended.loss is not None:
            by_edge[ended.node].append(ended)
    # With more edges nobody could tell the lines apart.
    for number, edge in enumerate(record.edges if len(record.edges) <= len(MARKERS) else ()):
        rounds = by_edge[edge]
        canvas.axes.plot(
            [one.round / record.edge_rounds for one in rounds],
            [one.loss or 0.0 for one in rounds],
            color=series(number), lw=1, ls=DASHES[number % len(DASHES)], alpha=0.8, label=edge,
        )  # fmt: skip
    canvas.axes.plot(
        *zip(*trained, strict=True), color=INK, marker=MARKERS[0], label="all", zorder=3
    )
    if by_edge:
        canvas.legend()
    canvas.axes.set_ylim(bottom=0)
    canvas.axes.set_ylabel("loss")
    over_intervals(canvas.axes, record)
    return canvas.chart(
        "loss",
        title="Training loss",
        alt=f"Mean training loss: {trained[0][1]:.4f} in interval {trained[0][0]}, "
        f"{trained[-1][1]:.4f} in interval {trained[-1][0]}.",
        note="Of the noise that the network guesses, over the steps of all clients"
        + (", and thin by edge and edge round." if by_edge else "."),
    )
