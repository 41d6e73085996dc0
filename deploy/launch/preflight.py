"""Checks of a machine before a run: each says what it found, and what to do about it."""

import ctypes
import datetime
import importlib.metadata
import os
import resource
import shutil
import socket
import ssl
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cryptography import x509

from fedphd.common.config.links import NodeConfig, SuperLinkConfig
from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig
from fedphd.common.config.run import ModelConfig
from fedphd.common.errors import ConfigError, FedPhDError
from fedphd.deploy.keys.files import (
    CLOCKS,
    check_issued,
    check_key,
    check_loopback,
    hosts_of,
    read_certificate,
    read_latest,
    read_node_key,
    too_early,
)
from fedphd.deploy.keys.registered import fingerprint, registered
from fedphd.deploy.launch.credentials import SOON
from fedphd.deploy.launch.leftovers import user_of
from fedphd.deploy.launch.needs import available_memory
from fedphd.deploy.launch.superlink import check_free
from fedphd.deploy.launch.versions import flower_problem

Outcome = Literal["ok", "warning", "failed", "skipped"]
RoleConfig = CloudConfig | EdgeConfig | ClientConfig

REACH_S = 5.0
LEAST_DISK = 2**30
LEAST_DESCRIPTORS = 1024
# Copies of the weights, float32, at the most: a client has weights, gradient, two moments, what
# came and what goes; an edge what came, its sum and a reply; a cloud both networks, and a copy of
# each while it evaluates and writes.
_COPIES = {"client": 8, "edge": 5, "cloud": 8}
_FLOAT_BYTES = 4
# adjtimex(2): the clock is not synchronised.
_TIME_ERROR = 5
# Of a key's mode: the group may write, others may read or write.
_KEY_OPEN: Final = 0o026
_VERSIONS = ("flwr", "torch", "diffusers", "torch-pruning")


@dataclass(frozen=True)
class Check:
    """What one check found; ``fix`` says what to do unless it is ok."""

    name: str
    outcome: Outcome
    found: str
    fix: str = ""


# OpenSSL's reasons where what answers is not TLS.
_PLAIN: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST")


def role_of(config: RoleConfig) -> str:
    """ "cloud", "edge" or "client"."""
    return {CloudConfig: "cloud", EdgeConfig: "edge"}.get(type(config), "client")


def checks(config: RoleConfig, model: ModelConfig | None) -> Iterator[Check]:
    """All checks for a role, one after the other; ``model`` is the run's U-Net, if it is known."""
    yield _versions()
    yield _clock()
    yield _descriptors()
    yield _disk(_folder_of(config))
    yield _memory(role_of(config), model)
    if not isinstance(config, ClientConfig):
        state = config.state_dir if isinstance(config, CloudConfig) else config.state_folder
        yield from _server(config.superlink, user_of(state))
    if not isinstance(config, CloudConfig):
        servers = config.edges if isinstance(config, ClientConfig) else (config.cloud,)
        yield from _node(config.node, servers)
    if not isinstance(config, EdgeConfig):
        yield _device(config.device)
    if isinstance(config, ClientConfig):
        yield _data(config)
    elif isinstance(config, CloudConfig):
        yield _reference(config)


def _folder_of(config: RoleConfig) -> Path:
    return config.out_dir if isinstance(config, CloudConfig) else config.state_folder


def _tried(name: str, fix: str, find: Callable[[], str]) -> Check:
    """Ok with what ``find`` returns, failed with what it raises."""
    try:
        return Check(name, "ok", find())
    except (FedPhDError, OSError, ValueError) as error:
        return Check(name, "failed", str(error), fix)


def _versions() -> Check:
    found = {name: importlib.metadata.version(name) for name in _VERSIONS}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    text = f"python {sys.version.split()[0]}, {text}"
    if problem := flower_problem():
        return Check("versions", "failed", text, problem)
    return Check("versions", "ok", text)


def _clock() -> Check:
    """Whether the system's clock is kept in step; certificates and logs depend on it."""
    name, fix = "clock", "start a time service, such as systemd-timesyncd or chrony"
    if not sys.platform.startswith("linux"):
        return Check(name, "skipped", "only Linux says whether its clock is kept in step")
    # struct timex with no mode set only asks; its size is at most 256 bytes.
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(256))
    now = _now().isoformat(timespec="seconds")
    if state < 0:
        # A container may be kept from asking.
        return Check(
            name, "skipped", f"{now}; this machine does not say whether it is kept in step"
        )
    if state == _TIME_ERROR:
        return Check(name, "warning", f"{now}, not synchronised", fix)
    return Check(name, "ok", f"{now}, synchronised")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _descriptors() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"raise the limit: `ulimit -n {8 * LEAST_DESCRIPTORS}`, or LimitNOFILE= in a unit"
    few = soft < LEAST_DESCRIPTORS
    return Check("open files", "failed" if few else "ok", f"{soft} allowed", fix if few else "")


