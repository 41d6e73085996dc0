"""Training steps in compiled code (``torch.compile``), where a network trains long enough for it.

Compiling takes as long as hundreds of steps or more, and nobody knows how many are still to come: a
run may end, and a cut makes another network. So on a GPU a network is compiled once the steps that
it has taken would have gained as much as compiling costs. However many follow, that is at most
twice what one would spend who knew their number (the ski rental problem). On a CPU little is gained
(tests/benchmarks/step.py), and compilers take memory: there only who asks for it gets it.

torch keeps what it compiled on disk (``TORCHINDUCTOR_CACHE_DIR``), for all processes of a user.
"""

import logging
import os
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

import torch

from fedphd.client.flat_unet import FlatUNet
from fedphd.client.precision import trial_s
from fedphd.common.unet.arithmetic import Arithmetic
from fedphd.common.unet.model import PrunedUNet
from fedphd.common.wire.messages import TrainTask

logger = logging.getLogger(__name__)

# Seconds of compiling per tensor of weights, forwards and backwards.
_COST_S: Final = 0.2
# The share of a step on a GPU that compiled code is expected to save.
_SAVED: Final = 0.3
# The share of a plain step's time below which the compiled one is used.
_WORTH: Final = 0.97
_TRIAL_STEPS: Final = 4


class CompiledPasses:
    """Forward and backward passes of one network, compiled as soon as that pays.

    Args:
        arithmetic: what the network's steps are computed in.
        batch_size: of the steps that are compiled. Smaller batches run as before, since each size
            would have to be compiled by itself.
        at_once: do not wait until it pays.
    """

    def __init__(self, arithmetic: Arithmetic, batch_size: int, *, at_once: bool) -> None:
        self.arithmetic, self.batch_size, self.at_once = arithmetic, batch_size, at_once
        self._compiled: PrunedUNet | None = None
        self._decided = False
        self._trained_s = 0.0

    def chosen(self, unet: PrunedUNet, num_images: int) -> PrunedUNet:
        """What is to run on a batch: ``unet``, or its compiled passes."""
        if self._compiled is None or num_images != self.batch_size:
            return unet
        return self._compiled

    def trained(self, seconds: float) -> None:
        """Count ``seconds`` of steps that compiled code would have served."""
        self._trained_s += seconds

    def running(self) -> AbstractContextManager[Any]:
        """The context of a round's steps, in which nothing is compiled."""
        if self._compiled is None:
            return nullcontext()
        # Whatever differs from the trial runs as before, instead of being compiled by itself.
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("eager_on_recompile")
        return stance

    def compile_if_due(self, network: FlatUNet, num_images: int) -> None:
        """Compile if the steps so far would have gained as much, and see whether it is faster.

        Not for a round over ``num_images`` that are fewer than a batch.
        Weights, gradient and random state stay as they are. Where it cannot be done, for want of a
        compiler for example, the log says so and steps stay as they were.
        """
        cost_s = _COST_S * len(network.layout.names)
        due = self.at_once or self._trained_s * _SAVED >= cost_s
        if self._decided or not due or num_images < self.batch_size:
            return
        self._decided = True
        started_s = time.perf_counter()
        try:
            # The compiler warns of diffusers' code, and of its own.
            with warnings.catch_warnings(action="ignore"):
                compiled = _compiled(network)
                trial_s(network, self.arithmetic, compiled, self.batch_size, steps=1)
            took_s = time.perf_counter() - started_s
            plain_s, fast_s = (
                trial_s(network, self.arithmetic, unet, self.batch_size, _TRIAL_STEPS)
                for unet in (network.unet, compiled)
            )
        # Compilers, caches and what they start fail in ways of their own.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.info("training goes on without compiled code: %s", reason)
            return
        if fast_s < _WORTH * plain_s:
            self._compiled = compiled
        logger.info(
            "compiled the network in %.3g s: a step of %d images takes %.3g s, plain %.3g s%s",
            took_s, self.batch_size, fast_s, plain_s,
            "" if self._compiled is not None else "; it is not used",
        )  # fmt: skip


_passes: WeakKeyDictionary[FlatUNet, CompiledPasses] = WeakKeyDictionary()


def compiled_passes(
    network: FlatUNet, arithmetic: Arithmetic, task: TrainTask
) -> CompiledPasses | None:
    """The network's, for the steps of ``task``; None where the run or the method wants none.

    They last as long as the network, whichever clients of this process train it.
    """
    compile_ = task.training.compile
    # MOON listens to a part of the network, which compiled code would not tell.
    if compile_ == "never" or task.objective.method == "moon":
        return None
    if compile_ == "auto" and network.flat.device.type != "cuda":
        return None
    batch_size, at_once = task.training.batch_size, compile_ == "always"
    passes, wanted = _passes.get(network), (arithmetic.bf16, batch_size, at_once)
    if passes is None or (passes.arithmetic.bf16, passes.batch_size, passes.at_once) != wanted:
        passes = _passes[network] = CompiledPasses(arithmetic, batch_size, at_once=at_once)
    return passes


def _compiled(network: FlatUNet) -> PrunedUNet:
    """The network's U-Net, which is compiled when it first runs."""
    # Else it starts a process with all of torch for each core. Read when first imported.
    workers = "1" if network.flat.device.type == "cpu" else "4"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", workers)
    compiled: Any = torch.compile(network.unet, dynamic=False)
    return cast(PrunedUNet, compiled)
