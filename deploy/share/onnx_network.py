"""The U-Net as an ONNX file, for devices without Python."""

import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from fedphd.common.errors import FedPhDError
from fedphd.common.extras import require_extra
from fedphd.common.lean_imports import bring_dynamo
from fedphd.common.rng import generator
from fedphd.common.unet.model import UNet2DModel

if TYPE_CHECKING:
    import onnx

NETWORK_FILE: Final = "unet.onnx"
NOISE_FILE: Final = "alphas_cumprod.json"
INPUTS, OUTPUT = ("sample", "timestep"), "noise"
# Other than the batch that is traced, so that a batch that was fixed on the way shows.
_CHECKED_BATCHES: Final = (1, 3)
_TRACED_BATCH: Final = 2
_CHECKED_TIMESTEPS: Final = 1000
# Of the largest output. Two libraries that add in another order differ by some 1e-6 of it.
_TOLERANCE: Final = 1e-4


class _Noise(nn.Module):
    """The U-Net with tensors alone in its interface."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        noise: Tensor = self.unet(sample, timestep).sample
        return noise


def check_onnx() -> None:
    """Raise ConfigError unless what writes and checks ONNX files is installed."""
    require_extra("--onnx", "onnx", "onnx", "onnxscript", "onnxruntime")


def write_onnx(unet: UNet2DModel, scheduler: DDIMScheduler, folder: Path) -> float:
    """Write the U-Net and its noise schedule into ``folder``, which is made.

    ``unet.onnx`` takes ``sample``, (batch, C, H, W), float32, and ``timestep``, (1,), int64, and
    gives ``noise``, of the sample's shape; the batch is open. ``alphas_cumprod.json`` is the
    schedule, (T,). Nothing in them tells where they were made.

    Returns:
        The largest absolute difference between ONNX Runtime's output and torch's, over batches
        of one and of three images.

    Raises:
        ConfigError: the extra ``onnx`` is not installed.
        FedPhDError: the outputs differ by more than 1e-4 of the largest.
        OSError: a file cannot be written.
    """
    check_onnx()
    import onnx

    network: Any = unet
    was_training = network.training
    noise = _Noise(network.eval())
    try:
        with torch.no_grad():
            model = _exported(noise)
            _strip(model)
            onnx.checker.check_model(model)
            difference = _check(noise, model)
    finally:
        network.train(was_training)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NETWORK_FILE).write_bytes(model.SerializeToString())
    schedule = [float(value) for value in scheduler.alphas_cumprod]
    (folder / NOISE_FILE).write_text(json.dumps(schedule) + "\n", "utf-8")
    return difference


def _exported(noise: _Noise) -> "onnx.ModelProto":
    # The exporter takes functions of the compiler apart, for which a stand-in is too little.
    bring_dynamo()
    sample, timestep = _inputs(noise, _TRACED_BATCH)
    batch = torch.export.Dim("batch")
    log = logging.getLogger("torch.onnx")
    level = log.level
    # It says of every package that it does not need that it is not there.
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                noise,
                (sample, timestep),
                dynamo=True,
                dynamic_shapes={"sample": {0: batch}, "timestep": None},
                input_names=INPUTS,
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _inputs(noise: _Noise, batch: int) -> tuple[Tensor, Tensor]:
    """A sample, (batch, C, H, W), float32, and a timestep, (1,), int64, on the network's device."""
    config: Any = noise.unet.config
    size, device = config["sample_size"], noise.unet.device
    shape = (batch, config["in_channels"], size, size)
    draws = generator("onnx", batch)
    timestep = torch.randint(_CHECKED_TIMESTEPS, (1,), generator=draws)
    return torch.randn(shape, generator=draws).to(device), timestep.to(device)


def _strip(model: "onnx.ModelProto") -> None:
    """Remove what the exporter notes beside the network: names and paths of this machine's code."""
    model.doc_string = ""
    del model.metadata_props[:]
    for part in _parts([model.graph, *model.functions]):
        part.doc_string = ""
        del part.metadata_props[:]


def _parts(graphs: Iterable[Any]) -> Iterator[Any]:
    """Graphs, what they hold, and the graphs within that."""
    for graph in graphs:
        yield graph
        yield from graph.node
        for values in ("value_info", "input", "output", "initializer"):
            # A function's inputs are plain names.
            yield from (v for v in getattr(graph, values, ()) if not isinstance(v, str))
        for attribute in (a for node in graph.node for a in node.attribute):
            inner = [attribute.g] if attribute.HasField("g") else []
            yield from _parts([*inner, *attribute.graphs])


def _check(noise: _Noise, model: "onnx.ModelProto") -> float:
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    largest = 0.0
    for batch in _CHECKED_BATCHES:
        tensors = _inputs(noise, batch)
        expected = noise(*tensors).cpu().numpy()
        feed = {name: value.cpu().numpy() for name, value in zip(INPUTS, tensors, strict=True)}
        (found,) = session.run([OUTPUT], feed)
        difference = float(np.abs(found - expected).max())
        # Also where it is not a number.
        if not difference <= _TOLERANCE * float(np.abs(expected).max()):
            raise FedPhDError(
                f"the ONNX network's output differs from torch's by {difference:.2g}, of at most "
                f"{np.abs(expected).max():.2g}: export without --onnx, and report the versions of "
                "torch, onnx and onnxruntime"
            )
        largest = max(largest, difference)
    return largest
