"""A network of its own for one process of a test, whose link to the others can be cut and slowed.

A network namespace with a pair of virtual Ethernet devices: ``cut`` loses every packet, as a cable
does that is pulled out, and connections stay open on both sides.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Beside another process that has links, with addresses of their own.
_numbers = itertools.count(os.getpid())


def missing() -> str:
    """Why this machine has no such links; "" if it has."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"{' and '.join(absent)} (package iproute2) is not installed"
    # A container's root may lack the capability.
    made = _call("ip", "netns", "add", probe := f"fedphd-{os.getpid()}", check=False)
    if made.returncode:
        return f"network namespaces do not work here: {made.stderr.strip()}"
    _call("ip", "netns", "delete", probe)
    return ""


class Link:
    """A namespace's one link to the rest of this machine; ``linked`` makes it.

    Attributes:
        outside, inside: addresses of the link's two ends.
        prefix: makes a command run inside.
    """

    def __init__(self, namespace: str, number: int) -> None:
        self._name = namespace
        # Names of devices have 15 characters at most.
        self._device = f"fp{os.getpid() % 10**7}o{number}"
        # RFC 2544 sets this range apart for tests of networks.
        first = f"198.18.{number}"
        self.outside, self.inside = f"{first}.1", f"{first}.2"
        self.prefix = ("ip", "netns", "exec", namespace)
        self._connect()

    def _connect(self) -> None:
        inner = f"{self._device}i"
        pair = ("type", "veth", "peer", "name", inner, "netns", self._name)
        _call("ip", "link", "add", self._device, *pair)
        _call("ip", "address", "add", f"{self.outside}/30", "dev", self._device)
        _call("ip", "link", "set", self._device, "up")
        within = ("ip", "-n", self._name)
        _call(*within, "address", "add", f"{self.inside}/30", "dev", inner)
        _call(*within, "link", "set", inner, "up")
        _call(*within, "link", "set", "lo", "up")

    def cut(self) -> None:
        """Lose every packet in both directions, until ``slow`` or ``mend``."""
        # A token bucket that is smaller than any packet.
        self._shape("rate", "1kbit", "burst", "10", "latency", "1ms")

    def slow(self, megabits_per_s: float) -> None:
        """Let so much pass in each direction."""
        # A queue of 0.4 s, as of a modem; bursts of a few packets.
        self._shape("rate", f"{megabits_per_s}mbit", "burst", "32kb", "latency", "400ms")

    def mend(self) -> None:
        """Let everything pass at full speed."""
        for within, device in self._ends():
            _call("tc", *within, "qdisc", "delete", "dev", device, "root")

    def sent_bytes(self) -> int:
        """Bytes that came out of the namespace so far."""
        counter = Path(f"/sys/class/net/{self._device}/statistics/rx_bytes")
        return int(counter.read_text("ascii"))

    def _shape(self, *bucket: str) -> None:
        for within, device in self._ends():
            _call("tc", *within, "qdisc", "replace", "dev", device, "root", "tbf", *bucket)

    def _ends(self) -> list[tuple[tuple[str, ...], str]]:
        return [((), self._device), (("-n", self._name), f"{self._device}i")]


@contextmanager
def linked() -> Iterator[Link]:
    """A new namespace, whose link goes with it."""
    number = next(_numbers) % 256
    name = f"fedphd-{os.getpid()}-{number}"
    _call("ip", "netns", "add", name)
    try:
        yield Link(name, number)
    finally:
        _call("ip", "netns", "delete", name)


def _call(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done
