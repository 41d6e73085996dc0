"""Modules whose first weights nobody needs: they are loaded, or only their shapes matter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class WithoutFirstWeights(TorchFunctionMode):
    """Within the block modules are built whose weights are whatever was in memory.

    Drawing them takes a second for some 30 million, and moves the caller's random state. On the
    meta device even that takes sympy and torch's decompositions: 36 MB and half a second. Other
    threads draw as ever, for which diffusers' ``no_init_weights`` would leave theirs out too.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        # Not all that is called has a module: a getter has none.
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)
