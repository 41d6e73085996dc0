"""Pulling replies with bounds, and what a node says about its keys and an absent server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto import appio_pb2, message_pb2, node_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedphd.common.config.roles import NodeConfig
from fedphd.common.errors import ConfigError, ConnectionLostError
from fedphd.common.timing import Backoff, stop_soon
from fedphd.common.wire import node as node_module
from fedphd.common.wire.internals import GrpcReplies, message_bytes
from fedphd.common.wire.node import Node

NUM_VALUES = 3_000_000  # 12 MB: three chunks of Flower's 5 MiB


class FakeStub:
    """A SuperLink's ServerAppIo API: replies are announced, then their objects come."""

    def __init__(self) -> None:
        self.announced: dict[str, tuple[Any, Any]] = {}
        self.objects: dict[str, bytes | None] = {}
        self.pulls: list[str] = []
        self.confirmed: list[str] = []

    def announce(self, asked: str, reply: Message) -> list[str]:
        """Announce a reply to ``asked``; returns its objects, in the order of their upload."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        items = get_all_nested_objects(reply)
        self.contents = {key: item.deflate() for key, item in items.items()}
        self.objects |= dict.fromkeys(items)
        proto = message_pb2.Message(metadata=message_to_proto(reply).metadata)
        proto.metadata.reply_to_message_id = asked
        self.announced[asked] = (proto, get_object_tree(reply))
        return list(items)

    def deliver(self, *object_ids: str) -> None:
        """Objects whose upload is complete."""
        self.objects |= {key: self.contents[key] for key in object_ids}

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 - gRPC's name
        found = [self.announced.pop(i) for i in request.message_ids if i in self.announced]
        return appio_pb2.PullAppMessagesResponse(
            messages_list=[proto for proto, _ in found],
            message_object_trees=[tree for _, tree in found],
        )

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        self.pulls.append(request.object_id)
        content = self.objects.get(request.object_id)
        return message_pb2.PullObjectResponse(
            object_found=request.object_id in self.objects,
            object_available=content is not None,
            object_content=content or b"",
        )

    def ConfirmMessageReceived(self, request: Any) -> Any:  # noqa: N802
        self.confirmed.append(request.message_object_id)
        return message_pb2.ConfirmMessageReceivedResponse()


@pytest.fixture
def stub() -> FakeStub:
    return FakeStub()


def replies_of(stub: FakeStub, *, stall_s: float = 60.0, max_partial: int = 4) -> GrpcReplies:
    grid = SimpleNamespace(_stub=stub, node=node_pb2.Node(node_id=1), run=SimpleNamespace(run_id=7))
    return GrpcReplies(grid, stall_s=stall_s, max_partial=max_partial)


def reply(text: str, numel: int = 4) -> Message:
    asked = Message(RecordDict(), 3, "train")
    weights = ArrayRecord({"w": Array(np.arange(numel, dtype=np.float32))})
    return Message(RecordDict({"c": ConfigRecord({"t": text}), "w": weights}), reply_to=asked)


def text_of(message: Message | str) -> object:
    assert isinstance(message, Message)
    return message.content.config_records["c"]["t"]


def test_complete_reply_comes_whole_and_is_confirmed(stub: FakeStub) -> None:
    ids = stub.announce("asked", sent := reply("hello", NUM_VALUES))
    stub.deliver(*ids)
    [(asked, got)] = replies_of(stub).poll(["asked", "other"])
    assert asked == "asked"
    assert isinstance(got, Message)
    assert text_of(got) == "hello"
    assert got.content.array_records["w"]["w"].numpy().tolist()[-1] == NUM_VALUES - 1
    assert got.metadata.message_id == sent.metadata.message_id
    assert stub.confirmed == [sent.metadata.message_id]
    assert sorted(stub.pulls) == sorted(ids)


def test_error_reply_comes_whole(stub: FakeStub) -> None:
    failure = Message(Error(203, "out of memory"), reply_to=Message(RecordDict(), 3, "train"))
    stub.deliver(*stub.announce("asked", failure))
    [(_, got)] = replies_of(stub).poll(["asked"])
    assert isinstance(got, Message)
    assert got.error.reason == "out of memory"


def test_nothing_there_yet(stub: FakeStub) -> None:
    assert replies_of(stub).poll(["asked"]) == []
    assert replies_of(stub).poll([]) == []


def test_objects_are_pulled_as_they_come_and_once_each(stub: FakeStub) -> None:
    ids = stub.announce("asked", reply("hello", NUM_VALUES))
    replies = replies_of(stub)
    for number, object_id in enumerate(ids, start=1):
        assert replies.poll(["asked"]) == []
        stub.deliver(object_id)
        if number < len(ids):
            replies.poll(["asked"])
            assert stub.pulls.count(object_id) >= 1, "not pulled although it was there"
    [(_, got)] = replies.poll(["asked"])
    assert text_of(got) == "hello"


def test_upload_that_goes_on_slowly_is_not_given_up(
    stub: FakeStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(node_module.time, "monotonic", lambda: clock.now_s)
    ids = stub.announce("asked", reply("hello", NUM_VALUES))
    replies = replies_of(stub, stall_s=20.0)
    found: list[tuple[str, Message | str]] = []
    for object_id in ids:
        found += replies.poll(["asked"])
        clock.now_s += 15.0
        stub.deliver(object_id)
    found += replies.poll(["asked"])
    assert clock.now_s > 60
    [(_, got)] = found
    assert text_of(got) == "hello"


def test_upload_that_stalls_is_given_up_with_the_reason(
    stub: FakeStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(node_module.time, "monotonic", lambda: clock.now_s)
    ids = stub.announce("asked", reply("hello"))
    stub.deliver(*ids[:2])
    replies = replies_of(stub, stall_s=20.0)
    assert replies.poll(["asked"]) == []
    clock.now_s = 120.0
    assert replies.poll(["asked"]) == []
    clock.now_s = 120.1
    assert replies.poll(["asked"]) == [("asked", "its upload stalled for 20 s")]
    assert replies.poll(["asked"]) == []
    assert stub.confirmed == []


def test_stalled_upload_does_not_hold_up_another(stub: FakeStub) -> None:
    stub.announce("dead", reply("dead"))
    stub.deliver(*stub.announce("alive", reply("alive")))
    [(asked, got)] = replies_of(stub).poll(["dead", "alive"])
    assert (asked, text_of(got)) == ("alive", "alive")


def test_no_more_than_max_partial_are_pulled_at_a_time(stub: FakeStub) -> None:
    ids = {name: stub.announce(name, reply(name)) for name in ("a", "b", "c")}
    replies = replies_of(stub, max_partial=2)
    assert replies.poll(["a", "b", "c"]) == []
    assert set(stub.pulls) == {ids["a"][0], ids["b"][0]}
    replies.forget("a")
    stub.pulls.clear()
    assert replies.poll(["b", "c"]) == []
    assert set(stub.pulls) == {ids["b"][0], ids["c"][0]}


def test_object_that_the_server_lost(stub: FakeStub) -> None:
    ids = stub.announce("asked", reply("hello"))
    stub.deliver(*ids)
    del stub.objects[ids[1]]
    assert replies_of(stub).poll(["asked"]) == [("asked", "its reply was lost on the server")]


def test_objects_that_are_no_message(stub: FakeStub) -> None:
    records = reply("hello").content
    stub.deliver(*stub.announce("asked", reply("hello")))
    items = get_all_nested_objects(records)
    stub.objects |= {key: item.deflate() for key, item in items.items()}
    proto, _ = stub.announced["asked"]
    stub.announced["asked"] = (proto, get_object_tree(records))
    assert replies_of(stub).poll(["asked"]) == [
        ("asked", "its reply is a RecordDict, not a message")
    ]


def test_objects_that_cannot_be_read(stub: FakeStub) -> None:
    ids = stub.announce("asked", reply("hello"))
    stub.deliver(*ids)
    stub.objects[ids[0]] = b"junk"
    [(asked, why)] = replies_of(stub).poll(["asked"])
    assert asked == "asked"
    assert isinstance(why, str)
    assert why.startswith("its reply cannot be read: ")


def test_backoff_doubles_up_to_its_limit() -> None:
    backoff = Backoff(0.1, 0.5)
    assert [backoff.next_s() for _ in range(4)] == [0.1, 0.2, 0.4, 0.5]
    backoff.reset()
    assert backoff.next_s() == 0.1


def test_message_bytes_counts_every_object_and_serialises_shared_ones_once() -> None:
    message = reply("hello", NUM_VALUES)
    sizes: dict[str, int] = {}
    total = message_bytes(message, sizes)
    # Message, records, config, arrays, array, and 12,000,128 bytes in chunks of 5 MiB.
    assert len(sizes) == 5 + 3
    assert total == sum(sizes.values())
    assert 12_000_128 < total < 12_000_128 + 4000
    twin = Message(message.content, 9, "train")
    before = dict(sizes)
    again = message_bytes(twin, sizes)
    assert len(set(sizes) - set(before)) == 1, "only the envelope differs"
    assert again == pytest.approx(total, abs=200)


def key_file(path: Path, key: Any) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return path


def node_of(config: NodeConfig, address: str = "127.0.0.1:1") -> Node:
    return Node(address, config, lambda message: message, stop=threading.Event())


def test_certificates_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "ca.pem"
    with pytest.raises(
        ConfigError, match=r"^node.root_certificates = .*ca.pem: cannot be read: No such file"
    ):
        node_of(NodeConfig(root_certificates=missing))


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 100])
def test_private_keys_that_are_none(tmp_path: Path, content: bytes) -> None:
    key, ca = tmp_path / "key", tmp_path / "ca.pem"
    key.write_bytes(content)
    ca.write_bytes(b"-")
    with pytest.raises(ConfigError, match=r"^node.private_key = .*key: is no OpenSSH private key"):
        node_of(NodeConfig(root_certificates=ca, private_key=key))
    key.unlink()
    with pytest.raises(ConfigError, match=r"^node.private_key = .*key: cannot be read: No such"):
        node_of(NodeConfig(root_certificates=ca, private_key=key))


def test_private_keys_of_another_kind_and_the_right_one(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(b"-")
    other = key_file(tmp_path / "ed25519", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(ConfigError, match=r"ed25519: is no EC key; .*ssh-keygen -t ecdsa -b 384"):
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


def test_nobody_there_for_too_long(closed_port: int) -> None:
    node = node_of(NodeConfig(lost_after_s=0.5), f"127.0.0.1:{closed_port}")
    started_s = time.monotonic()
    with pytest.raises(
        ConnectionLostError,
        match=rf"no SuperLink at 127.0.0.1:{closed_port} for 0.5 s \(UNAVAILABLE: .*check the addr",
    ):
        node.run()
    assert 0.5 <= time.monotonic() - started_s < 5.0


def test_stop_ends_a_node_that_finds_nobody(closed_port: int) -> None:
    stop = threading.Event()
    node = Node(f"127.0.0.1:{closed_port}", NodeConfig(), lambda m: m, stop=stop)
    stop_soon(stop, 0.3)
    started_s = time.monotonic()
    node.run()
    assert time.monotonic() - started_s < 5.0


def test_a_first_server_that_is_missing_is_named_once(
    closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "SAY_WAITING_S", 0.2)
    said: list[str] = []
    config = NodeConfig(lost_after_s=2.0)
    address = f"127.0.0.1:{closed_port}"
    node = Node(address, config, lambda m: m, stop=threading.Event(), on_change=said.append)
    with pytest.raises(ConnectionLostError):
        node.run()
    assert len(said) == 1
    assert said[0].startswith("not there yet: UNAVAILABLE: ")
