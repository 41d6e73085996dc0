"""The network as ONNX: the same numbers, for any batch, and nothing of the machine in the file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from support.exportable import write_exportable

from fedphd.common.errors import FedPhDError
from fedphd.common.unet.model import PrunedUNet
from fedphd.deploy.share import onnx_network
from fedphd.deploy.share.folder import Choices, Exported, export_run

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of a pruned network, in the widest sense of the word: other head width, own time features."""
    folder = tmp_path_factory.mktemp("onnx")
    run = write_exportable(folder / "run", pruned=True)
    return export_run(run, folder / "out", Choices(onnx=True))


def test_it_takes_batches_of_any_size_and_gives_torchs_numbers(exported: Exported) -> None:
    unet = PrunedUNet.from_pretrained(exported.folder, subfolder="unet")
    session = onnxruntime.InferenceSession(exported.folder / "onnx/unet.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("sample", ["batch", 1, 8, 8]), ("timestep", [1]),
    ]  # fmt: skip
    for batch in (1, 2, 7):
        images = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = unet(images, 900 - batch).sample.numpy()
        feed = {"sample": images.numpy(), "timestep": np.array([900 - batch])}
        (noise,) = session.run(["noise"], feed)
        np.testing.assert_allclose(noise, expected, atol=1e-5)
    assert exported.onnx_difference is not None
    assert 0 < exported.onnx_difference < 1e-5


def test_the_file_says_nothing_of_the_machine(exported: Exported) -> None:
    content = (exported.folder / "onnx/unet.onnx").read_bytes()
    # The exporter notes the stack of each operation: paths of files, and lines of code.
    for text in (b"site-packages", b".py", b"fedphd", b"File ", str(Path.home()).encode()):
        assert text not in content, text


def test_the_cards_code_draws_what_diffusers_draws(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (exported.folder / "README.md").read_text("utf-8")
    _, code = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(exported.folder)
    values: dict[str, np.ndarray] = {}
    exec(code, values)
    assert (values["pixels"].shape, values["pixels"].dtype) == ((16, 1, 8, 8), np.uint8)
    unet = PrunedUNet.from_pretrained(exported.folder, subfolder="unet")
    sampler = DDIMScheduler.from_pretrained(exported.folder, subfolder="scheduler")
    sampler.set_timesteps(50)
    noise = np.random.default_rng(0).standard_normal((16, 1, 8, 8)).astype(np.float32)
    images = torch.from_numpy(noise)
    with torch.no_grad():
        for step in sampler.timesteps:
            images = sampler.step(unet(images, step).sample, int(step), images).prev_sample
    scale = float(images.abs().max())
    np.testing.assert_allclose(values["images"], images.numpy(), atol=1e-3 * scale)


def test_other_numbers_than_torchs_are_an_error(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(exported.folder / "onnx/unet.onnx")
    bias = next(part for part in model.graph.initializer if part.name == "unet.conv_out.bias")
    values = onnx.numpy_helper.to_array(bias) + 0.01
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    monkeypatch.setattr(onnx_network, "_exported", lambda noise: model)
    unet = PrunedUNet.from_pretrained(exported.folder, subfolder="unet")
    with pytest.raises(FedPhDError, match=r"differs from torch's by 0\.01"):
        onnx_network.write_onnx(unet, DDIMScheduler(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
