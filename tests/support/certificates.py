"""A certificate authority of a test, and a server certificate for this machine."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fedphd.deploy.keys.authority import Authority, pem
from fedphd.deploy.keys.files import CURVE, PrivateFormat, write_private_key, write_public

DAYS = 2


def write_certificates(folder: Path) -> dict[str, str]:
    """Write ``ca.pem``, ``server.pem`` and ``server.key``; return the SuperLink's settings."""
    authority = Authority.new(name="FedPhD test CA", days=DAYS)
    key = ec.generate_private_key(CURVE)
    authority.write(folder)
    write_private_key(folder / "server.key", key, PrivateFormat.PKCS8)
    write_public(
        folder / "server.pem", pem(authority.certify("server", key.public_key(), [], days=DAYS))
    )
    return {
        "superlink.ssl_certfile": str(folder / "server.pem"),
        "superlink.ssl_keyfile": str(folder / "server.key"),
        "superlink.ssl_ca_certfile": str(folder / "ca.pem"),
    }
