"""FedPhD: hierarchical federated training of diffusion models with Flower (arXiv:2507.06449).

The rooms of this package lie in the repository's root; the links beside this file make them one
package for Python, editors and type checkers alike. What most users need is here::

    from fedphd import PrunedUNet
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from fedphd.common.lean_imports import put_off_code_of, put_off_dynamo

if TYPE_CHECKING:
    from fedphd.common.unet.model import PrunedUNet

# Before anything imports torch's compiler, or Flower.
put_off_dynamo()
put_off_code_of("flwr.client")

__all__ = ["PrunedUNet", "__version__"]
__version__ = version("fedphd")


def __getattr__(name: str) -> object:
    """Import what takes seconds only when it is asked for."""
    if name == "PrunedUNet":
        from fedphd.common.unet.model import PrunedUNet

        return PrunedUNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
