"""Keeps a SuperLink's registered nodes equal to a folder of public keys, while it runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.common.wire.names import write_names
from fedphd.deploy.keys.registered import SUFFIX, fingerprint, registered

Stamp = tuple[tuple[str, int, int], ...]


class Registry(Protocol):
    """What lets nodes in: a SuperLink's Control API."""

    def register(self, key: ec.EllipticCurvePublicKey) -> int:
        """Let a node with this key in; returns its id; raises FedPhDError."""

    def unregister(self, node_id: int) -> None:
        """Let it in no more; raises FedPhDError."""


@dataclass(frozen=True)
class _Known:
    fingerprint: str
    node_id: int


@dataclass(eq=False)
class KeyRing:
    """The keys in ``folder``, of which ``connect`` tells the SuperLink.

    Args:
        names: file by which the ServerApp learns whose a node is.
        say: told who was let in or shut out later than at the start.
    """

    folder: Path
    connect: Callable[[], AbstractContextManager[Registry]]
    names: Path
    say: Callable[[str], None]
    _known: dict[str, _Known] = field(default_factory=dict)
    _stamp: Stamp | None = None

    def start(self) -> None:
        """Let everybody in who has a key in the folder; raises ConfigError for a bad one."""
        self._stamp = self._look()
        self._apply(registered(self.folder), say=lambda line: None)

    def follow(self) -> None:
        """Look once whether the folder has changed, and do as it says."""
        if (stamp := self._look()) == self._stamp:
            return
        try:
            self._apply(registered(self.folder), say=self.say)
            self._stamp = stamp
        except ConfigError as error:
            # Said once: it is looked at again when the folder changes.
            self._stamp = stamp
            self.say(f"keys stay as they were: {error}")

    def _look(self) -> Stamp:
        found = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((path.name, status.st_mtime_ns, status.st_size))
        return tuple(found)

    def _apply(
        self, keys: dict[str, ec.EllipticCurvePublicKey], *, say: Callable[[str], None]
    ) -> None:
        wanted = {name: fingerprint(key) for name, key in keys.items()}
        gone = [n for n, known in self._known.items() if wanted.get(n) != known.fingerprint]
        new = [name for name in wanted if name not in self._known or name in gone]
        if not gone and not new:
            return
        with self.connect() as registry:
            for name in gone:
                registry.unregister(self._known.pop(name).node_id)
                say(f"{name} may join no more: its key was revoked")
            for name in new:
                try:
                    node_id = registry.register(keys[name])
                except FedPhDError as error:
                    say(f"{name} may not join: {error} A key that was revoked stays so until "
                        "this process starts again; make a new one")  # fmt: skip
                    continue
                self._known[name] = _Known(wanted[name], node_id)
                say(f"{name} may join: its key was registered")
        write_names(self.names, {known.node_id: name for name, known in self._known.items()})
