"""Keys and certificates as files: private ones are readable by their owner alone."""

import datetime
import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)

from fedphd.common.errors import ConfigError, StartError

# What Flower's own documentation makes for its nodes.
CURVE = ec.SECP384R1()

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def write_private_key(path: Path, key: PrivateKey, form: PrivateFormat) -> None:
    """Write a private key without a password, mode 0600; raises StartError where a file is."""
    _write_new(path, key.private_bytes(Encoding.PEM, form, NoEncryption()), 0o600)


def write_public(path: Path, content: bytes) -> None:
    """Write what anybody may read, mode 0644; raises StartError where a file is."""
    _write_new(path, content, 0o644)


def check_new(path: Path) -> None:
    """Raise StartError where a file is already."""
    if path.exists():
        raise StartError(f"{path} is there already; move it, or name another folder")


def _write_new(path: Path, content: bytes, mode: int) -> None:
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Also if it came in between: a key is never overwritten.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    except OSError as error:
        raise StartError(f"{path}: cannot be written: {error.strerror}") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises ConfigError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate in PEM; raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(read_bytes(path))
    except ValueError as error:
        raise ConfigError(f"{path}: is not a certificate in PEM: {error}") from error


def check_in_date(path: Path) -> None:
    """Raise ConfigError where the certificate at ``path`` has expired, or is not good yet."""
    certificate, now = read_certificate(path), datetime.datetime.now(datetime.UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise ConfigError(f"{path}: has expired on {end:%Y-%m-%d}; have a new one signed")
    if now < begin:
        raise ConfigError(f"{path}: is good from {begin:%Y-%m-%d}; it is {now:%Y-%m-%d} here")


def check_fits(certificate: Path, key: Path, authority: Path) -> None:
    """Raise ConfigError unless a server can use its certificate, its key and the authority's."""
    private = _read_private_key(key, f"superlink.ssl_keyfile = {key}")
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    of_certificate = read_certificate(certificate).public_key()
    if private.public_key().public_bytes(*form) != of_certificate.public_bytes(*form):
        raise ConfigError(
            f"superlink.ssl_keyfile = {key} is not the key of superlink.ssl_certfile = "
            f"{certificate}; name the two that were made together"
        )
    read_certificate(authority)


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
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{name}: is not a private key in PEM") from error


def read_public_key(path: Path) -> PublicKey:
    """A node's public key, as ``ssh-keygen -t ecdsa`` writes it; raises ConfigError."""
    try:
        key = load_ssh_public_key(read_bytes(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: is not an OpenSSH public key") from error
    if not isinstance(key, PublicKey):
        raise ConfigError(f"{path}: is not an EC key; make one with `fedphd keys request`")
    return key


def openssh(key: PublicKey, name: str) -> bytes:
    """A public key as one line of OpenSSH, with the node's name as its comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode()