def _disk(folder: Path) -> Check:
    other = "choose another folder"
    whole = folder.absolute()
    try:
        there = next(path for path in (whole, *whole.parents) if path.exists())
        free = shutil.disk_usage(there).free
    except OSError as error:
        # A folder above it is another user's.
        return Check("disk", "failed", f"{folder} cannot be looked at: {error.strerror}", other)
    text = f"{free / 2**30:.1f} GiB free for {folder}"
    if not os.access(there, os.W_OK):
        return Check("disk", "failed", f"{there} cannot be written to", other)
    if free < LEAST_DISK:
        return Check("disk", "failed", text, "make room, or choose a folder on a larger disk")
    return Check("disk", "ok", text)


def _memory(role: str, model: ModelConfig | None) -> Check:
    name = "memory"
    if model is None:
        text = "the network is the cloud's to choose"
        return Check(name, "skipped", text, "name the cloud's file by --cloud-config")
    # It takes seconds to import.
    from fedphd.common.unet.model import count_parameters

    needed = _COPIES[role] * _FLOAT_BYTES * count_parameters(model)
    free = available_memory()
    text = f"{needed / 2**30:.2f} GiB for the network's copies, {free / 2**30:.1f} GiB free"
    if needed > free:
        return Check(name, "failed", text, "use a machine with more memory, or a smaller network")
    return Check(name, "ok", text)


def _server(config: SuperLinkConfig, user: int | None) -> Iterator[Check]:
    """The own port and certificate; ``user`` is the process that runs with these settings now."""

    def free() -> str:
        if user is not None:
            return f"process {user} runs with this state_dir, and has the port"
        check_free(config.address, "superlink.address")
        return f"{config.address} is free"

    yield _tried("port", "stop what uses it, or choose another superlink.address", free)
    if config.ssl_certfile is None:
        host = config.address.rpartition(":")[0]
        local = host.startswith("127.") or host in ("localhost", "[::1]")
        fix = "give superlink.ssl_certfile, ssl_keyfile and ssl_ca_certfile"
        text = "none: everything travels in plain text"
        if not config.insecure:
            yield Check("certificate", "failed", text, f"{fix}, or superlink.insecure = true")
            return
        yield Check("certificate", "ok" if local else "warning", text, "" if local else fix)
        return
    yield _certificate(config.ssl_certfile)
    assert config.tls_files is not None
    certificate, key, authority = config.tls_files

    def fits() -> str:
        check_key(certificate, key)
        return f"{key} fits {certificate}"

    def issued() -> str:
        check_issued(certificate, authority)
        check_loopback(certificate)
        return f"{authority} signed {certificate}"

    yield _tried("certificate's key", "make both from one request", fits)
    yield _private(key, "superlink.ssl_keyfile")
    yield _tried("certificate's authority", "have it signed by superlink.ssl_ca_certfile", issued)
    yield _authority(authority, "make another, and certificates of it, by `fedphd keys`")
    if config.node_keys is not None:
        yield _tried("nodes' keys", "fill it by `fedphd keys sign`", lambda: _known(config))


def _known(config: SuperLinkConfig) -> str:
    assert config.node_keys is not None
    names = list(registered(config.node_keys))
    if not names:
        raise ConfigError(f"{config.node_keys} holds no key: nobody could join")
    return f"{len(names)} may join: {', '.join(names)}"


def _certificate(path: Path) -> Check:
    """The own certificate."""
    fix = "have a new one signed by the certificate authority"

    def read() -> tuple[x509.Certificate, str]:
        return read_certificate(path), f" for {', '.join(hosts_of(path)) or 'no name'}"

    return _in_date("certificate", path, read, fix)


def _authority(path: Path, fix: str) -> Check:
    """The certificate that those of servers are checked against."""
    return _in_date("authority", path, lambda: (read_latest(path), ""), fix)


def _in_date(
    name: str, path: Path, read: Callable[[], tuple[x509.Certificate, str]], fix: str
) -> Check:
    """Whether the certificate that ``read`` returns, and for what it is good, is in date.

    ``fix`` says how to get another.
    """
    try:
        certificate, good_for = read()
    except ConfigError as error:
        return Check(name, "failed", str(error), "name a certificate in PEM")
    now = _now()
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        # Another one from the same signer would be no better.
        return Check(name, "failed", f"{path} {too_early(begin, now)}", CLOCKS)
    text = f"{path} is good from {begin:%Y-%m-%d} to {end:%Y-%m-%d}{good_for}"
    if now > end:
        return Check(name, "failed", text, fix)
    return Check(
        name, "warning" if end - now < SOON else "ok", text, fix if end - now < SOON else ""
    )


