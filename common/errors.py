"""One tree of errors, and the exit code that each fatal class ends a process with.

    FedPhDError                 1   a defect, or anything not named below
    ├── ConfigError             2   a setting is wrong: fix the configuration, then start again
    ├── StartError              3   could not start: a port in use, a file missing
    ├── ParticipantsError       4   too few edges or clients within the configured wait
    ├── ConnectionLostError     5   a peer stayed unreachable for longer than allowed: restart
    ├── Interrupted           130   SIGINT or SIGTERM
    ├── ReplyError              1   what a peer sent is unusable: the peer is left out of the round
    └── RefusedError            1   a SuperLink does not register a key: the key is left out

A library's error becomes one of these where it enters, with the cause chained, and nowhere else:

    gRPC, of a node's link      ConnectionLostError  ``common/wire/node.py``
    Flower, of a peer's bytes   ReplyError           ``common/wire/internals.py``, ``records.py``
    pydantic, of a message      ReplyError           ``common/wire/records.py``
    pydantic, of a setting      ConfigError          ``common/config/roles.py``
    torch, of a file            ConfigError          where it is read: ``common/unet/``,
                                                     ``common/quality/``

An error in answering a message goes back as a Flower error reply (``common/wire/failures.py``) and
is a ReplyError to the asking side. A text may name files and what is in them, which is nobody's
business elsewhere: ``told_of`` is what peers get to know of an error. Not translated: what Flower's
own link of a ServerApp raises when it stops trying again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, Self, get_args

# Why a peer is left out of a round, in a word: no answer in time, none within ``waits.straggler_s``
# after the others', one that was lost on its way, a peer that is not there, one that says that it
# failed, an answer that cannot be used, and an update that is far too long.
FailureKind = Literal["late", "straggler", "lost", "gone", "error", "malformed", "outlier"]
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


_MORE: Final = "its own log says more"


class FedPhDError(Exception):
    """Base of every error that this package raises on purpose.

    ``told`` is what peers may know of it; None: that there was one of its kind.
    """

    exit_code = 1
    told: str | None = None

    def for_peers(self) -> Self:
        """This error, whose text holds nothing of this machine's own and may be told as it is."""
        self.told = str(self)
        return self


class ConfigError(FedPhDError):
    """A setting is unknown, of the wrong type, out of range or impossible with another."""

    exit_code = 2


class StartError(FedPhDError):
    """A process could not start: an address in use, a file or a command missing."""

    exit_code = 3


class ParticipantsError(FedPhDError):
    """Fewer edges or clients than required came, or stayed, within the configured wait."""

    exit_code = 4


class ConnectionLostError(FedPhDError):
    """A peer could not be reached again within the configured time."""

    exit_code = 5


class RefusedError(FedPhDError):
    """A SuperLink does not take a key."""


class Interrupted(FedPhDError):  # noqa: N818 - a request, nothing went wrong
    """The process was asked to stop by SIGINT or SIGTERM."""

    exit_code = 130


class ReplyError(FedPhDError):
    """One peer's message is unusable (shape, dtype, NaN, count, late, lost); others are not.

    ``kind`` says why in a word.
    """

    def __init__(self, text: str, kind: FailureKind = "malformed") -> None:
        super().__init__(text)
        self.kind: FailureKind = kind


EXIT_OK = 0


def exit_code_of(error: BaseException) -> int:
    """Return the process exit code for ``error``; 1 for anything unforeseen."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    return error.exit_code if isinstance(error, FedPhDError) else FedPhDError.exit_code


def told_of(error: BaseException) -> str:
    """What a peer may know of an error in answering it: nothing of this machine's files.

    Texts about peers go as they are, others only where ``for_peers`` or ``telling`` says so.
    """
    if isinstance(error, ReplyError | ParticipantsError | ConnectionLostError):
        return f"{type(error).__name__}: {error}"
    kind = "refused" if isinstance(error, ConfigError) else type(error).__name__
    told = error.told if isinstance(error, FedPhDError) else None
    if told is None and isinstance(error, ConfigError):
        told = f"a setting of its own is wrong; {_MORE}"
    return f"{kind}: {told or _MORE}"


def code_for_peers(error: BaseException) -> int:
    """The exit code of the others in a run that ``error`` ends.

    Not that of a wrong configuration, for theirs is not: a supervisor starts them again.
    """
    return FedPhDError.exit_code if isinstance(error, ConfigError) else exit_code_of(error)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Let peers know of a FedPhDError from within ``what``, in place of its text."""
    try:
        yield
    except FedPhDError as error:
        error.told = error.told or f"{what}; {_MORE}"
        raise


@contextmanager
def within(section: str) -> Iterator[None]:
    """Name the ``section`` of the configuration that a ConfigError from within is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"in [{section}]: {error}") from error
