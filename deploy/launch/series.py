"""The names, units and labels of all that ``/metrics`` says; ``metrics.py`` gives the values.

The table in ``docs/monitoring.md`` is made of this one. A new series is an entry here, and its
value in ``deploy/launch/metrics.py``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from fedphd.common.errors import FAILURE_KINDS

Kind = Literal["counter", "gauge", "histogram", "summary"]
# Names of participants are the values of a label.
NAMES: Final[tuple[str, ...]] = ()
# At most so many names in one label. All others together are "other" where their values add up to
# something, as shares do; else they are not there.
MOST_NAMES: Final = 100

ALL: Final = ("cloud", "edge", "client")
# The cloud of a flat federation is its only edge.
EDGE: Final = ("edge", "flat cloud")


@dataclass(frozen=True)
class Series:
    """One name of ``/metrics``.

    Attributes:
        text: what it is, with its unit.
        of: the processes that have it.
        labels: each label and the values that it can have.
        only: the setting without which it is not there; "" if none.
    """

    name: str
    kind: Kind
    text: str
    of: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only: str = ""


_PROCESS = {"process": ("launcher", "serverapp", "flower", "client")}
_FOLDER = {"folder": ("state", "run")}
_PEER = {"kind": ("edge", "client")}
_STATES = ("connected", "left", "refused", "failed")
_CHANGES = ("joined", "left", "refused", "failed", "late")
_WEIGHTS = {"weights": ("ema", "raw")}
_EDGE_NAME = {"edge": NAMES}
_DIRECTION = {"direction": ("down", "up")}
_REASON = {"reason": tuple(FAILURE_KINDS)}

_OF_ALL = (
    Series("info", "gauge", "1, with who answers; a client's name only by health.client_names",
           ALL, {"role": ALL, "node": NAMES, "version": NAMES}),
    Series("live", "gauge", "1 if its own loop comes round, as /live", ALL),
    Series("ready", "gauge", "1 if it can do its part, as /ready", ALL),
    Series("start_time_seconds", "gauge", "When it started, Unix time in seconds", ALL),
    Series("last_event_timestamp_seconds", "gauge", "Its last event, Unix time in seconds", ALL),
    Series("process_resident_memory_bytes", "gauge",
           "Resident memory in bytes; flower: SuperLink and SuperExec together", ALL, _PROCESS),
    Series("process_cpu_seconds_total", "counter", "Processor time in seconds", ALL,
           {"process": ("launcher", "serverapp", "client")}),
    Series("process_open_fds", "gauge", "Open file descriptors", ALL,
           {"process": ("launcher", "serverapp", "client")}),
    Series("disk_free_bytes", "gauge", "Free space where the folder is, in bytes", ALL, _FOLDER),
    Series("disk_size_bytes", "gauge", "Size of the disk where the folder is, in bytes", ALL,
           _FOLDER),
    Series("gpu_memory_bytes", "gauge",
           "GPU memory in bytes after the last round or evaluation; not there without a GPU",
           ("cloud", "client"), {"kind": ("peak", "reserved", "total")}),
    Series("peers", "gauge",
           "Nodes that it has met, by state; of those that are not connected the latest 100 each",
           ("cloud", "edge"), {**_PEER, "state": _STATES}),
    Series("peer_changes_total", "counter",
           "Changes of its nodes; late: an answer came after it had been given up",
           ("cloud", "edge"), {**_PEER, "change": _CHANGES}),
    Series("client_connected", "gauge", "1 if the client is connected", EDGE, {"client": NAMES},
           only="health.client_names"),
    Series("upstream_connections", "gauge", "Servers that it is connected to", ("edge", "client")),
    Series("link_bytes_total", "counter",
           "Bytes of messages over its links, as the server counts them; down is towards clients",
           ("cloud", "edge"),
           {"hop": ("client_edge", "edge_cloud", "client_cloud"), **_DIRECTION}),
)  # fmt: skip

_MEANS = {
    "loss": "Training loss, mean over images",
    "validation_loss": "Loss of the received weights on held out images, mean over images",
    "gradient_norm": "2-norm of the gradient before clipping, mean over steps",
    "sparsity_penalty": "Group penalty before its factor lambda, mean over steps",
    "objective_term": "What the method adds to the loss (FedProx, MOON), mean over steps",
}


def _means(prefix: str, what: str, of: tuple[str, ...]) -> Iterator[Series]:
    for name, text in _MEANS.items():
        yield Series(f"{prefix}_{name}", "gauge", f"{text}; of the last {what}", of)


_OF_EDGE = (
    Series("edge_round", "gauge", "Number of the last finished edge round", EDGE),
    Series("edge_rounds", "gauge", "Edge rounds of the whole run", EDGE),
    Series("edge_remaining_seconds", "gauge", "Seconds that the rest of the rounds may take", EDGE),
    Series("edge_last_round_timestamp_seconds", "gauge",
           "End of the last round, Unix time in seconds", EDGE),
    Series("edge_round_seconds", "histogram", "Duration of an edge round in seconds", EDGE),
    Series("edge_round_cycle_seconds", "summary",
           "From one round's end to the next one's in seconds", EDGE),
    Series("edge_round_phase_seconds_total", "counter",
           "Seconds of rounds; asking: which edge clients choose, while those who have chosen "
           "train; training: waiting for clients, who train and send", EDGE,
           {"phase": ("asking", "sending", "training", "averaging")}),
    Series("edge_round_clients", "gauge", "Clients of the last round", EDGE,
           {"outcome": ("trained", "failed")}),
    Series("edge_round_images", "gauge", "Images of the clients of the last round", EDGE),
    Series("edge_client_rounds_total", "counter", "Clients that trained, over all rounds", EDGE),
    Series("edge_client_failures_total", "counter",
           "Clients that were left out of a round, over all rounds", EDGE, _REASON),
    Series("edge_homogeneity_score", "gauge",
           "Balance of the interval's classes: 2 less their distance from the target", EDGE),
    Series("edge_class_share_ratio", "gauge",
           "Share of a class among the interval's images, and the target, 0 to 1", EDGE,
           {"class": NAMES, "of": ("clients", "target")}, only="health.class_shares"),
    Series("edge_update_norm", "gauge",
           "2-norm of the last round's client updates, per optimiser step", EDGE,
           {"statistic": ("median", "largest")}),
    *_means("edge", "round", EDGE),
)  # fmt: skip

_CLOUD = ("cloud",)
_OF_CLOUD = (
    Series("cloud_interval", "gauge", "Number of the last finished interval", _CLOUD),
    Series("cloud_intervals", "gauge", "Intervals of the whole run", _CLOUD),
    Series("cloud_remaining_seconds", "gauge", "Seconds that the rest may take", _CLOUD),
    Series("cloud_last_interval_timestamp_seconds", "gauge",
           "End of the last interval, Unix time in seconds", _CLOUD),
    Series("cloud_interval_seconds", "histogram", "Duration of an interval in seconds", _CLOUD),
    Series("cloud_interval_cycle_seconds", "summary",
           "From one interval's end to the next one's in seconds", _CLOUD),
    Series("cloud_interval_phase_seconds_total", "counter",
           "Seconds of intervals; edges: waiting for their answers", _CLOUD,
           {"phase": ("sending", "edges", "averaging", "waiting_for_evaluation")}),
    Series("cloud_sparse", "gauge", "1 if the last interval was of the sparse phase", _CLOUD),
    Series("cloud_interval_clients", "gauge", "Different clients of the last interval", _CLOUD),
    Series("cloud_client_rounds_total", "counter", "Clients that trained, over all rounds", _CLOUD),
    Series("cloud_client_failures_total", "counter", "Failures of clients that edges report",
           _CLOUD),
    Series("cloud_edge_failures_total", "counter", "Edges that were left out of an interval",
           _CLOUD, _REASON),
    Series("cloud_edge_clients", "gauge", "Clients that an edge serves", _CLOUD, _EDGE_NAME),
    Series("cloud_edge_weight_ratio", "gauge", "Weight of an edge in the last average, 0 to 1",
           _CLOUD, _EDGE_NAME),
    Series("cloud_edge_homogeneity_score", "gauge",
           "Balance of an edge's classes in the last interval: 2 less their distance from the "
           "target", _CLOUD, _EDGE_NAME),
    Series("cloud_edges_link_bytes_total", "counter",
           "Bytes between clients and edges that edges report", _CLOUD, _DIRECTION),
    Series("cloud_update_norm", "gauge", "2-norm of the last change of the global weights", _CLOUD),
    Series("cloud_images_total", "counter", "Images that passed through optimiser steps", _CLOUD),
    Series("cloud_training_flops_total", "counter",
           "Floating-point operations of training, estimated", _CLOUD),
    Series("cloud_parameters", "gauge", "Parameters of the U-Net", _CLOUD),
    Series("cloud_macs", "gauge", "Multiply-accumulates of the U-Net per image", _CLOUD),
    Series("cloud_pruned_ratio", "gauge", "Share of the widths that pruning removed, 0 to 1",
           _CLOUD),
    *_means("cloud", "interval", _CLOUD),
    Series("cloud_evaluated_interval", "gauge", "Interval whose samples were measured last",
           _CLOUD),
    Series("cloud_evaluation_seconds", "summary", "Duration of an evaluation in seconds", _CLOUD),
    Series("cloud_frechet_distance", "gauge",
           "Frechet distance of the samples to the reference; a FID in Inception's features only",
           _CLOUD, _WEIGHTS),
    Series("cloud_lowest_frechet_distance", "gauge",
           "The least distance since the process started", _CLOUD, _WEIGHTS),
    Series("cloud_kernel_distance", "gauge", "Kernel distance (KID in Inception's features)",
           _CLOUD, _WEIGHTS),
    Series("cloud_precision_ratio", "gauge", "Samples within the reference's manifold, 0 to 1",
           _CLOUD, _WEIGHTS),
    Series("cloud_recall_ratio", "gauge", "Reference within the samples' manifold, 0 to 1",
           _CLOUD, _WEIGHTS),
    Series("cloud_least_class_ratio", "gauge",
           "Smallest part of a class's share that samples have; 0: a class is lost", _CLOUD,
           _WEIGHTS),
)  # fmt: skip

_CLIENT = ("client",)
_OF_CLIENT = (
    Series("client_interval", "gauge", "Interval of its last round", _CLIENT),
    Series("client_edge_round", "gauge", "Its last round, within the interval", _CLIENT),
    Series("client_last_round_timestamp_seconds", "gauge",
           "End of its last round, Unix time in seconds", _CLIENT),
    Series("client_round_seconds", "histogram", "Duration of its rounds in seconds", _CLIENT),
    Series("client_round_phase_seconds_total", "counter",
           "Seconds of its rounds; waiting: until a round for another edge is over", _CLIENT,
           {"phase": ("reading", "waiting", "storing", "training", "packing")}),
    Series("client_steps_total", "counter", "Optimiser steps", _CLIENT),
    Series("client_images", "gauge", "Images that it trains with", _CLIENT),
    *_means("client", "round", _CLIENT),
)  # fmt: skip

PREFIX: Final = "fedphd_"
SERIES: Final = {one.name: one for one in (*_OF_ALL, *_OF_EDGE, *_OF_CLOUD, *_OF_CLIENT)}


def table() -> str:
    """All series as a table of Markdown, for the manual."""
    lines = ["| series | type | labels | of | what it is |", "|---|---|---|---|---|"]
    for one in SERIES.values():
        labels = ", ".join(
            f"`{label}`: {', '.join(values) or 'names'}" for label, values in one.labels.items()
        )
        of = "all" if one.of == ALL else ", ".join(one.of)
        text = f"{one.text} (with `{one.only}`)" if one.only else one.text
        lines.append(f"| `{PREFIX}{one.name}` | {one.kind} | {labels} | {of} | {text} |")
    return "\n".join(lines) + "\n"
