"""Names of the files in a folder that shares a network."""

from pathlib import Path
from typing import Final

CARD: Final = "README.md"
SAMPLES: Final = "samples.png"
INDEX: Final = "model_index.json"
UNET: Final = "unet"
SCHEDULER: Final = "scheduler"
ONNX: Final = "onnx"


def is_export(folder: Path) -> bool:
    """Whether ``folder`` is one that shares a network, rather than a run's."""
    return (folder / CARD).is_file() and (folder / INDEX).is_file()
