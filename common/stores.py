"""Where the lasting state of a client or an edge is: beside the process, so that it outlives it.

A run that is resumed has its last intervals again. So the state says of which run, attempt and
interval it is, and the one from before that interval is kept beside it.
"""

import json
import logging
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedphd.common.errors import FedPhDError, telling
from fedphd.common.files import replaced

logger = logging.getLogger(__name__)

_JSON: Final = "json"
_OF: Final = "of"


class Lasting(Protocol):
    """What has a state: JSON scalars, and tensors on the CPU, by name."""

    @property
    def whose(self) -> str:
        """Who has it, for messages."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``, or afresh if ``state`` is empty."""


class Order(Protocol):
    """What is to be done, and changes the state."""

    @property
    def run_name(self) -> str:
        """Of which run."""

    @property
    def resumed(self) -> tuple[int, ...]:
        """After how many intervals it went on each time."""

    @property
    def interval(self) -> int:
        """In which of its intervals."""


class Origin(NamedTuple):
    """The work that a state is after: the last one in ``interval``."""

    run_name: str
    resumed: tuple[int, ...]
    interval: int


def _kept_after(task: Order, resumed: tuple[int, ...]) -> float:
    """The last interval whose work counts for ``task``, of a run that was ``resumed`` by then."""
    if resumed == task.resumed:
        return math.inf
    # They part where an older copy of the run's folder was put back.
    pairs = zip(resumed, task.resumed, strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return min(task.resumed[shared:] or task.resumed[-1:], default=0)


class StateStore(ABC):
    """A place that outlives the process.

    Args:
        resident: what has the state stays in memory between messages, and nobody else uses it.
    """

    def __init__(self, *, resident: bool = False) -> None:
        self._resident = resident
        # Of the state in memory.
        self._held: Origin | None = None
        # The last interval that the state has seen, where it is of the task's run and attempt.
        self._seen = 0
        # Whether what is stored becomes the state before the interval.
        self._becomes_former = False

    @telling("its stored state cannot be read")
    def restore(self, lasting: Lasting, task: Order) -> None:
        """Bring ``lasting`` to the state that ``task`` starts from.

        That is the stored one, if it is of the task's run; where the run was resumed, and it had
        worked in an interval that comes again, the one from before that. Who is new starts afresh.

        Raises FedPhDError if the state is malformed or gone.
        """
        kept = None
        if self._held is None:
            kept = self._read(lasting.whose)
        origin = self._held or _origin(kept, lasting.whose)
        self._becomes_former, self._seen = False, 0
        if origin is None or origin.run_name != task.run_name:
            lasting.load_state_dict({})
        elif origin.interval > _kept_after(task, origin.resumed):
            lasting.load_state_dict(self._former_of(lasting.whose, task) or {})
        else:
            self._becomes_former = origin.interval < task.interval
            self._seen = origin.interval if origin.resumed == task.resumed else 0
            if kept is not None:
                lasting.load_state_dict(kept)

    @telling("its state cannot be stored")
    def store(self, lasting: Lasting, task: Order) -> None:
        """Store the state; raises FedPhDError if that is impossible."""
        # An edge that is late by an interval asks for the work of one that is over.
        origin = Origin(task.run_name, task.resumed, max(task.interval, self._seen))
        state = lasting.state_dict()
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        scalars = {key: value for key, value in state.items() if key not in tensors}
        text = json.dumps({**scalars, _OF: list(origin)})
        self.forget()
        self._write(lasting.whose, text, tensors, former=self._becomes_former)
        if self._resident:
            self._held = origin
        else:
            # A process may play many clients; what is stored need not stay here too.
            lasting.load_state_dict({})

    def forget(self) -> None:
        """Read what is stored again next time: what is in memory is of no whole piece of work."""
        self._held = None

    def _former_of(self, whose: str, task: Order) -> dict[str, Any] | None:
        """The state from before the last interval, if it is of this run."""
        former = self._read_former(whose)
        origin = _origin(former, whose)
        if origin is None or origin.run_name != task.run_name:
            return None
        after = _kept_after(task, origin.resumed)
        if origin.interval > after:
            logger.warning(
                "%s: the run goes on after interval %d, but the state that is kept has seen "
                "interval %d", whose, after, origin.interval,
            )  # fmt: skip
        return former

    @abstractmethod
    def _read(self, whose: str) -> dict[str, Any] | None:
        """What was written last, scalars and tensors by name; None if there is nothing."""

    @abstractmethod
    def _read_former(self, whose: str) -> dict[str, Any] | None:
        """What was stored before the interval of the last state; None if it is not kept."""

    @abstractmethod
    def _write(
        self, whose: str, scalars: str, tensors: dict[str, torch.Tensor], *, former: bool
    ) -> None:
        """Replace what was written before; ``scalars`` are JSON text.

        With ``former`` what is replaced is from before this interval, and stays as such.
        """


def _origin(kept: dict[str, Any] | None, whose: str) -> Origin | None:
    if not kept:
        return None
    try:
        run_name, resumed, interval = kept[_OF]
        return Origin(run_name, tuple(resumed), interval)
    except (KeyError, TypeError, ValueError):
        logger.warning(
            "%s: the stored training state does not say where it comes from, as an earlier "
            "version's does not: it starts afresh", whose,
        )  # fmt: skip
        return None


@final
class FileStore(StateStore):
    """The state is in the file ``path``, the former one beside it.

    Flower holds the records (``context.state``) of all simulated nodes in one process, which many
    clients' moments would fill. The files are of one client, or one edge, alone.
    """

    def __init__(self, path: Path, *, resident: bool = False) -> None:
        super().__init__(resident=resident)
        self._path = path
        self._former = path.with_name(f"{path.stem}.former{path.suffix}")

    def _read(self, whose: str) -> dict[str, Any] | None:
        return self._load(self._path, whose)

    def _read_former(self, whose: str) -> dict[str, Any] | None:
        return self._load(self._former, whose)

    def _load(self, path: Path, whose: str) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                scalars = json.loads(file.metadata()[_JSON])
                # A copy: a tensor that maps the file would change with it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                return {**scalars, **tensors}
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise FedPhDError(
                f"the stored training state of {whose} cannot be read from {path}: "
                f"{error}; remove it to start afresh"
            ) from error

    def _write(
        self, whose: str, scalars: str, tensors: dict[str, torch.Tensor], *, former: bool
    ) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if former and self._path.exists():
                with replaced(self._former) as beside:
                    _share(self._path, beside)
            # A process that is killed here leaves the old state or the new one, whole.
            with replaced(self._path) as beside:
                save_file(tensors, beside, metadata={_JSON: scalars})
        except (OSError, SafetensorError) as error:
            raise FedPhDError(
                f"the training state of {whose} cannot be written to {self._path}: "
                f"{error}; make room there, or choose a larger disk (state_dir; FLWR_HOME where "
                "Flower simulates)"
            ) from error


def _share(source: Path, target: Path) -> None:
    """Give a file that is never changed in place a second name, where the file system can."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
