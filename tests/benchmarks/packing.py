"""What it costs to send a U-Net as one flat array, against one array per tensor.

Prints for each network: Flower objects per message (each is a remote call on either side), and
the time to pack, hash, serialise, read and average the replies of eight clients, both ways in
the same run. Times drift on a shared machine; the ratio is what to look at.

    python tests/benchmarks/packing.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_unet
from fedphd.common.wire.records import read_array, weights_record

NUM_CLIENTS, REPEATS = 8, 3


def through_the_wire(record: ArrayRecord) -> tuple[ArrayRecord, int]:
    """Serialise and read back as SuperLink and nodes do; also the number of objects."""
    message = Message(RecordDict({"weights": record}), 1, "train")
    with no_object_id_recompute():
        objects = get_all_nested_objects(message)
        contents = {key: item.deflate() for key, item in objects.items()}
        back = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(back, Message)
    return back.content.array_records["weights"], len(objects)


def flat(state: dict[str, torch.Tensor]) -> int:
    """One array: pack, send, average in place."""
    layout = TensorLayout.of(state)
    total = torch.zeros(layout.numel)
    for _ in range(NUM_CLIENTS):
        record, num_objects = through_the_wire(weights_record(layout.pack(state)))
        total.add_(read_array(record["weights"]), alpha=1 / NUM_CLIENTS)
    return num_objects


def per_tensor(state: dict[str, torch.Tensor]) -> int:
    """Flower's usual form: an array per tensor."""
    total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for _ in range(NUM_CLIENTS):
        record, num_objects = through_the_wire(ArrayRecord(state))
        for name, tensor in record.to_torch_state_dict().items():
            total[name].add_(tensor, alpha=1 / NUM_CLIENTS)
    return num_objects


def best_s(work: Callable[[dict[str, torch.Tensor]], int], state: dict[str, torch.Tensor]) -> float:
    """The shortest of some repeats, in seconds."""
    times = []
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        work(state)
        times.append(time.perf_counter() - started_s)
    return min(times)


def main() -> None:
    """Print the table."""
    # As in an edge: more threads only get in the way of other processes.
    torch.set_num_threads(1)
    print(f"{'network':<10} {'form':<11} {'objects':>8} {'8 replies':>10} {'ratio':>6}")
    for preset in ("digits", "cifar10"):
        config = load_config(CloudConfig, None, {"preset": preset})
        state = dict(build_unet(config.model, seed=0).state_dict())
        slow_s, fast_s = best_s(per_tensor, state), best_s(flat, state)
        print(f"{preset:<10} {'per tensor':<11} {per_tensor(state):>8} {slow_s:>8.2f} s {1:>6.2f}")
        row = f"{preset:<10} {'flat':<11} {flat(state):>8} {fast_s:>8.2f} s {fast_s / slow_s:>6.2f}"
        print(row)


if __name__ == "__main__":
    main()
