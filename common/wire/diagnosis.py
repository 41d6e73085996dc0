"""Why a SuperLink does not let this node in, in words that name the fix."""

import socket
import ssl
from typing import Final

import grpc

_REACH_S: Final = 3.0
IN_USE: Final = "could not be activated"
# What Flower answers, and what its reader can do about it.
_FIXES: Final = {
    "No SuperNode found with the given public key": (
        "it does not know this node's key, or has revoked it: ask its operator to register the "
        "key (`fedphd keys sign`)"
    ),
    "SuperNode authentication is enabled": (
        "it admits registered keys only: give node.private_key, of a key that its operator has "
        "registered"
    ),
    "Invalid timestamp": "this machine's clock differs from its clock: correct it",
    "Invalid node ID": "it was started anew and does not know this node yet",
    IN_USE: (
        "a process with this key (node.private_key) was there just now: stop it, or wait some 20 s "
        "until its heartbeat is missed; if it is another participant, name the own key"
    ),
}
_MOST: Final = 200


def explain(error: grpc.RpcError, address: str, authority: bytes | None) -> str:
    """A refusal or failed connection in one line; may try the connection again to find out why.

    ``authority`` is the certificate in PEM that the server's is checked against; None: no TLS.
    """
    details = (error.details() or "").splitlines() or [""]
    for text, fix in _FIXES.items():
        if text in details[0]:
            return fix
    if error.code() == grpc.StatusCode.UNAVAILABLE and (why := _why_no_tls(address, authority)):
        return why
    return f"{error.code().name}: {details[0]}"[:_MOST]


def _why_no_tls(address: str, authority: bytes | None) -> str:
    """What is wrong between TLS here and there; "" if that is not what is wrong."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context()
    if authority is not None:
        try:
            context = ssl.create_default_context(cadata=authority.decode("ascii", "replace"))
        except ssl.SSLError:
            return "node.root_certificates holds no certificate in PEM"
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), _REACH_S) as link,
            context.wrap_socket(link, server_hostname=host),
        ):
            secure = True
    except ssl.SSLCertVerificationError as error:
        if authority is None:
            secure = True
        else:
            return (
                f"its certificate is refused: {error.verify_message}; it must be in date, good "
                f"for {host}, and signed by node.root_certificates"
            )
    except ssl.SSLError:
        # It speaks, and not TLS.
        secure = False
    except OSError:
        return ""
    if secure and authority is None:
        return "it speaks TLS, this node plain text: give node.root_certificates"
    if not secure and authority is not None:
        return "it speaks plain text, this node TLS: the server needs superlink.ssl_certfile"
    return ""
