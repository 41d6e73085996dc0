"""Start, wait for, submit to and stop a stock ``flower-superlink``."""

import ctypes
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from fedphd.common.allocator import allocator_environment
from fedphd.common.config.links import SuperLinkConfig
from fedphd.common.config.text import flower_pairs, to_toml
from fedphd.common.errors import FedPhDError, StartError
from fedphd.deploy.launch.credentials import Expiry, check_server
from fedphd.deploy.launch.keyring import KeyRing
from fedphd.deploy.launch.leftovers import Processes, writing_to
from fedphd.deploy.launch.processes import descendants, end
from fedphd.deploy.launch.versions import check_flower

READY_S = 60.0
SUBMIT_S = 120.0
TRAFFIC_S = 60.0
LOG_S = 20.0
STOP_S = 3.0
CHILDREN_S = 1.0
PROGRAMS = Path(sys.executable).parent
BUNDLE = Path(__file__).parents[1] / "bundle"
# Linux begins at 32,768, others at 49,152.
_NEVER_GIVEN = range(20_000, 32_768)
_PR_SET_PDEATHSIG = 1
_RAY_ADDRESS = "RAY_ADDRESS"
_RAY_FREES = "RAY_free_objects_batch_size"
_RAY_NICENESS = "RAY_worker_niceness"
_JSON = ("--format", "json")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def flower_environment(home: Path) -> dict[str, str]:
    """Environment for Flower's processes and ours: a home of their own, no calls home.

    They reach one another without a proxy, and import what is installed, whatever lies in the
    current folder.
    """
    # Flower's modules set it, also in a process that only imports them; a SuperLink would then keep
    # quiet about handshakes that failed.
    left_out = {"GRPC_VERBOSITY"} if os.environ.get("GRPC_VERBOSITY") == "error" else set()
    # Jupyter and some CI set them; `flwr --format json` would then colour what is read here.
    left_out |= {"FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"}
    return {
        **{key: value for key, value in os.environ.items() if key not in left_out},
        **allocator_environment(),
        **_no_proxies(os.environ),
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # gRPC restarts its threads in a forked child. On a busy machine this killed one child in
        # eight before it became Ray's server: "Timed out waiting for file ...
        # gcs_server_port". Flower and Ray only fork to start programs, which need no gRPC.
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        # By default Ray frees the objects in its store once a second or a hundred at a time. Here
        # each is a network, and all of them stay mapped into the ServerApp's process until then.
        _RAY_FREES: os.environ.get(_RAY_FREES, "1"),
        # By default Ray's workers, which are the clients, give way to every other process: beside
        # other work they answer too late.
        _RAY_NICENESS: os.environ.get(_RAY_NICENESS, "0"),
        # At INFO a SuperLink logs a line whenever a node asks for messages.
        "FLWR_LOG_LEVEL": os.environ.get("FLWR_LOG_LEVEL", "WARNING"),
        "PATH": f"{PROGRAMS}{os.pathsep}" + os.environ.get("PATH", ""),
        "PYTHONUNBUFFERED": "1",
        # `python -m` and `python -c` would import what lies in the current folder, such as a
        # random.py of the user's, in place of the library's.
        "PYTHONSAFEPATH": "1",
    }


def _no_proxies(given: Mapping[str, str]) -> dict[str, str]:
    """Variables by which no proxy is asked for this machine's own ports, beside what is given."""
    named = given.get("no_proxy") or given.get("NO_PROXY") or ""
    # Others than gRPC take "*" alone for all hosts.
    others = named if named.strip() == "*" else _with_loopback(named)
    # gRPC knows the first, and then not the second; other programs know one case or the other.
    grpc = _with_loopback(given.get("no_grpc_proxy", named))
    return {"no_grpc_proxy": grpc, "no_proxy": others, "NO_PROXY": others}


def _with_loopback(hosts: str) -> str:
    given = [host for host in map(str.strip, hosts.split(",")) if host]
    return ",".join(dict.fromkeys([*given, *_LOOPBACK]))


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies (also by SIGKILL)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def start(
    command: Sequence[str], environment: Mapping[str, str], **options: Any
) -> subprocess.Popen[str]:
    """Start a program that gets no input and ends with this process; options as for ``Popen``."""
    options |= {"env": environment, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, preexec_fn=die_with_parent, **options)


def free_ports(count: int) -> list[int]:
    """Different TCP ports on loopback that are free now.

    They lie below the range from which systems give ports to connections and to "port 0", so that
    nobody is given one by chance before it is listened on. Raises StartError if too few are free.
    """
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(_NEVER_GIVEN, len(_NEVER_GIVEN)):
            with suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    first, last = _NEVER_GIVEN[0], _NEVER_GIVEN[-1]
    raise StartError(
        f"fewer than {count} of 127.0.0.1's ports {first} to {last} are free; stop what uses them"
    )


