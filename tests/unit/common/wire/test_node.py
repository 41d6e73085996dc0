"""What a node says about its keys and about a server that is not there."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, message_pb2, node_pb2
from flwr.supercore.inflatable import inflatable_object

from fedphd.common.config.links import NodeConfig
from fedphd.common.errors import ConfigError, ConnectionLostError
from fedphd.common.wire.internals import assign_id
from fedphd.common.wire.node import Node
from fedphd.common.wire.rhythm import Rhythm


def key_file(path: Path, key: Any) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return path


def echo(message: Message) -> Message:
    return message


def node_of(config: NodeConfig, address: str = "127.0.0.1:1") -> Node:
    return Node(address, config, echo, stop=threading.Event())


def test_certificates_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "ca.pem"
    with pytest.raises(
        ConfigError, match=r"^node.root_certificates = .*ca.pem: cannot be read: No such file"
    ):
        node_of(NodeConfig(root_certificates=missing))


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 100])
def test_files_that_are_not_private_keys(tmp_path: Path, content: bytes) -> None:
    key, ca = tmp_path / "key", tmp_path / "ca.pem"
    key.write_bytes(content)
    ca.write_bytes(b"-")
    with pytest.raises(
        ConfigError, match=r"^node.private_key = .*key: is not an OpenSSH private key"
    ):
        node_of(NodeConfig(root_certificates=ca, private_key=key))
    key.unlink()
    with pytest.raises(ConfigError, match=r"^node.private_key = .*key: cannot be read: No such"):
        node_of(NodeConfig(root_certificates=ca, private_key=key))


def test_private_keys_of_another_kind_and_the_right_one(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(b"-")
    other = key_file(tmp_path / "ed25519", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(
        ConfigError, match=r"ed25519: is not an EC key; .*ssh-keygen -t ecdsa -b 384"
    ):
        node_of(NodeConfig(root_certificates=ca, private_key=other))
    right = key_file(tmp_path / "ec", ec.generate_private_key(ec.SECP384R1()))
    node_of(NodeConfig(root_certificates=ca, private_key=right))


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_private_key_with_a_password(tmp_path: Path) -> None:
    ca, key = tmp_path / "ca.pem", tmp_path / "key"
    ca.write_bytes(b"-")
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", str(key)],
        check=True,
    )
    with pytest.raises(ConfigError, match=r"key: is encrypted with a password, .*ssh-keygen -p"):
        node_of(NodeConfig(root_certificates=ca, private_key=key))


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Ticking:
    """A clock that shows a quarter of a second more at each look."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.25
        return self.now_s


def test_nobody_there_for_too_long(closed_port: int) -> None:
    clock, address = Ticking(), f"127.0.0.1:{closed_port}"
    stop = threading.Event()
    node = Node(address, NodeConfig(lost_after_s=0.5), echo, stop=stop, clock=clock)
    with pytest.raises(
        ConnectionLostError,
        match=rf"no SuperLink at {address} for 0.5 s \(UNAVAILABLE: .*check the address",
    ) as raised:
        node.run()
    assert isinstance(raised.value.__cause__, grpc.RpcError)
    # Began at 0.25 s; 0.5 and 0.75 s are within the limit, 1 s is not.
    assert clock.now_s == 1.0


def test_stop_ends_a_node_that_finds_nobody(closed_port: int) -> None:
    stop = threading.Event()
    # Told of the missing server, somebody stops the node; else it would give up at the third try.
    node = Node(
        f"127.0.0.1:{closed_port}", NodeConfig(lost_after_s=0.5), echo, stop=stop,
        on_change=lambda change: stop.set(), say_waiting_s=0.0, clock=Ticking(),
    )  # fmt: skip
    node.run()
    assert stop.is_set()


def test_a_first_server_that_is_missing_is_named_once(closed_port: int) -> None:
    said: list[str] = []
    node = Node(
        f"127.0.0.1:{closed_port}", NodeConfig(lost_after_s=1.0), echo, stop=threading.Event(),
        on_change=said.append, say_waiting_s=0.3, clock=Ticking(),
    )  # fmt: skip
    with pytest.raises(ConnectionLostError):
        node.run()
    assert len(said) == 1
    assert said[0].startswith("not there yet: UNAVAILABLE: ")


def far_rhythm(clock: Ticking) -> Rhythm:
    """The last message came 40 s after the one before: the next look is 2 s away."""
    rhythm = Rhythm(lambda: clock.now_s)
    rhythm.answered("train")
    clock.now_s += 40.0
    rhythm.came()
    rhythm.answered("train")
    return rhythm


def paused_s(node: Node, clock: Ticking, rhythm: Rhythm) -> float:
    begun_s = clock.now_s
    node._pause(rhythm)
    return clock.now_s - begun_s


def test_a_node_that_is_to_hurry_looks_at_once_and_often() -> None:
    clock = Ticking()
    rhythm = far_rhythm(clock)
    node = Node("here:1", NodeConfig(), echo, stop=threading.Event(), clock=clock)
    assert paused_s(node, clock, rhythm) >= 2.0
    node.hurry()
    assert paused_s(node, clock, rhythm) <= 0.5
    assert rhythm.next_s() == 0.02


def test_a_node_that_is_to_stop_does_not_wait_for_its_next_look() -> None:
    clock = Ticking()
    node = Node("here:1", NodeConfig(), echo, stop=threading.Event(), clock=clock)
    rhythm = far_rhythm(clock)
    node.stop.set()
    assert paused_s(node, clock, rhythm) <= 1.0


class Junk:
    """A SuperLink's stub that hands out bytes which are no object of Flower's."""

    def PullObject(self, request: Any, timeout: float) -> Any:  # noqa: N802
        return message_pb2.PullObjectResponse(
            object_found=True, object_available=True, object_content=b"junk"
        )

    def ConfirmMessageReceived(self, request: Any, timeout: float) -> None:  # noqa: N802
        """Nothing to do."""


