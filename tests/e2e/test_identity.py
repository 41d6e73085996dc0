"""Who may talk: real processes with TLS and keys, and those that do not belong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.command import fedphd
from support.peers import FakeClient
from support.processes import Processes, Program, free_port, open_to_others
from support.site import Site

from fedphd.common.config.links import NodeConfig, SuperLinkConfig
from fedphd.common.errors import FedPhDError
from fedphd.common.wire import control
from fedphd.common.wire.node import Node
from fedphd.deploy.keys.authority import Authority, pem
from fedphd.deploy.keys.files import PrivateFormat, write_private_key
from fedphd.deploy.keys.registered import register, revoke
from fedphd.deploy.launch.superlink import SuperLink

# The last intruder has had its turn after three or four of them on an idle machine.
INTERVALS = 10
RUN = {
    "schedule.intervals": INTERVALS,
    "schedule.min_clients": 2,
    "schedule.num_edges": 1,
    "waits.retry_s": 1.0,
}

AS_ANOTHER = {"client_id": "client-0"}
SSL = ("superlink.ssl_certfile", "superlink.ssl_keyfile", "superlink.ssl_ca_certfile")
SERVER, NODE = "superlink.insecure", "node.insecure"


@dataclass(frozen=True)
class Outcome:
    """A run with keys that intruders tried to disturb."""

    site: Site
    codes: dict[str, int]
    intruders: dict[str, Program]
    open_ports: set[int]
    preflight: dict[str, dict[str, str]]


@contextmanager
def intruding(site: Site, key: str, client: FakeClient) -> Iterator[None]:
    """A node with somebody's registered key that answers as ``client``."""
    assert site.keys is not None
    config = NodeConfig(
        root_certificates=site.keys / "ca.pem", private_key=site.keys / f"{key}-node"
    )
    stop = threading.Event()
    # Whoever is asked here answers.
    node = Node(site.address("edge-0"), config, client, stop=stop)  # type: ignore[arg-type]
    thread = threading.Thread(target=node.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    with Processes(tmp_path_factory.mktemp("identity")) as processes:
        folder = processes.folder
        made = fedphd("keys", "dev", "--edges", "1", "--clients", "3", cwd=folder)
        assert made.returncode == 0, made.stderr
        site = Site(processes, RUN, edges=("edge-0",), keys=folder / "keys")
        everywhere = {n: f"0.0.0.0:{site.ports[n]}" for n in ("cloud", "edge-0")}
        edge = site.start("edge-0", **{"superlink.address": everywhere["edge-0"]})
        edge.wait_line("listening on")
        # What needs no run comes before it.
        intruders = start_intruders(site)
        preflight = {name: checked(site, name) for name in ("client-2", "client-7")}
        site.start("client-0")
        victim = site.start("client-1")
        victim.wait_line("connected")
        site.start("cloud", **{"superlink.address": everywhere["cloud"]})
        edge.wait_line(r"interval +1 round 1")
        open_ports = set[int]().union(*(open_to_others(pid) for pid in processes.running()))
        with intruding(site, "client-2", FakeClient("client-0", (5,) * 10)):
            edge.wait_line("client-2 refused: calls itself client-0")
        with intruding(site, "client-2", FakeClient("client-2", (5,) * 10, reply=AS_ANOTHER)):
            edge.wait_line("client-2 failed: answers as client-0")
        fedphd("keys", "revoke", "client-1", "--node-keys", "keys/clients", cwd=folder)
        edge.wait_line("client-1 may join no more: its key was revoked")
        victim.wait_line("lost, trying again")
        edge.wait_line("client-1 left")
        codes = {name: site.programs[name].wait_exit() for name in ("cloud", "edge-0", "client-0")}
        for program in intruders.values():
            program.wait_exit()
        yield Outcome(site, codes, intruders, open_ports, preflight)


def checked(site: Site, name: str) -> dict[str, str]:
    """What ``fedphd preflight`` finds of a client with a registered key, or one of its own."""
    own: dict[str, Any] = {"data.partition.partition_id": 0}
    if name == "client-7":
        own["node.private_key"] = str(site.folder / "own-node")
    config = site.write(name, **own)
    done = fedphd("preflight", "--config", str(config), "--json", cwd=site.folder)
    return {check["name"]: check["outcome"] for check in json.loads(done.stdout)}


def start_intruders(site: Site) -> dict[str, Program]:
    """Clients that do not belong, each of which gives up after some seconds."""
    folder, short = site.folder, {"node.lost_after_s": 6.0}
    write_private_key(
        folder / "own-node", ec.generate_private_key(ec.SECP384R1()), PrivateFormat.OpenSSH
    )
    Authority.new().write(folder / "other")
    settings = {
        "client-7": {"node.private_key": str(folder / "own-node")},
        "client-8": {"node.root_certificates": str(folder / "other/ca.pem")},
        "client-9": {"node.insecure": True},
    }
    assert site.keys is not None
    plain = Site(site.processes, edges=site.edges)
    plain.ports = site.ports
    found = {}
    for name, own in settings.items():
        there = plain if name == "client-9" else site
        values = {"data.partition.partition_id": 0, **own, **short}
        if name == "client-8":
            values["node.private_key"] = str(site.keys / "client-2-node")
        found[name] = there.start(name, **values)
    return found


def test_the_run_goes_on(outcome: Outcome) -> None:
    assert outcome.codes == dict.fromkeys(outcome.codes, 0), outcome.site.programs["cloud"].text
    last = outcome.site.events("interval")[-1]
    assert (last["interval"], last["clients"]) == (INTERVALS, ["client-0"])


def test_an_unregistered_key_is_refused(outcome: Outcome) -> None:
    intruder = outcome.intruders["client-7"]
    assert intruder.wait_exit() == 5
    assert "it does not know this node's key, or has revoked it" in intruder.text
    edge = outcome.site.programs["edge-0"].text
    assert "edge-0    refused a node whose key is not registered here" in edge


def test_preflight_asks_whether_a_key_is_registered(outcome: Outcome) -> None:
    check = f"key registered {outcome.site.address('edge-0')}"
    assert outcome.preflight["client-2"][check] == "ok"
    assert outcome.preflight["client-7"][check] == "failed"
    assert outcome.preflight["client-2"]["node.private_key"] == "ok"


def test_a_server_of_another_authority_is_refused(outcome: Outcome) -> None:
    intruder = outcome.intruders["client-8"]
    assert intruder.wait_exit() == 5
    assert f"no SuperLink at {outcome.site.address('edge-0')}" in intruder.text
    assert "its certificate is refused" in intruder.text


def test_a_client_that_speaks_plain_text_is_refused(outcome: Outcome) -> None:
    intruder = outcome.intruders["client-9"]
    assert intruder.wait_exit() == 5
    assert "it speaks TLS, this node plain text: give node.root_certificates" in intruder.text
    edge = outcome.site.programs["edge-0"].text
    assert "edge-0    refused somebody who spoke plain text" in edge


def test_nobody_takes_anothers_name(outcome: Outcome) -> None:
    edge = outcome.site.programs["edge-0"].text
    line = "client-2 refused: calls itself client-0, and its key is that of client-2"
    assert line in edge
    assert edge.count("client-0 joined") == 1


def test_nobody_answers_for_another(outcome: Outcome) -> None:
    failures = [f for event in outcome.site.rounds("edge-0") for f in event["failures"]]
    assert any(f.startswith("client-2: answers as client-0; expected client-2") for f in failures)
    trained = [event["clients"] for event in outcome.site.rounds("edge-0")]
    assert not any("client-2" in clients for clients in trained)


def test_a_revoked_key_is_out_at_once(outcome: Outcome) -> None:
    edge, victim = (outcome.site.programs[name].text for name in ("edge-0", "client-1"))
    assert "client-1 left" in edge
    assert "it does not know this node's key, or has revoked it" in victim
    assert "client-1" in outcome.site.events("interval")[0]["clients"]


def test_only_what_nodes_connect_to_is_open_to_others(outcome: Outcome) -> None:
    ports = {outcome.site.ports[name] for name in ("cloud", "edge-0")}
    assert outcome.open_ports == ports


def test_an_expired_certificate_is_refused(processes: Processes) -> None:
    folder = processes.folder
    authority = Authority.new()
    authority.write(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    write_private_key(folder / "old.key", key, PrivateFormat.PKCS8)
    expired = authority.certify("old", key.public_key(), ["127.0.0.1"], days=0)
    (folder / "old.pem").write_bytes(pem(expired))
    server = f"127.0.0.1:{free_port()}"
    certificates = ("old.pem", "old.key", "ca.pem")
    names = ("--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile")
    processes.start_flower(
        "flower-superlink", "--fleet-api-address", server,
        "--control-api-address", f"127.0.0.1:{free_port()}",
        "--serverappio-api-address", f"127.0.0.1:{free_port()}",
        *(word for pair in zip(names, certificates, strict=True) for word in pair),
    )  # fmt: skip
    site = Site(processes)
    trusting = {"node.insecure": False, "node.root_certificates": str(folder / "ca.pem")}
    client = site.start("client-0", edges=[server], **trusting)
    client.wait_line("not there yet: its certificate is refused: certificate has expired")
    # A server of ours does not even start with it.
    own = {key: str(folder / name) for key, name in zip(SSL, certificates, strict=True)}
    cloud = site.start("cloud", **{"superlink.insecure": False}, **own)
    assert cloud.wait_exit() == 2
    assert "old.pem: has expired on" in cloud.text


def test_a_key_is_revoked_also_once_the_certificate_has_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, key = Authority.new(), ec.generate_private_key(ec.SECP384R1())
    authority.write(tmp_path)
    write_private_key(tmp_path / "old.key", key, PrivateFormat.PKCS8)
    # It lasts until the SuperLink runs, also on a busy machine.
    ends = authority.certify("old", key.public_key(), [], days=30 / 86_400)  # type: ignore[arg-type]
    (tmp_path / "old.pem").write_bytes(pem(ends))
    keys, said = tmp_path / "keys", list[str]()
    register(keys, "a", key.public_key())
    files = {
        "ssl_certfile": "old.pem", "ssl_keyfile": "old.key", "ssl_ca_certfile": "ca.pem",
        "node_keys": "keys",
    }  # fmt: skip
    config = SuperLinkConfig(
        address=f"127.0.0.1:{free_port()}",
        **{name: tmp_path / file for name, file in files.items()},
    )
    link = SuperLink(config, tmp_path / "state")
    try:
        link.wait_ready()
        ring, watch = link.keyring(tmp_path / "names", said.append), link.expiry(said.append)
        assert ring is not None
        assert watch is not None
        ring.start()
        time.sleep(max(0.0, ends.not_valid_after_utc.timestamp() + 1 - time.time()))
        # Who comes new is kept out.
        monkeypatch.setattr(control, "_CALL_S", 1.0)
        with pytest.raises(FedPhDError, match="no answer within 1 s"):
            link.keyring(tmp_path / "others", said.append)
        monkeypatch.undo()
        revoke(keys, "a")
        ring.follow()
        assert said == ["a may join no more: its key was revoked"]
        watch.follow()
        assert "old.pem has expired on" in said[-1]
    finally:
        link.stop()


def test_plain_text_must_be_asked_for(processes: Processes) -> None:
    site = Site(processes)
    for name, setting in {**dict.fromkeys(("cloud", "edge-0"), SERVER), "client-0": NODE}.items():
        program = site.start(name, **{setting: False})
        assert program.wait_exit() == 2
        assert "plain text" in program.text
        assert "insecure = true (--insecure) on a network that you trust" in program.text
