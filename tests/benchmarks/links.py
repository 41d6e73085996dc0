"""Seconds of an interval of a large network over thin links, of which one pair is on each hop.

Real processes in network namespaces: two clients behind a link each, an edge, and the cloud behind
one; every link lets so many Mbit/s pass in each direction (a token bucket, ``tc tbf``). The U-Net
for CIFAR-10 (143 MB as float32) with next to no training, as in ``peers.py``. An interval of the
hierarchy has one edge round here, and so its weights travel over four links one after the other;
each further edge round adds two. Beside it flat FedAvg (this project's flat topology) and Flower's
stock nodes, whose clients reach the server over their own link. The second interval is
timed: from then on codecs send differences over the cloud's links. Needs root and iproute2.

    python tests/benchmarks/links.py                            # for hours, most of it waiting
    python tests/benchmarks/links.py --rates 100,20 --only fp32,int8
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from peers import CLIENT, LARGE, RUN, measured, stock
from support.links import Link, linked, missing
from support.processes import Processes
from support.site import Site

CLIENTS = 2
# What travels of 143 MB, on which hop and in which direction.
HOPS = ("client_down", "client_up", "cloud_down", "cloud_up")
CODECS = {
    "fp32": dict.fromkeys(HOPS, "fp32"),
    "bf16": dict.fromkeys(HOPS, "bf16"),
    "int8": {
        "client_down": "bf16", "client_up": "int8", "cloud_down": "int8", "cloud_up": "int8",
    },
    "int4": {
        "client_down": "bf16", "client_up": "int4", "cloud_down": "int4", "cloud_up": "int4",
    },
    "flat": dict.fromkeys(HOPS, "fp32"),
    "flat-int8": {"client_down": "bf16", "client_up": "int8"},
}  # fmt: skip
TITLES = {
    "fp32": "fp32", "bf16": "bf16", "int8": "bf16 down to clients, else int8",
    "int4": "bf16 down to clients, else int4", "flat": "flat FedAvg, fp32",
    "flat-int8": "flat FedAvg, bf16 down, int8 up", "stock": "Flower 1.31, one flat array",
}  # fmt: skip
# 143 MB take 4 minutes at 5 Mbit/s, and two intervals eight times as long.
PATIENT: dict[str, Any] = {
    "waits.round_s": 7200.0, "waits.interval_s": 14400.0, "waits.upload_stall_s": 120.0,
    "node.lost_after_s": 600.0,
}  # fmt: skip


def ours(codecs: dict[str, str], *, flat: bool, links: list[Link], processes: Processes) -> float:
    """Seconds of the second interval; the first link is the cloud's, where that is behind one."""
    waits = {key: value for key, value in PATIENT.items() if key.startswith("waits.")}
    run = {
        **LARGE.settings(), **RUN, **waits, **{f"wire.{hop}": name for hop, name in codecs.items()},
        "topology": "flat" if flat else "hierarchical", "schedule.intervals": 2,
        "schedule.min_clients": CLIENTS, "schedule.num_edges": 1,
    }  # fmt: skip
    hub = "cloud" if flat else "edge-0"
    # The namespaces have no other network.
    hosts = {hub: "0.0.0.0"}
    prefixes = {f"client-{n}": link.prefix for n, link in enumerate(links[-CLIENTS:])}
    if not flat:
        hosts["cloud"], prefixes["cloud"] = links[0].inside, links[0].prefix
    site = Site(processes, run, edges=() if flat else ("edge-0",), hosts=hosts, prefixes=prefixes)
    patient = {"node.lost_after_s": PATIENT["node.lost_after_s"]}
    site.start("cloud")
    if not flat:
        site.start("edge-0", **patient)
    for number, link in enumerate(links[-CLIENTS:]):
        reached = {"edges": [f"{link.outside}:{site.ports[hub]}"]}
        parts = {"data.partition.num_partitions": CLIENTS, "data.max_images": 2 * CLIENTS}
        site.start(f"client-{number}", **{**CLIENT, **parts, **patient, **reached})
    moments = measured(site, LARGE, clients=CLIENTS)
    return moments[1] - moments[0]


def seconds_of(name: str, megabits_per_s: float) -> float:
    """An interval of the case ``name``."""
    flat = name not in ("fp32", "bf16", "int8", "int4")
    with ExitStack() as stack:
        links = [stack.enter_context(linked()) for _ in range(CLIENTS + (not flat))]
        for link in links:
            link.slow(megabits_per_s)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = stack.enter_context(Processes(folder))
        if name == "stock":
            moments = stock(LARGE, flat=True, links=links)(processes, 1)
            return moments[1] - moments[0]
        return ours(CODECS[name], flat=flat, links=links, processes=processes)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(TITLES), help="names, with commas")
    parser.add_argument("--rates", default="100,20,5", help="Mbit/s, with commas")
    arguments = parser.parse_args()
    if reason := missing():
        parser.exit(1, f"{reason}\n")
    rates = [float(rate) for rate in arguments.rates.split(",")]
    print(f"| s per interval | {' | '.join(f'{rate:g} Mbit/s' for rate in rates)} |")
    print(f"|---|{'---:|' * len(rates)}", flush=True)
    for name in arguments.only.split(","):
        values = []
        for rate in rates:
            values.append(seconds_of(name, rate))
            print(f"{name} at {rate:g} Mbit/s: {values[-1]:.1f} s", file=sys.stderr, flush=True)
        print(f"| {TITLES[name]} | {' | '.join(f'{v:.0f}' for v in values)} |", flush=True)


if __name__ == "__main__":
    main()
