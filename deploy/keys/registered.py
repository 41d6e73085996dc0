"""The nodes that a SuperLink lets in: a folder with a public key, ``NAME.pub``, for each name."""

import base64
import hashlib
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedphd.common.config.roles import check_id
from fedphd.common.errors import ConfigError
from fedphd.common.files import replaced
from fedphd.deploy.keys.files import PublicKey, openssh, read_public_key

SUFFIX = ".pub"


def fingerprint(key: PublicKey) -> str:
    """A public key's fingerprint, as ``ssh-keygen -l`` prints it."""
    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def registered(folder: Path) -> dict[str, PublicKey]:
    """The keys in ``folder`` by their names, sorted.

    Raises:
        ConfigError: the folder is not there, or holds a file that is not an EC public key, a name
            that no participant may have, or one key under two names.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder with the nodes' public keys, NAME{SUFFIX}")
    keys = {path.stem: read_public_key(path) for path in sorted(folder.glob(f"*{SUFFIX}"))}
    names: dict[str, str] = {}
    for name, key in keys.items():
        try:
            check_id(name)
        except ValueError as error:
            raise ConfigError(f"{folder / name}{SUFFIX}: {error}") from error
        other = names.setdefault(fingerprint(key), name)
        if other != name:
            raise ConfigError(f"{folder}: {other} and {name} have one key; remove one of them")
    return keys


def register(folder: Path, name: str, key: PublicKey, *, replace: bool = False) -> None:
    """Add a node's key to ``folder``; a process that watches it lets the node in within seconds.

    Raises:
        ConfigError: the name has another key and ``replace`` is not set, or the key another name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for other, known in registered(folder).items():
        same = fingerprint(known) == fingerprint(key)
        if same and other != name:
            raise ConfigError(f"{folder}: this key is registered for {other}; {name} needs its own")
        if other == name and not same and not replace:
            raise ConfigError(
                f"{folder}: {name} has another key, {fingerprint(known)}; --replace takes the new "
                "one in its place"
            )
    with replaced(folder / f"{name}{SUFFIX}") as beside:
        beside.write_bytes(openssh(key, name))


def revoke(folder: Path, name: str) -> None:
    """Take a node's key out of ``folder``; raises ConfigError where it has none."""
    try:
        (folder / f"{name}{SUFFIX}").unlink()
    except FileNotFoundError as error:
        known = ", ".join(path.stem for path in sorted(folder.glob(f"*{SUFFIX}"))) or "nobody"
        raise ConfigError(f"{folder}: has no key of {name}; it has those of {known}") from error