def test_message_that_cannot_be_read_is_answered_with_an_error() -> None:
    message = Message(RecordDict(), 3, "train")
    node, connection = node_of(NodeConfig()), SimpleNamespace(stub=Junk(), node=None)
    tree = inflatable_object.get_object_tree(message)
    reply = node._answer_to(connection, message, tree)  # type: ignore[arg-type]
    assert reply.has_error()
    assert str(reply.error.reason).startswith("your message cannot be read: ")


class Failing(grpc.RpcError):
    """A call that fails with ``status``."""

    def __init__(self, status: grpc.StatusCode) -> None:
        super().__init__(status.name)
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return str(self)


class Server:
    """A SuperLink's stub with one message; ``failures`` says how its next calls fail, by name."""

    def __init__(self, **failures: list[grpc.StatusCode]) -> None:
        asked = Message(RecordDict(), 3, "train")
        self.tree = inflatable_object.get_object_tree(asked)
        self.objects = {
            key: item.deflate()
            for key, item in inflatable_object.get_all_nested_objects(asked).items()
        }
        assign_id(asked, asked.object_id, run_id=7)
        self.waiting = [message_to_proto(remove_content_from_message(asked))]
        self.failures = failures
        self.answers: list[Message] = []
        self.confirmed = self.pushed = 0
        # So many objects are taken; then the answer is given up.
        self.stored = 1000

    def _fail(self, name: str) -> None:
        if due := self.failures.get(name):
            raise Failing(due.pop(0))

    def PullMessages(self, request: Any, timeout: float) -> Any:  # noqa: N802
        self._fail("look")
        messages, self.waiting = self.waiting, []
        trees = [self.tree] if messages else []
        return fleet_pb2.PullMessagesResponse(messages_list=messages, message_object_trees=trees)

    def PullObject(self, request: Any, timeout: float) -> Any:  # noqa: N802
        self._fail("pull")
        content = self.objects[request.object_id]
        return message_pb2.PullObjectResponse(
            object_found=True, object_available=True, object_content=content
        )

    def ConfirmMessageReceived(self, request: Any, timeout: float) -> None:  # noqa: N802
        self._fail("confirm")
        self.confirmed += 1

    def PushMessages(self, request: Any, timeout: float) -> Any:  # noqa: N802
        self._fail("push")
        self.answers += map(message_from_proto, request.messages_list)
        trees = request.message_object_trees
        ids = [o.object_id for tree in trees for o in inflatable_object.iterate_object_tree(tree)]
        return fleet_pb2.PushMessagesResponse(objects_to_push=ids)

    def PushObject(self, request: Any, timeout: float) -> Any:  # noqa: N802
        self._fail("object")
        self.pushed += 1
        return message_pb2.PushObjectResponse(stored=self.pushed <= self.stored)


def connected(server: Server) -> Any:
    return SimpleNamespace(stub=server, node=node_pb2.Node(node_id=3), lost=threading.Event())


def served(server: Server, *, looks: int = 1) -> Node:
    """A node after so many looks."""
    node = node_of(NodeConfig())
    for _ in range(looks):
        node._serve_one(connected(server), Rhythm())
    return node


GONE, DENIED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("call", ["pull", "confirm", "push"])
def test_a_call_that_fails_for_a_while_is_made_again(call: str) -> None:
    server = Server(**{call: [GONE, grpc.StatusCode.DEADLINE_EXCEEDED]})
    served(server)
    (answer,) = server.answers
    assert not answer.has_error()
    assert server.confirmed == 1


def test_an_answer_that_does_not_arrive_is_kept_for_the_next_connection() -> None:
    server, node = Server(push=[GONE]), node_of(NodeConfig())
    lost = connected(server)
    lost.lost.set()
    with pytest.raises(Failing):
        node._serve_one(lost, Rhythm())
    assert not server.answers
    # There is no further message; the answer goes first.
    assert not node._serve_one(connected(server), Rhythm())
    assert len(server.answers) == 1
    assert not node._serve_one(connected(server), Rhythm())
    assert len(server.answers) == 1


def test_a_message_that_does_not_come_whole_is_answered_with_an_error() -> None:
    server = Server(pull=[grpc.StatusCode.INTERNAL])
    served(server)
    (answer,) = server.answers
    assert answer.has_error()
    assert str(answer.error.reason).startswith("your message did not come whole: INTERNAL")


def test_nobody_waits_for_an_answer_of_a_run_that_has_ended() -> None:
    server = Server(push=[DENIED])
    served(server, looks=2)
    assert not server.answers


def test_an_answer_that_never_gets_through_in_time_is_dropped() -> None:
    late = grpc.StatusCode.DEADLINE_EXCEEDED
    server, node = Server(object=[late] * 9), node_of(NodeConfig())
    cut = connected(server)
    # No call is made again within a try.
    cut.lost.set()
    for _ in range(2):
        with pytest.raises(Failing):
            node._serve_one(cut, Rhythm())
    server.failures["object"] = [late]
    assert not node._serve_one(cut, Rhythm()), "it looks for the next message"
    assert server.pushed < 3
    assert node._unsent is None


def test_nothing_more_is_uploaded_of_an_answer_that_is_given_up() -> None:
    chunks = 12
    server, node = Server(), node_of(NodeConfig())
    server.stored = 2
    weights = ArrayRecord({"w": Array(np.random.default_rng(0).random(chunks * 655_360))})
    node.handler = lambda message: Message(RecordDict({"w": weights}), reply_to=message)
    assert node._serve_one(connected(server), Rhythm())
    # Two are on their way at a time.
    assert 3 <= server.pushed <= 5
