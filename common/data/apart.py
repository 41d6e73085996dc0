"""Opens the embedded digits in a process of its own, whose libraries end with it.

``datasets`` and what it imports are 100 MB and a second, for the positions of a client's part. The
other process works while this one imports torch.
"""

import io
import subprocess
import sys
from typing import Any, BinaryIO, Final, Self

import numpy as np

from fedphd.common.config.data import DataConfig, PartitionConfig
from fedphd.common.data.partition import all_parts
from fedphd.common.data.sources import Opened, digit_arrays, digit_pictures, is_digits

_PROGRAM: Final = "from fedphd.common.data.apart import main; main()"


class Opening:
    """A data set that is being opened and cut."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        self._child = child

    @classmethod
    def begin(cls, config: DataConfig) -> Self | None:
        """Start to open what ``config`` names; None if it is not the digits as they are."""
        labelled_elsewhere = config.label_file or config.attribute_file
        if not is_digits(config) or labelled_elsewhere or config.max_images is not None:
            return None
        part = config.partition
        command = [sys.executable, "-P", "-c", _PROGRAM, part.model_dump_json() if part else ""]
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL))

    def wait(self) -> Opened | None:
        """The digits, and the positions of each part; None if this process should try itself.

        It then meets the same error, and raises it.
        """
        written, _ = self._child.communicate()
        if self._child.returncode != 0:
            return None
        arrays = np.load(io.BytesIO(written))
        parts = np.split(arrays["positions"], np.cumsum(arrays["sizes"])[:-1])
        return Opened(digit_pictures(arrays["images"]), arrays["labels"], parts)


def main() -> None:
    """Write images, labels and parts to the standard output; the partition is the argument."""
    images, labels = digit_arrays()
    parts: list[Any] = [np.arange(len(labels))]
    if sys.argv[1]:
        parts = list(all_parts(labels, PartitionConfig.model_validate_json(sys.argv[1])))
    _write(sys.stdout.buffer, images=images, labels=labels, sizes=[len(part) for part in parts],
           positions=np.concatenate(parts))  # fmt: skip


def _write(out: BinaryIO, **arrays: Any) -> None:
    file = io.BytesIO()
    np.savez(file, **arrays)
    out.write(file.getvalue())