def _private(path: Path, name: str) -> Check:
    """A private key that not everybody on this machine can read, and only its owner can change.

    Its group may read it: that is how a service's user, or a pod, gets at it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        return Check(name, "failed", f"{path}: {error.strerror}", "correct the path")
    open_to_others = mode & _KEY_OPEN
    fix = f"chmod 600 {path}" if open_to_others else ""
    return Check(name, "failed" if open_to_others else "ok", f"{path} has mode {mode:04o}", fix)


def _node_key(path: Path) -> Check:
    """A node's private key, which others cannot read and the process can."""
    check = _private(path, "node.private_key")
    if check.outcome != "ok":
        return check

    def read() -> str:
        return f"{check.found}: {fingerprint(read_node_key(path).public_key())}"

    return _tried(check.name, "name the key of `fedphd keys request`, NAME-node", read)


def _node(config: NodeConfig, servers: tuple[str, ...]) -> Iterator[Check]:
    """How the servers above are reached."""
    reached = []
    for address in servers:
        yield (reach := _reach(address))
        if reach.outcome != "ok":
            continue
        if config.root_certificates is not None:
            yield (secure := _tls(address, config.root_certificates))
            if secure.outcome != "ok":
                # Who cannot be spoken to cannot be asked about the key.
                continue
        reached.append(address)
    if config.root_certificates is None:
        away = [a for a in servers if not a.startswith(("127.", "localhost:", "[::1]:"))]
        fix = "give node.root_certificates, the certificate authority of the servers"
        text = "none: whoever is between here and there reads and changes what travels"
        if not config.insecure:
            yield Check("authority", "failed", text, f"{fix}, or node.insecure = true")
        else:
            yield Check("authority", "warning" if away else "ok", text, fix if away else "")
    else:
        # Also while no server answers, by which a mistake in it would show.
        fix = "ask the operator for the authority that signs the servers now"
        yield _authority(config.root_certificates, fix)
    if config.private_key is not None:
        yield _node_key(config.private_key)
        for address in reached:
            yield _admitted(address, config)


def _reach(address: str) -> Check:
    host, _, port = address.rpartition(":")
    name = f"reach {address}"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), REACH_S) as link:
            return Check(name, "ok", f"answers from {link.getpeername()[0]}")
    except ConnectionRefusedError:
        # Processes may be started in any order.
        text = "the machine answers, but nothing listens there; its TLS cannot be checked yet"
        return Check(name, "warning", text, "start the server, and check again")
    except (OSError, ValueError) as error:
        return Check(name, "failed", str(error), "check the name, and the firewalls on the way")


def _tls(address: str, authority: Path) -> Check:
    host, _, port = address.rpartition(":")
    name = f"TLS {address}"
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError:
        text = "the authority's certificate cannot be read, as said of it"
        return Check(name, "skipped", text, "correct node.root_certificates")
    context.set_alpn_protocols(["h2"])

    def greet() -> str:
        with (
            socket.create_connection((host.strip("[]"), int(port)), REACH_S) as link,
            context.wrap_socket(link, server_hostname=host.strip("[]")) as secure,
        ):
            return f"{secure.version()}, the certificate is good for {host}"

    try:
        return Check(name, "ok", greet())
    except ssl.SSLCertVerificationError as error:
        fix = "use a certificate for this name, signed by node.root_certificates, that is in date"
        return Check(name, "failed", str(error), fix)
    except (OSError, ValueError) as error:
        if getattr(error, "reason", "") in _PLAIN:
            fix = "give the server superlink.ssl_certfile, or correct the address"
            return Check(name, "failed", "it does not speak TLS, as this node does", fix)
        return Check(name, "failed", str(error), "check the server, and the firewalls on the way")


def _admitted(address: str, config: NodeConfig) -> Check:
    """Whether the server knows this node's key; asked as a node asks, which then leaves."""
    fix = f"ask the operator of {address} to register {config.private_key}.pub"

    def ask() -> str:
        from fedphd.common.wire.node import admitted

        return admitted(address, config)

    return _tried(f"key registered {address}", fix, ask)


def _device(device: str) -> Check:
    def find() -> str:
        from fedphd.common.unet.model import resolve_device

        return f"device = {device!r} is {resolve_device(device)}"

    return _tried("device", "set device to cpu, or install a build of torch for this GPU", find)


def _data(config: ClientConfig) -> Check:
    def opened() -> str:
        from fedphd.common.data.labelled import LabelledData

        data = LabelledData(config.data)
        classes, all_images = len(set(data.labels.tolist())), len(data.labels)
        text = f"{len(data.train_indices)} images of {classes} classes to train on"
        checked = data.check_images()
        # The rest would take minutes where there are many.
        return f"{text}; {'all' if checked == all_images else checked} were decoded"

    return _tried("data", "correct [data]", opened)


def _reference(config: CloudConfig) -> Check:
    def opened() -> str:
        from fedphd.deploy.launch.runs import check_data

        check_data(config)
        return "what evaluation needs is there" if config.evaluation.reference else "none"

    return _tried("reference", "correct [evaluation]", opened)