def check_free(address: str, name: str) -> None:
    """Raise StartError if ``address`` (host:port) cannot be listened on."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), int(port)))
    except OSError as error:
        problem = f"cannot listen there: {error.strerror}"
        fix = "stop what uses the port, or choose another"
        raise StartError(f"{name} = {address}: {problem}; {fix}") from error


def make_folder(path: Path, name: str) -> None:
    """Make ``path`` and its parents unless they exist; raise StartError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be created: {error.strerror}; choose a writable folder"
        raise StartError(f"{name} = {path}: {problem}") from error


class SuperLink:
    """A running ``flower-superlink`` of our own; its log is ``superlink.log`` in ``state_dir``.

    Args:
        simulation: nodes are simulated, so none connects.
        ray_address: host:port of the Ray cluster that simulates them; None: one of its own.
        programs: folder of Flower's commands.
        stop_s: seconds that it has to end when it is asked to.
        children_s: seconds that processes which it started have to end after it.

    Raises ConfigError if its certificate has expired or has another key; StartError if the port or
    the folder is taken, the folder cannot be written to, Flower is not installed, or it ends at
    once.
    """

    def __init__(
        self,
        config: SuperLinkConfig,
        state_dir: Path,
        *,
        simulation: bool = False,
        ray_address: str | None = None,
        programs: Path = PROGRAMS,
        stop_s: float = STOP_S,
        children_s: float = CHILDREN_S,
    ) -> None:
        check_flower()
        if not simulation:
            check_server(config)
        # First, since what a killed launcher left may hold the port.
        self._processes = Processes(state_dir)
        if not simulation:
            check_free(config.address, "superlink.address")
        make_folder(state_dir, "state_dir")
        self._config, self._simulation, self._programs = config, simulation, programs
        self._state_dir = state_dir
        self._stop_s, self._children_s = stop_s, children_s
        self._home = state_dir / "flwr"
        self.log = state_dir / "superlink.log"
        self._control, self._serverappio = (f"127.0.0.1:{port}" for port in free_ports(2))
        self._environment = flower_environment(self._home)
        if ray_address is not None:
            self._environment[_RAY_ADDRESS] = ray_address
        self._run_id = ""
        self._open = ExitStack()
        command = self._command()
        with writing_to(state_dir, "state_dir"):
            self.log.write_bytes(b"")
            # As long as nothing runs that this process would leave behind.
            self._processes.write()
        # Whoever appends goes on at the start of a log that was cut.
        with self.log.open("ab") as log:
            self.process = start(command, self._environment, stdout=log, stderr=log)
        self._processes.add(self.process.pid)

    def started(self, pid: int) -> None:
        """Take note of the ServerApp's process, which the SuperLink started."""
        self._processes.add(pid)

    def _command(self) -> list[str]:
        command = [
            self._executable("flower-superlink"),
            "--control-api-address", self._control,
            "--serverappio-api-address", self._serverappio,
            "--isolation", "subprocess",
        ]  # fmt: skip
        if self._simulation:
            return [*command, "--insecure", "--simulation"]
        config = self._config
        command += ["--fleet-api-address", config.address]
        # All three files are given, or none.
        for name in ("certfile", "keyfile", "ca_certfile"):
            if path := getattr(config, f"ssl_{name}"):
                command += [f"--ssl-{name.replace('_', '-')}", str(path)]
        if not config.ssl_certfile:
            command += ["--insecure"]
        return [*command, "--enable-supernode-auth"] if config.node_keys else command

    def wait_ready(self) -> None:
        """Wait until both APIs accept connections."""
        host, _, port = self._config.address.rpartition(":")
        fleet = f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        deadline_s = time.monotonic() + READY_S
        for address in (self._control,) if self._simulation else (self._control, fleet):
            while not _accepts(address):
                self.check_alive()
                if time.monotonic() > deadline_s:
                    problem = f"did not answer on {address} within {READY_S:g} s"
                    raise StartError(f"flower-superlink {problem}; see {self.log}")
                time.sleep(0.05)

    def check_alive(self, *, at_work: bool = False) -> None:
        """Raise StartError if the process has ended, or FedPhDError if it was ``at_work``."""
        if (code := self.process.poll()) is not None:
            last = last_line(self.log.read_text("utf-8", "replace"))
            raise (FedPhDError if at_work else StartError)(
                f"flower-superlink ended with code {code}; see {self.log}: {last}"
            )

    def keyring(self, names: Path, say: Callable[[str], None]) -> KeyRing | None:
        """Who may join, if that is limited; as in ``KeyRing``."""
        if (folder := self._config.node_keys) is None:
            return None
        # Flower takes a second to import, which other commands should not pay for.
        from fedphd.common.wire.control import Control

        authority = self._config.ssl_ca_certfile
        control = Control(self._control, authority.read_bytes() if authority else None)
        self._open.enter_context(closing(control))
        return KeyRing(folder, control, names, say, self._config.ssl_certfile)

    def expiry(self, say: Callable[[str], None]) -> Expiry | None:
        """What says that its certificate, if it has one, ends soon."""
        certificate = self._config.ssl_certfile
        return Expiry(certificate, say) if certificate else None

    def submit(
        self, run_config: Mapping[str, object], federation: Mapping[str, object] | None = None
    ) -> str:
        """Start a ServerApp by Flower's own ``flwr run``; return that command.

        ``run_config`` overrides ``[tool.flwr.app.config]``; ``federation`` has Flower's settings
        of a simulation. Raises StartError if ``flwr run`` fails.
        """
        self._write_connection()
        arguments = ["run", str(BUNDLE), "here", "--run-config", flower_pairs(run_config)]
        if federation:
            arguments += ["--federation-config", flower_pairs(federation)]
        try:
            done = self._flwr([*arguments, *_JSON], SUBMIT_S)
        except subprocess.TimeoutExpired as error:
            raise StartError(f"`flwr run` did not answer within {SUBMIT_S:g} s") from error
        answer = _answer(done.stdout)
        # Its exit code does not tell.
        if answer.get("success") is not True:
            raise StartError(f"`flwr run` failed: {(done.stdout + done.stderr).strip()}")
        self._run_id = str(answer["run-id"])
        return shlex.join(["flwr", *arguments])

    def run_log(self) -> str:
        """What the submitted run printed, which only Flower knows; "" if it does not answer."""
        try:
            return self._flwr(["log", self._run_id, "here", "--show"], LOG_S).stdout
        except subprocess.TimeoutExpired:
            return ""

    def traffic(self) -> dict[str, int] | None:
        """Flower's own count of the bytes to and from the nodes; None if it does not answer."""
        try:
            runs = _answer(self._flwr(["ls", "here", *_JSON], TRAFFIC_S).stdout)["runs"]
            counts = [run["network-traffic"] for run in runs]
            return {
                "sent_bytes": sum(int(count["outbound-bytes"]) for count in counts),
                "received_bytes": sum(int(count["inbound-bytes"]) for count in counts),
            }
        except (subprocess.TimeoutExpired, LookupError, TypeError, ValueError):
            return None

    def _flwr(self, arguments: list[str], within_s: float) -> subprocess.CompletedProcess[str]:
        command = [self._executable("flwr"), *arguments]
        return subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=within_s
        )

    def _executable(self, name: str) -> str:
        if (beside := self._programs / name).exists():
            return str(beside)
        if found := shutil.which(name):
            return found
        raise StartError(f"{name} is not installed; install fedphd with its dependencies")

    def _write_connection(self) -> None:
        """Tell ``flwr`` where this SuperLink is; a file in our own FLWR_HOME."""
        here: dict[str, object] = {"address": self._control, "insecure": True}
        if authority := self._config.ssl_ca_certfile:
            here = {"address": self._control, "root-certificates": authority.resolve()}
        values = {"superlink": {"default": "here", "here": here}}
        with writing_to(self._state_dir, "state_dir"):
            self._home.mkdir(parents=True, exist_ok=True)
            (self._home / "config.toml").write_text(to_toml(values), encoding="utf-8")

    def stop(self) -> None:
        """End the process, by force if need be, and those that it started but does not wait for."""
        self._open.close()
        self._end()
        # Where the SuperLink died before, its ServerApp may go on.
        self._processes.end()
        self._processes.close()

    def _end(self) -> None:
        if self.process.poll() is not None:
            return
        started = descendants(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(self._stop_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        end(started, within_s=self._children_s)


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
    except OSError:
        return False


def last_line(text: str) -> str:
    """The last line of a program's output that is not empty."""
    return (text.strip().splitlines() or ["(empty)"])[-1].strip()


def _answer(output: str) -> dict[str, Any]:
    """The answer in ``flwr``'s output: the last JSON object with ``success``, else empty.

    Warnings may stand before and after it.
    """
    for found in reversed(list(re.finditer("{", output))):
        with suppress(json.JSONDecodeError):
            answer: dict[str, Any] = json.JSONDecoder().raw_decode(output, found.start())[0]
            if "success" in answer:
                return answer
    return {}
