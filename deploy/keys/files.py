"""Keys and certificates as files: private ones are readable by their owner alone."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedphd.common.errors import ConfigError, StartError

# What Flower's own documentation makes for its nodes.
CURVE = ec.SECP384R1()

# A server's own launcher reaches it there.
LAUNCHER = "127.0.0.1"

# Why a certificate is not good yet.
CLOCKS: Final = "this machine's clock or the signer's is wrong: correct it"

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
# What the library raises for bytes that it cannot read, beside what it is documented to raise.
UNREADABLE = (
    ValueError,
    KeyError,
    NotImplementedError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


def write_private_key(path: Path, key: PrivateKey, form: PrivateFormat) -> None:
    """Write a private key without a password, mode 0600.

    Raises:
        StartError: a file is there already, or it cannot be written; nothing of it is left then.
    """
    _write_new(path, key.private_bytes(Encoding.PEM, form, NoEncryption()), 0o600)


def write_public(path: Path, content: bytes) -> None:
    """Write what anybody may read, mode 0644.

    Raises:
        StartError: a file is there already, or it cannot be written; nothing of it is left then.
    """
    _write_new(path, content, 0o644)


def check_new(path: Path) -> None:
    """Raise StartError where a file is already."""
    # Also a link that leads nowhere.
    if path.exists() or path.is_symlink():
        raise StartError(f"{path} is there already; move it, or name another folder")


def unwritable(path: Path, error: OSError) -> StartError:
    """The error that says that ``path`` cannot be written, and what to do."""
    why = error.strerror or str(error)
    return StartError(
        f"{path}: cannot be written: {why}; make room, or choose a folder that can be written to"
    )


@contextmanager
def removed_on_failure() -> Iterator[list[Path]]:
    """Yield a list of what was made, which is removed if the block raises.

    Half a set of keys helps nobody, and would be in the way of the next try.
    """
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise


def _write_new(path: Path, content: bytes, mode: int) -> None:
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Also if it came in between: a key is never overwritten.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with removed_on_failure() as made:
            made.append(path)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                # Some disks say only now that they are full.
                os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises ConfigError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate in PEM, the first in the file; raises ConfigError."""
    return _read_certificates(path)[0]


def read_latest(path: Path) -> x509.Certificate:
    """Of the authorities' certificates in a file that which is good for longest.

    Raises ConfigError where the file holds none.
    """
    return max(_read_certificates(path), key=lambda found: found.not_valid_after_utc)


def _read_certificates(path: Path) -> list[x509.Certificate]:
    """All in the file, of which the first has a key that can be read; raises ConfigError."""
    try:
        found = x509.load_pem_x509_certificates(read_bytes(path))
        found[0].public_key()
    except UNREADABLE as error:
        raise ConfigError(f"{path}: is not a certificate in PEM: {error}") from error
    return found


def hosts_of(path: Path) -> list[str]:
    """The hosts that the certificate at ``path`` is good for; raises ConfigError."""
    certificate = read_certificate(path)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    except UNREADABLE as error:
        raise ConfigError(f"{path}: its hosts cannot be read: {error}") from error
    return [str(name.value) for name in names]


