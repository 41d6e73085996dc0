"""A Ray cluster of several machines, on which a simulation's clients train."""

import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

from fedphd.common.errors import StartError

# In a process of its own: Ray stays connected, and prints, where it is imported.
_LOOK: Final = """
import json, ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
nodes = [one["Resources"] for one in ray.nodes() if one["Alive"]]
print(json.dumps([[one.get("CPU", 0), one.get("GPU", 0)] for one in nodes]))
"""
_LOOK_S: Final = 60.0
_CONNECT_S: Final = 5.0


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster.

    Attributes:
        address: host:port of its head.
        nodes: its machines, or rather Ray's nodes, with cores.
        cpus: cores of all of them, as far as Ray may use them.
        gpus: likewise.
    """

    address: str
    nodes: int
    cpus: int
    gpus: int

    @classmethod
    def at(cls, address: str) -> "Cluster":
        """The cluster whose head is at ``address``; raises StartError if there is none."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise StartError(
                f"--ray-address {address}: not host:port, which `ray start --head --port 6379` "
                "prints; it may come from the environment's RAY_ADDRESS"
            )
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        except OSError as error:
            raise StartError(
                f"--ray-address {address}: no Ray cluster answers there ({error}); start its head "
                f"by `ray start --head --port {port}`"
            ) from error
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _LOOK, address],
                capture_output=True,
                text=True,
                timeout=_LOOK_S,
            )
        except subprocess.TimeoutExpired as error:
            raise StartError(
                f"--ray-address {address}: no Ray cluster within {_LOOK_S:g} s; look at "
                f"`ray status --address {address}`"
            ) from error
        if done.returncode:
            # Another version of Ray or Python, most likely: it says so last.
            why = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise StartError(f"--ray-address {address}: cannot join the cluster: {why[0]}")
        found = [node for node in json.loads(done.stdout.splitlines()[-1]) if node[0] >= 1]
        if not found:
            raise StartError(f"--ray-address {address}: none of the cluster's nodes has a CPU core")
        cpus, gpus = (int(sum(node[i] for node in found)) for i in (0, 1))
        return cls(address, len(found), cpus, gpus)

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPUs" if self.gpus else ""
        return f"Ray at {self.address}: {self.nodes} nodes, {self.cpus} cores{gpus}"
