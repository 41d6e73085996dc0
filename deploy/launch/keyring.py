"""Keeps a SuperLink's registered nodes equal to a folder of public keys, while it runs."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from fedphd.common.errors import ConfigError, FedPhDError, RefusedError
from fedphd.common.wire.names import write_names
from fedphd.deploy.keys.files import check_in_date
from fedphd.deploy.keys.registered import SUFFIX, registered

Say = Callable[[str], None]
# For so long a revoked key may stay in where the SuperLink cannot be told.
MOST_S: Final = 60.0
# Of each file its name, when it was written, when its owner or mode changed, and its size.
Stamp = tuple[tuple[str, int, int, int], ...]


class Registry(Protocol):
    """What lets nodes in: a SuperLink's Control API."""

    def register(self, key: ec.EllipticCurvePublicKey) -> int:
        """Let a node with this key in; returns its id.

        Raises:
            RefusedError: not with this key.
            FedPhDError: it does not answer.
        """

    def unregister(self, node_id: int) -> None:
        """Let it in no more; raises FedPhDError."""


@dataclass(frozen=True)
class _Known:
    key: ec.EllipticCurvePublicKey
    node_id: int


@dataclass(eq=False)
class KeyRing:
    """The keys in ``folder``, of which ``registry`` is told.

    Args:
        names: file by which the ServerApp learns whose a node is.
        say: told who was let in or shut out later than at the start.
        certificate: the registry's; None: it has none.
        clock: monotonic seconds; for tests.
    """

    folder: Path
    registry: Registry
    names: Path
    say: Say
    certificate: Path | None = None
    clock: Callable[[], float] = time.monotonic
    _known: dict[str, _Known] = field(default_factory=dict)
    _written: dict[int, str] = field(default_factory=dict)
    _stamp: Stamp | None = None
    _said: str = ""
    _kept_since_s: float | None = None

    def start(self) -> None:
        """Let everybody in who has a key in the folder.

        Raises:
            ConfigError: the folder cannot be read, or one of the files is not a key.
            FedPhDError: the SuperLink does not answer.
        """
        try:
            self._stamp = self._look()
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be read: {error.strerror}") from error
        # Nobody asks yet whose they are.
        for name, key in registered(self.folder).items():
            self._let_in(name, key, say=lambda line: None)
        self._write_names()

    def follow(self) -> None:
        """Look once whether the folder has changed, and do as it says; again if that fails.

        Raises FedPhDError where a revoked key could not be shut out for too long; ConfigError if
        the certificate is not good any more.
        """
        try:
            stamp = self._look()
        except OSError as error:
            # Whose key was taken away cannot be told, and who is shut out once stays so.
            self._say_once(
                f"who may join stays as it is: {self.folder} cannot be read: {error.strerror}; "
                "make it readable for this process"
            )
            return
        if stamp == self._stamp:
            self._said = ""
            return
        try:
            keys = registered(self.folder)
        except ConfigError as error:
            # A bad file must not keep in whose key was taken away.
            there = {name for name, *_ in stamp}
            keys = {n: k.key for n, k in self._known.items() if f"{n}{SUFFIX}" in there}
            self._say_once(f"nobody new may join: {error}")
        try:
            self._apply(keys)
        except (FedPhDError, OSError) as error:
            self._say_once(f"keys are not yet as {self.folder} says, trying again: {error}")
            self._check_shut_out(self._gone(keys), error)
            return
        self._stamp, self._said, self._kept_since_s = stamp, "", None

    def _check_shut_out(self, kept: list[str], error: Exception) -> None:
        """Raise as ``follow`` says, where those whose keys were revoked were ``kept`` too long."""
        now_s = self.clock()
        if not kept or self._kept_since_s is None:
            self._kept_since_s = now_s if kept else None
            return
        if now_s - self._kept_since_s <= MOST_S:
            return
        # Without this process nobody is connected.
        why = f"{', '.join(kept)} could not be shut out for {MOST_S:g} s, so this process ends"
        try:
            if self.certificate:
                check_in_date(self.certificate)
        except ConfigError as bad:
            raise ConfigError(f"{why}: {bad}") from error
        raise FedPhDError(f"{why}: {error}") from error

    def _say_once(self, line: str) -> None:
        if line != self._said:
            self._said = line
            self.say(line)

    def _look(self) -> Stamp:
        """What is in the folder; raises OSError where that cannot be told."""
        found = []
        # Not a glob, which takes a folder that cannot be read for an empty one.
        names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
        for name in names:
            if not name.endswith(SUFFIX):
                continue
            try:
                status = (self.folder / name).stat()
            except FileNotFoundError:
                continue
            except OSError:
                # It is there, and reading it says what is wrong with it.
                found.append((name, 0, 0, 0))
                continue
            found.append((name, status.st_mtime_ns, status.st_ctime_ns, status.st_size))
        return tuple(found)

    def _gone(self, keys: dict[str, ec.EllipticCurvePublicKey]) -> list[str]:
        """Who is in with another key than it should have, or should be in no more."""
        return [name for name, known in self._known.items() if keys.get(name) != known.key]

    def _apply(self, keys: dict[str, ec.EllipticCurvePublicKey]) -> None:
        """Tell the SuperLink who leaves and who comes, as far as it listens."""
        gone = self._gone(keys)
        new = {n: key for n, key in keys.items() if n not in self._known or n in gone}
        try:
            for name in gone:
                self.registry.unregister(self._known[name].node_id)
                del self._known[name]
                self.say(f"{name} may join no more: its key was revoked")
            for name, key in new.items():
                self._let_in(name, key, self.say)
                # It may knock at once, and who has no name then is refused.
                self._write_names()
        finally:
            self._write_names()

    def _write_names(self) -> None:
        names = {known.node_id: name for name, known in self._known.items()}
        if names != self._written:
            write_names(self.names, names)
            self._written = names

    def _let_in(self, name: str, key: ec.EllipticCurvePublicKey, say: Say) -> None:
        try:
            node_id = self.registry.register(key)
        except RefusedError as error:
            problem = "a key that was revoked stays so until this process starts again"
            self.say(f"{name} may not join: {error} ({problem}; make a new key)")
            return
        self._known[name] = _Known(key, node_id)
        say(f"{name} may join: its key was registered")
