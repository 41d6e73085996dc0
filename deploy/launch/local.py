"""A whole federation on this machine: one cloud, edges and clients as separate processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Final

from fedphd.common.config.links import HealthConfig
from fedphd.common.config.roles import CloudConfig
from fedphd.common.config.text import write_config
from fedphd.common.errors import ConfigError, FedPhDError, Interrupted, StartError
from fedphd.common.events import Verdict, read_verdict, write_verdict
from fedphd.common.files import replaced
from fedphd.common.history.events import merged_lines
from fedphd.deploy.launch.client_data import part_of_data
from fedphd.deploy.launch.runs import EDGE_EVENTS, EVENTS, LOGS, STOPPING, VERDICT, Say, state_of
from fedphd.deploy.launch.superlink import flower_environment, free_ports, start

# -P: not what lies in the current folder under the name of a library.
FEDPHD = (sys.executable, "-P", "-m", "fedphd.deploy.cli")
# Cloud, edges and clients have 10 s together.
STOP_S = 4.0
KILL_S = 2.0
FORWARD_S = 1.0
POLL_S = 0.1
# For Prometheus' file_sd_configs, in the run's folder.
TARGETS = "prometheus-targets.json"
# In the event of an interval that is done.
_INTERVAL: Final = '"event": "interval"'


@dataclass
class Role:
    """One started process, leader of a process group of its own."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    forward: threading.Thread

    def poll(self) -> int | None:
        """Its exit code once it has ended, which ends what it left in its group too."""
        if self.process.returncode is None and self.process.poll() is not None:
            # At once: a group that is empty may be somebody else's later.
            self._kill_group()
        return self.process.returncode

    def send(self, number: int) -> None:
        """Send it a signal, if it has not been seen to have ended."""
        if self.poll() is None:
            # Not Popen's own, which would see an end that happens now, and keep it to itself.
            os.kill(self.process.pid, number)

    def end(self) -> None:
        """Kill it, and what a killed launcher left running, unless that has been done."""
        if self.process.returncode is None:
            self._kill_group()
            self.process.wait()

    def _kill_group(self) -> None:
        # Empty, or of another user since, as where a program changed its own.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


