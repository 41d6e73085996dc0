"""What each wire codec costs and saves on the U-Net for CIFAR-10 (143 MB as float32).

Prints for each codec the bytes, the seconds to write and to read, both beside a plain copy made in
the same run (times drift on a shared machine; the ratio is what to look at), and how far what is
read is from what was written, as a share of its norm.

    python tests/benchmarks/codecs.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import get_args

import torch

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.config.wire import CodecName
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_unet
from fedphd.common.wire.codecs import Codec

REPEATS = 5
THREADS = 1


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(THREADS)
    config = load_config(CloudConfig, None, {"preset": "cifar10"})
    state = build_unet(config.model, seed=0).state_dict()
    layout = TensorLayout.of(state)
    flat = layout.pack(state)
    copy_s = best(flat.clone)
    print(f"{layout.numel / 1e6:.1f} M values, {THREADS} threads; a copy takes {copy_s:.3f} s\n")
    print("| codec | MB | of fp32 | write, s | read, s | both, in copies | error |")
    print("|---|---|---|---|---|---|---|")
    for name in get_args(CodecName):
        codec = Codec(name, layout)
        encoded = codec.encode(flat)
        write_s = best(lambda codec=codec: codec.encode(flat))
        read_s = best(lambda codec=codec, encoded=encoded: codec.decode(encoded))
        error = (codec.decode(encoded) - flat).norm() / flat.norm()
        size = encoded.numel()
        print(
            f"| {name} | {size / 1e6:.1f} | {size / (4 * layout.numel):.3f} | {write_s:.3f} | "
            f"{read_s:.3f} | {(write_s + read_s) / copy_s:.1f} | {error:.5f} |"
        )


if __name__ == "__main__":
    main()
