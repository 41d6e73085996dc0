"""Imports that a U-Net needs, without what only comes along: half of a process's start.

diffusers' U-Net brings all transformers of diffusers with it, and optimisers and diffusers bring
torch's compiler, ``torch._dynamo``. The first are not used here, the second seldom, and they take
150 MB and 3 s in every process, of which a machine may run many. Flower's ClientApp brings its old
clients, and with them two libraries for data bases: 29 MB. What is left out is there again for
whoever needs it.
"""

import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Final

_DYNAMO: Final = "torch._dynamo"
_lock = threading.RLock()


@contextmanager
def bare_packages(*names: str) -> Iterator[None]:
    """Within the block, modules of these packages are imported without the packages' own code.

    Packages that are imported already, or are not there, are left as they are.
    """
    made = {}
    for name in names:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            made[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for name, module in made.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def put_off_code_of(package: str) -> None:
    """Let ``package`` run its own code when something of it is asked for, not when it is imported.

    Its modules can be imported before that. A package that is imported already is left as it is.
    """
    with _lock:
        if package not in sys.modules:
            sys.meta_path.insert(0, _PackageFinder(package))


def put_off_dynamo() -> None:
    """Let ``torch._dynamo`` be imported only when something of it is needed.

    What torch's optimisers and diffusers ask of it where nothing is compiled does not count.
    """
    with _lock:
        if _DYNAMO not in sys.modules:
            sys.modules[_DYNAMO] = _StandIn(_DYNAMO)
            sys.meta_path.insert(0, _Finder())


def bring_dynamo() -> None:
    """Import ``torch._dynamo`` itself now, for what takes it apart, as torch's ONNX exporter."""
    _real()


def _real() -> ModuleType:
    with _lock:
        if isinstance(sys.modules.get(_DYNAMO), _StandIn):
            del sys.modules[_DYNAMO]
        return importlib.import_module(_DYNAMO)


class _PackageFinder(MetaPathFinder):
    """Finds one package where it is, and puts off its code."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PutOff(spec.loader)
        return spec


class _PutOff(Loader):
    """Makes a package whose code ``real`` runs later."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _PutOffPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        # Who reads a package's source asks its loader.
        module.__loader__ = self._real
        if module.__spec__ is not None:
            module.__spec__.loader = self._real


class _PutOffPackage(ModuleType):
    """A package until something is asked for that only its own code can give."""

    def __getattr__(self, name: str) -> Any:
        # What importing asks of every package, and its code does not give.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with _lock:
            if type(self) is _PutOffPackage:
                # mypy takes the class for fixed.
                self.__class__ = ModuleType  # type: ignore[assignment]
                vars(self)["__loader__"].exec_module(self)
        return getattr(self, name)


class _NothingCompiled(ModuleType):
    """Stands for ``torch._dynamo.eval_frame``: diffusers asks whether a module is compiled."""

    class OptimizedModule:
        """What no module is that was not compiled."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_real().eval_frame, name)


class _StandIn(ModuleType):
    """Answers what is asked of ``torch._dynamo`` where nothing is compiled; else imports it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)

    eval_frame = _NothingCompiled(f"{_DYNAMO}.eval_frame")

    @staticmethod
    def disable(fn: Any = None, *arguments: Any, **options: Any) -> Any:
        if fn is None:
            return lambda fn: _StandIn.disable(fn, *arguments, **options)
        if not isinstance(fn, FunctionType):
            return _real().disable(fn, *arguments, **options)
        known: Callable[..., Any] | None = None

        @functools.wraps(fn)
        def uncompiled(*args: Any, **kwargs: Any) -> Any:
            nonlocal known
            if known is None:
                if isinstance(sys.modules.get(_DYNAMO), _StandIn):
                    return fn(*args, **kwargs)
                known = _real().disable(fn, *arguments, **options)
            return known(*args, **kwargs)

        return uncompiled

    @staticmethod
    def allow_in_graph(fn: Any) -> Any:
        return fn

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        # Whether it is a package is asked by every `from torch._dynamo import ...`.
        if name == "__path__" and "torch" in sys.modules:
            return [str(Path(place) / "_dynamo") for place in sys.modules["torch"].__path__]
        # `inspect` looks for the file of every module.
        if name.startswith("__"):
            raise AttributeError(f"module {_DYNAMO!r} has no attribute {name!r}")
        return getattr(_real(), name)


class _Finder(MetaPathFinder):
    """Imports the real one before a module in it, which would take the stand-in for its package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        stood_in = isinstance(sys.modules.get(_DYNAMO), _StandIn)
        if not stood_in or not fullname.startswith(f"{_DYNAMO}."):
            return None
        _real()
        return ModuleSpec(fullname, _Imported(importlib.import_module(fullname)))


class _Imported(Loader):
    """Gives a module that was imported meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        pass
