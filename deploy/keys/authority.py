"""A certificate authority of one federation, which signs the certificates of its servers."""

import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedphd.common.errors import ConfigError
from fedphd.deploy.keys.files import (
    CURVE,
    LAUNCHER,
    PrivateKey,
    PublicKey,
    check_in_date,
    check_new,
    read_certificate,
    read_signing_key,
    removed_on_failure,
    same_key,
    write_private_key,
    write_public,
)
from fedphd.deploy.keys.names import shown

CERTIFICATE = "ca.pem"
KEY = "ca.key"
AUTHORITY_DAYS = 3650
SERVER_DAYS = 365
# Ten years: nothing takes a certificate back before its end.
MOST_DAYS = 3650
LOOPBACK = ("localhost", LAUNCHER)
# X.509 allows no longer common name.
_LONGEST_NAME = 64
# Clocks differ.
_EARLIER = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Authority:
    """A certificate that servers' certificates are checked against, and its private key."""

    certificate: x509.Certificate
    key: PrivateKey

    @classmethod
    def new(cls, *, name: str = "FedPhD CA", days: int = AUTHORITY_DAYS) -> Self:
        """Make one, with the common name ``name``, good for ``days``.

        Raises:
            ConfigError: a certificate cannot have the name, or is not to last for so long.
        """
        if not (name.strip() and name.isprintable() and len(name) <= _LONGEST_NAME):
            raise ConfigError(
                f"--name {shown(name)}: cannot be an authority's name; use 1 to {_LONGEST_NAME} "
                "characters that can be printed"
            )
        key = ec.generate_private_key(CURVE)
        public, usage = key.public_key(), _usage(signs_certificates=True)
        certificate = (
            _begin(name_of(name), public, days)
            .issuer_name(name_of(name))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    def write(self, folder: Path) -> None:
        """Store it as ``ca.key`` and ``ca.pem`` in ``folder``.

        Raises:
            StartError: one of them is there already or cannot be written; then neither is made.
        """
        for name in (KEY, CERTIFICATE):
            check_new(folder / name)
        with removed_on_failure() as made:
            write_private_key(folder / KEY, self.key, PrivateFormat.PKCS8)
            made.append(folder / KEY)
            write_public(folder / CERTIFICATE, pem(self.certificate))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The one in ``folder``.

        Raises:
            ConfigError: a file cannot be read, the two do not belong together, or it has expired.
        """
        certificate, key = read_certificate(folder / CERTIFICATE), read_signing_key(folder / KEY)
        if not same_key(certificate.public_key(), key.public_key()):
            raise ConfigError(
                f"{folder / KEY} is not the key of {folder / CERTIFICATE}; bring back the two that "
                "`fedphd keys authority` made together"
            )
        check_in_date(folder / CERTIFICATE)
        return cls(certificate, key)

    def certify(
        self, name: str, key: PublicKey, hosts: Iterable[str], *, days: int = SERVER_DAYS
    ) -> x509.Certificate:
        """A certificate of the server ``name`` with this key, good for ``hosts`` and loopback.

        It lasts for so many ``days``, but no longer than the authority.

        Raises ConfigError where it is not to last for so many ``days``.
        """
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        return (
            _begin(name_of(name), key, days, until=self.certificate.not_valid_after_utc)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(alternative_names(dict.fromkeys([*hosts, *LOOPBACK])), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self.key, hashes.SHA256())
        )


def name_of(text: str) -> x509.Name:
    """A distinguished name that is only a common name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def alternative_names(hosts: Iterable[str]) -> x509.SubjectAlternativeName:
    """Host names and IP addresses as a certificate has them."""
    return x509.SubjectAlternativeName([_general_name(host) for host in hosts])


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate as text."""
    return certificate.public_bytes(Encoding.PEM)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _begin(
    subject: x509.Name, key: PublicKey, days: int, *, until: datetime.datetime | None = None
) -> x509.CertificateBuilder:
    """What every certificate begins with; it is good for so many days, at most ``until`` then."""
    if days > MOST_DAYS:
        raise ConfigError(
            f"--days {days}: a certificate is good for {MOST_DAYS} days at the most; give fewer, "
            "and have a new one signed in time"
        )
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(end if until is None else min(end, until))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
