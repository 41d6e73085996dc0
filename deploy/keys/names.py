"""Names and hosts of participants, of which those in a site's request are somebody else's words."""

import ipaddress
import re
from collections.abc import Iterable

from fedphd.common.config.roles import check_id

# Of a DNS name; underscores are usual among containers, though not in DNS.
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_LONGEST_NAME = 253
# A person reads them all before a request is signed.
MOST_HOSTS = 32
_LONGEST_SHOWN = 80


def shown(text: str) -> str:
    """Somebody else's text, quoted, as a terminal may print it.

    Control characters could hide what stands before them, and letters of other alphabets look like
    ours.
    """
    return ascii(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}...")


def check_name(value: str) -> str:
    """Return ``value`` if it may name a participant; raise ValueError, fit to print, otherwise."""
    try:
        return check_id(value)
    except ValueError as error:
        raise ValueError(
            f"{shown(value)} is not a valid name; use 1 to 64 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        ) from error


def check_host(value: str) -> str:
    """Return the DNS name or IP address ``value`` as a certificate has it.

    Raises:
        ValueError: it is neither, or nobody could reach a server there.
    """
    try:
        address = ipaddress.ip_address(value)
    except ValueError as error:
        if _is_name(value):
            return value
        raise ValueError(
            f"{shown(value)} is not a host; write a DNS name, such as edge-0.example.org, or an IP "
            "address: without scheme, port, brackets, blanks or wildcards"
        ) from error
    if address.is_unspecified or address.is_multicast or "%" in value:
        raise ValueError(
            f"{shown(value)} is not an address at which others reach a server; write the one that "
            "they connect to"
        )
    return str(address)


def checked_hosts(hosts: Iterable[str]) -> tuple[str, ...]:
    """The hosts of one server, each as ``check_host`` returns it.

    Raises:
        ValueError: one of them is none or is named twice, or they are too many to be read.
    """
    checked = tuple(check_host(host) for host in hosts)
    for number, host in enumerate(checked):
        if host.lower() in (other.lower() for other in checked[:number]):
            raise ValueError(f"host {host} is named twice; name each host once")
    if len(checked) > MOST_HOSTS:
        raise ValueError(f"{len(checked)} hosts are named; name {MOST_HOSTS} at the most")
    return checked


def _is_name(value: str) -> bool:
    labels = value.split(".")
    # The last of a name is never a number: that would be an address, and this one is none.
    whole = len(value) <= _LONGEST_NAME and not labels[-1].isdecimal()
    return whole and all(_LABEL.fullmatch(label) for label in labels)
