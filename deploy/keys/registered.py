"""The nodes that a SuperLink lets in: a folder with a public key, ``NAME.pub``, for each name."""

import base64
import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedphd.common.errors import ConfigError
from fedphd.common.files import replaced
from fedphd.deploy.keys.files import PublicKey, openssh, read_public_key, unwritable
from fedphd.deploy.keys.names import check_name, shown

SUFFIX = ".pub"


def fingerprint(key: PublicKey) -> str:
    """A public key's fingerprint, as ``ssh-keygen -l`` prints it."""
    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def registered(folder: Path) -> dict[str, PublicKey]:
    """The keys in ``folder`` by their names, sorted.

    Raises:
        ConfigError: the folder is not there or cannot be read, or it holds a file that is not an EC
            public key, a name that no participant may have, or one key under two names.
    """
    files = _files(folder)
    for name, path in files.items():
        try:
            check_name(name)
        except ValueError as error:
            raise ConfigError(
                f"{folder}: {shown(path.name)} names nobody: {error}; rename or remove the file"
            ) from error
    keys = {name: read_public_key(path) for name, path in files.items()}
    names: dict[str, str] = {}
    for name, key in keys.items():
        other = names.setdefault(fingerprint(key), name)
        if other != name:
            raise ConfigError(f"{folder}: {other} and {name} have one key; remove one of them")
    return keys


def _files(folder: Path) -> dict[str, Path]:
    """The files of keys by their names, sorted, whatever these are; raises ConfigError."""
    try:
        # Not a glob, which takes a folder that cannot be read for an empty one.
        found = sorted(folder / name for name in os.listdir(folder) if name.endswith(SUFFIX))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{folder}: is not a folder with the nodes' public keys, NAME{SUFFIX}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read: {error.strerror}") from error
    return {path.name.removesuffix(SUFFIX): path for path in found}


def register(folder: Path, name: str, key: PublicKey, *, replace: bool = False) -> None:
    """Add a node's key to ``folder``; a process that watches it lets the node in within seconds.

    Raises:
        ConfigError: no participant may have the name, it has another key and ``replace`` is not
            set, or the key another name.
        StartError: the file cannot be written; the folder is as it was then.
    """
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    for other, known in registered(folder).items():
        same = fingerprint(known) == fingerprint(key)
        if same and other != name:
            raise ConfigError(f"{folder}: this key is registered for {other}; {name} needs its own")
        if other == name and not same and not replace:
            raise ConfigError(
                f"{folder}: {name} has another key, {fingerprint(known)}; --replace takes the new "
                "one in its place"
            )
    path = folder / f"{name}{SUFFIX}"
    try:
        with replaced(path) as beside:
            beside.write_bytes(openssh(key, name))
    except OSError as error:
        raise unwritable(path, error) from error


def revoke(folder: Path, name: str) -> None:
    """Take a node's key out of ``folder``.

    Raises:
        ConfigError: the folder is not there, or has no key of that name.
        StartError: the file cannot be removed.
    """
    # Also what could not be registered now; nothing outside the folder has such a name.
    known = _files(folder)
    try:
        known.pop(name).unlink()
    except (KeyError, FileNotFoundError) as error:
        others = ", ".join(_plain(other) for other in known) or "nobody"
        raise ConfigError(
            f"{folder}: has no key of {_plain(name)}; it has those of {others}"
        ) from error
    except OSError as error:
        raise unwritable(folder, error) from error


def _plain(name: str) -> str:
    """A name as it is, if a participant may have it."""
    try:
        return check_name(name)
    except ValueError:
        return shown(name)
