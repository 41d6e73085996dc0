"""What a client's process leaves out at its start is there for whoever needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LEFT_OUT = (
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "diffusers.models.transformers.sana_transformer",
    "sqlalchemy",
    "alembic",
    "sympy",
)
# A client that has taken a step, and then runs each line's code in a fork of its own.
CLIENT = """
import json, os, sys, traceback
import torch, fedphd.client.resident
# OpenMP's threads do not outlive a fork: a child that computes with several would wait for them.
torch.set_num_threads(1)
from fedphd.common.config.run import ModelConfig
from fedphd.common.unet.groups import GroupPenalty
from fedphd.common.unet.model import build_unet, layout_of_config, unet_config, unet_from_config
sent = unet_config(build_unet(ModelConfig(), seed=0))
layout_of_config(sent)
unet = unet_from_config(sent)
GroupPenalty(unet)
adam = torch.optim.Adam(unet.parameters())
unet(torch.zeros(1, 1, 8, 8), 0).sample.sum().backward()
adam.step()
adam.zero_grad()
for line in sys.stdin:
    code, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        failed = 1
        for number, name in enumerate(files, start=1):
            with open(name, "wb") as file:
                os.dup2(file.fileno(), number)
        try:
            exec(code, dict(globals()))
            failed = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(failed)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Python = Callable[[str], str]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Python]:
    """Runs code in such a client, and returns what it printed."""
    printed = tmp_path_factory.mktemp("printed")
    files = [str(printed / name) for name in ("output", "errors")]
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def run(code: str) -> str:
        print(json.dumps([code, *files]), file=requests, flush=True)
        failed = answers.readline()
        output, errors = (Path(name).read_text("utf-8") for name in files)
        assert failed == "0\n", errors
        return output

    with process:
        yield run
        requests.close()


def test_a_client_trains_without_compiler_and_transformers(python: Python) -> None:
    assert python(f"print([name for name in {LEFT_OUT} if name in sys.modules])") == "[]\n"


@pytest.mark.parametrize(
    "code",
    [
        "print(torch.compile(lambda x: 2 * x, backend='eager')(torch.ones(1)).item())",
        "import torch._dynamo.config; print(2.0 if torch._dynamo.config.verbose is False else 0)",
        "import torch._inductor.config; print(2.0 if torch._dynamo.is_compiling() is False else 0)",
        "from torch._dynamo.eval_frame import OptimizedModule as M; print(2.0 if M else 0)",
        "fedphd.common.lean_imports.bring_dynamo(); import torch._dynamo as d;"
        "print(2.0 if 'optimize' in vars(d) else 0)",
    ],
)
def test_the_compiler_is_there_for_whoever_needs_it(code: str, python: Python) -> None:
    assert python(f"{code}\nassert 'torch._dynamo.eval_frame' in sys.modules") == "2.0\n"


def test_a_pipeline_samples_without_the_compiler(python: Python) -> None:
    code = f"""
from diffusers import DDIMPipeline, DDIMScheduler
pipeline = DDIMPipeline(unet, DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)
print(pipeline(num_inference_steps=1, output_type="np").images.shape)
print([name for name in {LEFT_OUT[:2]} if name in sys.modules])
print(torch._dynamo.eval_frame.innermost_fn(len) is len)
"""
    assert python(code).splitlines() == ["(1, 8, 8, 1)", "[]", "True"]


def test_the_rest_of_diffusers_is_there_and_its_classes_are_the_same(python: Python) -> None:
    code = """
from diffusers import DDIMPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.transformers import Transformer2DModel
from fedphd.common.unet import model
assert UNet2DModel is model.UNet2DModel and issubclass(model.PrunedUNet, UNet2DModel)
"""
    python(code)


def test_a_compiled_step_does_not_compile_what_was_marked_before(python: Python) -> None:
    code = """
marked = torch.compiler.disable(lambda x: x + torch._dynamo.is_compiling())
assert torch.compile(lambda x: marked(2 * x), backend="eager")(torch.ones(1)).item() == 2.0
"""
    python(code)


@pytest.mark.parametrize(
    "code",
    [
        "from flwr.client import NumPyClient as Client",
        "from flwr.client.numpy_client import NumPyClient as Client",
    ],
)
def test_flowers_old_clients_are_there_for_whoever_needs_them(code: str, python: Python) -> None:
    everything = """
import flwr.client, inspect
assert set(flwr.client.__all__) <= {*dir(flwr.client), 'ClientApp'}
assert "NumPyClient" in inspect.getsource(flwr.client)
from flwr.compat.client.app import start_client
assert flwr.client.start_client is start_client
"""
    made = "print(Client().to_client().numpy_client is not None, Client.__module__)"
    found = python(f"{code}\n{made}{everything}")
    assert found == "True flwr.client.numpy_client\n"
