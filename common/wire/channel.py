"""gRPC channels to a SuperLink, with options that Flower's own function does not set."""

import ipaddress
from collections.abc import Sequence
from typing import Final

import grpc

# The most that gRPC can count: as in Flower's own channels where it is bytes, and never where time.
_MOST: Final = 2**31 - 1
_LIMITS: Final = (
    "grpc.max_send_message_length",
    "grpc.max_receive_message_length",
    # By default gRPC gives up a connection after half an hour without a call. The next one then
    # needs a certificate that is still in date.
    "grpc.client_idle_timeout_ms",
)


def is_loopback(address: str) -> bool:
    """Whether ``address``, host:port, is this machine's own by its text: no name is looked up."""
    host = address.rpartition(":")[0].strip("[]").lower()
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_channel(
    address: str,
    authority: bytes | None,
    interceptors: Sequence[grpc.UnaryUnaryClientInterceptor] = (),
) -> grpc.Channel:
    """A channel to ``address``, host:port; without ``authority`` (PEM) in plain text.

    It does not go through a proxy (``http_proxy`` and the like in the environment) to a loopback
    address, which means another machine there.
    """
    options: list[tuple[str, int]] = [(limit, _MOST) for limit in _LIMITS]
    if is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))
    if authority is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        credentials = grpc.ssl_channel_credentials(authority)
        channel = grpc.secure_channel(address, credentials, options=options)
    return grpc.intercept_channel(channel, *interceptors)