def check_in_date(path: Path) -> None:
    """Raise ConfigError where the certificate at ``path`` has expired, or is not good yet."""
    certificate, now = read_certificate(path), datetime.datetime.now(datetime.UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise ConfigError(f"{path}: has expired on {end:%Y-%m-%d}; have a new one signed")
    if now < begin:
        raise ConfigError(f"{path}: {too_early(begin, now)}; {CLOCKS}")


def too_early(begin: datetime.datetime, now: datetime.datetime) -> str:
    """That a certificate is not good yet."""
    return f"is good from {begin:%Y-%m-%d %H:%M} UTC; it is {now:%Y-%m-%d %H:%M} UTC here"


def check_fits(certificate: Path, key: Path, authority: Path) -> None:
    """Raise ConfigError unless a server can use its certificate, its key and the authority's."""
    check_key(certificate, key)
    check_issued(certificate, authority)
    check_loopback(certificate)


def check_key(certificate: Path, key: Path) -> None:
    """Raise ConfigError unless ``key`` is that of the server's ``certificate``."""
    private = _read_private_key(key, f"superlink.ssl_keyfile = {key}")
    if not same_key(private.public_key(), read_certificate(certificate).public_key()):
        raise ConfigError(
            f"superlink.ssl_keyfile = {key} is not the key of superlink.ssl_certfile = "
            f"{certificate}; name the two that were made together"
        )


def check_issued(certificate: Path, authority: Path) -> None:
    """Raise ConfigError unless ``authority``, in date itself, signed the server's ``certificate``.

    A server whose certificate it did not sign starts, and then nobody talks to it: not even its own
    launcher, which only finds out by waiting.
    """
    last, *between = _read_certificates(certificate)
    # A server may send what leads from its own certificate to the authority's.
    for link in between:
        if _signed(last, link):
            last = link
    signers = [root for root in _read_certificates(authority) if _signed(last, root)]
    if not signers:
        raise ConfigError(
            f"superlink.ssl_certfile = {certificate} is not signed by superlink.ssl_ca_certfile = "
            f"{authority}; name the authority that signed it, or have it signed by this one "
            "(`fedphd keys sign`)"
        )
    end = max(root.not_valid_after_utc for root in signers)
    if end < datetime.datetime.now(datetime.UTC):
        raise ConfigError(
            f"superlink.ssl_ca_certfile = {authority}: has expired on {end:%Y-%m-%d}; make a new "
            "authority (`fedphd keys authority`) and have the servers' certificates signed by it"
        )


def check_loopback(certificate: Path) -> None:
    """Raise ConfigError unless a server's own process can reach it with its ``certificate``."""
    hosts = hosts_of(certificate)
    if LAUNCHER not in hosts:
        raise ConfigError(
            f"superlink.ssl_certfile = {certificate} is good for {', '.join(hosts) or 'no host'}, "
            f"and not for {LAUNCHER}, at which this process reaches its own SuperLink; have one "
            "signed that names it too, as `fedphd keys sign` does"
        )


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (*UNREADABLE, TypeError, InvalidSignature):
        return False
    return True


def same_key(one: PublicKeyTypes, other: PublicKeyTypes) -> bool:
    """Whether two public keys are one."""
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    return one.public_bytes(*form) == other.public_bytes(*form)


def read_signing_key(path: Path) -> PrivateKey:
    """An EC private key in PEM, such as an authority's; raises ConfigError."""
    key = _read_private_key(path, str(path))
    if not isinstance(key, PrivateKey):
        raise ConfigError(f"{path}: is not an EC key; make one with `fedphd keys authority`")
    return key


def _read_private_key(path: Path, name: str) -> PrivateKeyTypes:
    """A private key of any kind in PEM; raises ConfigError that calls it ``name``."""
    try:
        return load_pem_private_key(read_bytes(path), password=None)
    except TypeError as error:
        raise ConfigError(
            f"{name} has a password, for which nobody could be asked; name a key without one"
        ) from error
    except UNREADABLE as error:
        raise ConfigError(f"{name}: is not a private key in PEM") from error


def read_node_key(path: Path) -> PrivateKey:
    """A node's private key, as ``ssh-keygen -t ecdsa`` writes it; raises ConfigError."""
    try:
        key = load_ssh_private_key(read_bytes(path), password=None)
    except TypeError as error:
        raise ConfigError(
            f"{path}: has a password, for which nobody could be asked; remove it with "
            "`ssh-keygen -p`"
        ) from error
    except UNREADABLE as error:
        raise ConfigError(f"{path}: is not an OpenSSH private key") from error
    if not isinstance(key, PrivateKey):
        raise ConfigError(f"{path}: is not an EC key; make one with `fedphd keys request`")
    return key


def read_public_key(path: Path) -> PublicKey:
    """A node's public key, as ``ssh-keygen -t ecdsa`` writes it; raises ConfigError."""
    try:
        key = load_ssh_public_key(read_bytes(path))
    except UNREADABLE as error:
        raise ConfigError(f"{path}: is not an OpenSSH public key") from error
    if not isinstance(key, PublicKey):
        raise ConfigError(f"{path}: is not an EC key; make one with `fedphd keys request`")
    return key


def openssh(key: PublicKey, name: str) -> bytes:
    """A public key as one line of OpenSSH, with the node's name as its comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode()