class LocalCluster:
    """Starts ``fedphd cloud``, ``fedphd edge`` and ``fedphd client`` and ends them together.

    Args:
        config: the cloud's configuration; schedule.num_edges (none where topology is flat) and
            schedule.min_clients say how many edges and clients are started.
        data: settings of the clients' data, with dotted keys from ``data.``; the others have
            their defaults, the source that of the preset.
        run_dir: the run's folder; logs go to its folder ``logs``.
        resumed: the run that the folder holds goes on.
        command: the ``fedphd`` command.
        stop_s: seconds that the cloud, and then the edges, have to end when they are asked to.
        kill_s: seconds that the clients have.

    Raises ConfigError if the nodes would need registered keys.
    """

    def __init__(
        self,
        config: CloudConfig,
        *,
        data: Mapping[str, object] = MappingProxyType({}),
        run_dir: Path,
        say: Say,
        resumed: bool = False,
        command: Sequence[str] = FEDPHD,
        stop_s: float = STOP_S,
        kill_s: float = KILL_S,
    ) -> None:
        if config.superlink.node_keys:
            raise ConfigError(
                f"superlink.node_keys = {config.superlink.node_keys}: the nodes of a local "
                "federation have no registered keys; leave it out, or start cloud, edges and "
                "clients one by one"
            )
        self._config, self._data, self._command, self._say = config, data, command, say
        self._run_dir, self._state, self._resumed = run_dir, state_of(run_dir), resumed
        self._began, self._started_s = False, time.time()
        self._patience_s = {"cloud": stop_s, "edge": stop_s, "client": kill_s}
        self.roles: list[Role] = []

    def start(self) -> None:
        """Start all processes at once: any order works, since each waits for its peers."""
        self._state.mkdir(parents=True, exist_ok=True)
        schedule = self._config.schedule
        num_edges = 0 if self._config.topology == "flat" else schedule.num_edges
        names = self._names(num_edges)
        # All at once: ports that are asked for later might be some of these again.
        num_health = len(names) if self._config.health.metrics else 0
        ports = free_ports(1 + num_edges + num_health)
        cloud, *edges = [f"127.0.0.1:{port}" for port in ports[: 1 + num_edges]]
        # The cloud's certificate, which is good for this machine, serves its edges too.
        given = self._config.superlink.model_dump(mode="json", exclude_none=True)
        certificates = {name: path for name, path in given.items() if name.startswith("ssl_")}
        authority = certificates.get("ssl_ca_certfile")
        # Nothing leaves this machine.
        server = {**certificates, "insecure": authority is None}
        node = {"root_certificates": authority} if authority else {"insecure": True}
        health = self._health(
            dict(zip(names, ports[1 + num_edges :] or [0] * len(names), strict=True))
        )
        values = self._config.model_dump(mode="json")
        values["health"] = health["cloud"]
        values["superlink"] |= {**server, "address": cloud}
        values["state_dir"] = str(self._state / "cloud")
        resumed = ["--resume"] if self._resumed else ["--run-dir"]
        # Who started all of them reports, with the edges' events.
        self._start("cloud", values, *resumed, str(self._run_dir), "--no-report")
        for number, address in enumerate(edges):
            name = f"edge-{number}"
            values = {"edge_id": name, "cloud": cloud, "state_dir": str(self._state / name)}
            superlink = {**server, "address": address}
            values |= {"superlink": superlink, "node": node, "health": health[name]}
            self._start(name, values)
        for number in range(schedule.min_clients):
            name = f"client-{number}"
            data = part_of_data(self._config, number, self._data)
            # Flat: the cloud is the only edge that a client knows.
            values = {"client_id": name, "edges": edges or [cloud], "device": self._config.device}
            values["data"] = data.model_dump(mode="json", exclude_none=True)
            values["state_dir"] = str(self._state / name)
            self._start(name, {**values, "node": node, "health": health[name]})

    def _names(self, num_edges: int) -> list[str]:
        """The names of all processes: cloud, edges, clients."""
        edges = [f"edge-{number}" for number in range(num_edges)]
        return ["cloud", *edges, *(f"client-{n}" for n in range(self._config.schedule.min_clients))]

    def _health(self, ports: Mapping[str, int]) -> dict[str, dict[str, object]]:
        """The section ``[health]`` of everybody by name; port 0: a free one of its own choice.

        The cloud keeps an address that it was given. With metrics ``TARGETS`` tells Prometheus of
        all of them.
        """
        own = self._config.health
        addresses: dict[str, str | None] = {
            name: f"127.0.0.1:{port}" for name, port in ports.items()
        }
        if own.address != HealthConfig().address:
            addresses["cloud"] = own.address
        if own.metrics:
            with replaced(self._run_dir / TARGETS) as beside:
                beside.write_text(json.dumps(prometheus_targets(addresses), indent=1), "utf-8")
        return {name: own.model_dump() | {"address": addresses[name]} for name in ports}

    def _start(self, name: str, values: Mapping[str, object], *flags: str) -> None:
        """Start a participant, such as ``edge-0``, with a configuration file of its own."""
        config = write_config(self._state / f"{name}.toml", values)
        log = self._run_dir / LOGS / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as errors:
            process = start(
                [*self._command, name.partition("-")[0], *config, *flags],
                flower_environment(self._state / name / "flwr"),
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        forward = threading.Thread(target=self._forward, args=(process.stdout,), daemon=True)
        forward.start()
        self.roles.append(Role(name, process, log, forward))

    def _forward(self, output: IO[str]) -> None:
        with output:
            for line in output:
                self._say(line.rstrip("\n"))

    def wait(self, stop: threading.Event) -> Verdict:
        """Wait for the cloud's verdict; a process that cannot start ends the whole run."""
        cloud = self.roles[0]
        while cloud.poll() is None:
            if stop.is_set():
                self._say(f"{STOPPING}  {len(self.roles)} processes")
                return Verdict(Interrupted.exit_code, "interrupted")
            for role in self.roles[1:]:
                code = role.poll()
                if code in (ConfigError.exit_code, StartError.exit_code) and not self._has_begun():
                    return Verdict(code, f"{role.name} could not start{_why(role)}")
            time.sleep(POLL_S)
        verdict = read_verdict(self._run_dir / VERDICT)
        # A run without a verdict is not a success; a signal's code is negative.
        code = max(cloud.process.returncode, FedPhDError.exit_code)
        return verdict or Verdict(code, f"cloud ended{_why(cloud)}")

    def _has_begun(self) -> bool:
        """Whether an interval is done: who ends then with a code of its own has started before.

        By its time: of a run that goes on the cloud takes back what its checkpoint does not have.
        """
        if not self._began:
            with suppress(OSError, ValueError, KeyError, StopIteration):
                lines = (self._run_dir / EVENTS).read_text("utf-8").splitlines()
                last = next(line for line in reversed(lines) if _INTERVAL in line)
                self._began = json.loads(last)["time"] >= self._started_s
        return self._began

    def finish(self, within_s: float) -> None:
        """Give edges and clients, who were told that the run is over, time to exit."""
        _wait(self.roles, within_s)

    def stop(self) -> None:
        """End everything that still runs: the cloud, then edges, then clients.

        From the top, or servers would carry on with whoever is left, and report on that.
        """
        # Or Prometheus would miss them. Processes end also where it cannot be removed.
        with suppress(OSError):
            (self._run_dir / TARGETS).unlink()
        for kind, patience_s in self._patience_s.items():
            roles = [role for role in self.roles if role.name.startswith(kind)]
            for role in roles:
                role.send(signal.SIGTERM)
            _wait(roles, patience_s)
            for role in roles:
                role.send(signal.SIGKILL)
        for role in self.roles:
            role.end()
            # The last lines may still be on their way.
            role.forward.join(FORWARD_S)


def prometheus_targets(addresses: Mapping[str, str | None]) -> list[dict[str, object]]:
    """What Prometheus' ``file_sd_configs`` reads, for the address of each role by its name."""
    return [
        {"targets": [address], "labels": {"tier": name.partition("-")[0]}}
        for name, address in addresses.items()
    ]


def _why(role: Role) -> str:
    """The error at the end of the log of a process that exited, or else where the log is."""
    _, ours, text = role.log.read_text("utf-8", "replace").rpartition("fedphd: ")
    return f": {text.strip()}" if ours else f"; see {role.log}"


def _wait(roles: Iterable[Role], within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    left = list(roles)
    while (
        left := [role for role in left if role.poll() is None]
    ) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)


def run_local(
    config: CloudConfig,
    *,
    data: Mapping[str, object] = MappingProxyType({}),
    run_dir: Path,
    stop: threading.Event,
    say: Say,
    resumed: bool = False,
    command: Sequence[str] = FEDPHD,
) -> Verdict:
    """Run a whole federation on loopback and return the cloud's verdict; as ``LocalCluster``."""
    cluster = LocalCluster(
        config, data=data, run_dir=run_dir, say=say, resumed=resumed, command=command
    )
    edges = f"state/edge-*/{EDGE_EVENTS}"
    # Those of a launcher that was killed: its edges begin theirs anew.
    merge_events(run_dir / EVENTS, sorted(run_dir.glob(edges)))
    try:
        cluster.start()
        verdict = cluster.wait(stop)
        if not stop.is_set():
            cluster.finish(10.0)
    except OSError as error:
        verdict = Verdict(StartError.exit_code, f"cannot start a process: {error}")
    finally:
        cluster.stop()
        merge_events(run_dir / EVENTS, sorted(run_dir.glob(edges)))
    if verdict.exit_code:
        # The cloud only knows that it was stopped.
        write_verdict(run_dir / VERDICT, verdict)
    return verdict


def merge_events(path: Path, others: Iterable[Path]) -> None:
    """Put the events of other logs among those at ``path``, by time, as in a simulation's log.

    Those that are there already are left out.
    """
    if not path.exists():
        return
    text = "".join(f"{json.dumps(line)}\n" for line in merged_lines((path, *others)))
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")
