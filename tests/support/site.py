"""A federation of real processes that a test starts one by one, each with a file of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from support.processes import Processes, Program, free_port
from support.tiny import CLASSES_PER_CLIENT, TINY, events, write_toml

EDGES = ("edge-0", "edge-1")
CLIENTS = ("client-0", "client-1", "client-2")
NUM_PARTS = 3


@dataclass
class Site:
    """``fedphd cloud``, ``edge`` and ``client`` with a configuration file each.

    Args:
        processes: starts them.
        run: dotted settings of the cloud, on top of ``TINY``.
        edges: names of the edges.
        keys: folder of ``fedphd keys dev``; None: everything in plain text, and anybody may join.
        hosts: the address that a cloud or an edge listens at, by its name; others on loopback.
        folders: where a participant's state lies, and the "run", if not in the test's folder.
        prefixes: what the command of a participant begins with, by its name.
    """

    processes: Processes
    run: dict[str, Any] = field(default_factory=dict)
    edges: tuple[str, ...] = EDGES
    keys: Path | None = None
    hosts: dict[str, str] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    prefixes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.processes.folder
        self.ports = {name: free_port() for name in ("cloud", *self.edges)}

    def address(self, name: str) -> str:
        """Where a cloud or an edge listens."""
        return f"{self.hosts.get(name, '127.0.0.1')}:{self.ports[name]}"

    def start(self, name: str, **settings: Any) -> Program:
        """Start a role by its name, such as ``client-0``; ``settings`` win over the usual."""
        kind = name.partition("-")[0]
        # As a supervisor starts a cloud.
        extra = ["--run-dir", str(self.run_dir), "--go-on"] if kind == "cloud" else []
        config = self.write(name, **settings)
        self.programs[name] = self.processes.start(
            kind, "--config", str(config), *extra, prefix=self.prefixes.get(name, ())
        )
        return self.programs[name]

    def begin(self) -> Self:
        """Start everybody, and wait until the last edge has finished its first round."""
        for name in (*self.edges, *CLIENTS, "cloud"):
            self.start(name)
        self.programs[self.edges[-1]].wait_line(r"interval +1 round 1")
        return self

    def check_end(self) -> None:
        """Everybody ends with 0 and leaves nothing, and every interval is there once."""
        codes = {name: program.wait_exit() for name, program in self.programs.items()}
        assert codes == dict.fromkeys(codes, 0), self.programs["cloud"].text
        finished = [event["interval"] for event in self.events("interval")]
        assert finished == list(range(1, self.run["schedule.intervals"] + 1))
        self.processes.wait_gone()

    def start_stock(self, name: str, edge: str, **settings: Any) -> Program:
        """Start Flower's own node as a client of ``edge``."""
        config = self.write(name, **settings)
        self.programs[name] = self.processes.start_flower(
            "flower-supernode",
            "--insecure",
            *("--superlink", self.address(edge)),
            *("--clientappio-api-address", "127.0.0.1:0"),
            *("--node-config", f'config="{config}"'),
        )
        return self.programs[name]

    def write(self, name: str, **settings: Any) -> Path:
        """Write a role's configuration file."""
        kind = name.partition("-")[0]
        values = {**getattr(self, f"_{kind}")(name), **settings}
        return write_toml(self.folder / f"{name}.toml", values)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.folder_of("run")

    def folder_of(self, name: str) -> Path:
        """Where a participant's state lies."""
        return self.folders.get(name, self.folder / name)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The cloud's events of a kind."""
        return [e for e in events(self.run_dir / "metrics.jsonl") if e["event"] == kind]

    def rounds(self, edge: str) -> list[dict[str, Any]]:
        """An edge's finished rounds."""
        return [e for e in events(self.folder_of(edge) / "events.jsonl") if e["event"] == "round"]

    def _cloud(self, name: str) -> dict[str, Any]:
        nodes = "edges" if self.edges else "clients"
        own = {**self._server(name, nodes), "state_dir": str(self.folder_of(name))}
        return {**TINY, **self.run, **own}

    def _edge(self, name: str) -> dict[str, Any]:
        return {
            "edge_id": name,
            "cloud": self.address("cloud"),
            **self._server(name, "clients"),
            **self._node(name),
            "state_dir": str(self.folder_of(name)),
        }

    def _client(self, name: str) -> dict[str, Any]:
        return {
            "client_id": name,
            **self._node(name),
            "state_dir": str(self.folder_of(name)),
            "edges": [self.address(edge) for edge in self.edges or ("cloud",)],
            "data.partition.num_partitions": NUM_PARTS,
            "data.partition.classes_per_partition": CLASSES_PER_CLIENT,
            "data.partition.partition_id": int(name[-1]),
        }

    def _server(self, name: str, nodes: str) -> dict[str, Any]:
        if self.keys is None:
            protection: dict[str, Any] = {"superlink.insecure": True}
        else:
            protection = {
                "superlink.ssl_certfile": str(self.keys / f"{name}.pem"),
                "superlink.ssl_keyfile": str(self.keys / f"{name}.key"),
                "superlink.ssl_ca_certfile": str(self.keys / "ca.pem"),
                "superlink.node_keys": str(self.keys / nodes),
            }
        return {"superlink.address": self.address(name), **protection}

    def _node(self, name: str) -> dict[str, Any]:
        if self.keys is None:
            return {"node.insecure": True}
        authority, key = str(self.keys / "ca.pem"), str(self.keys / f"{name}-node")
        return {"node.root_certificates": authority, "node.private_key": key}
