"""A Flower node that stays in one process.

A stock ``flower-supernode`` starts a process per message and looks for messages every 3 s. This
one keeps data, model and optimiser warm, answers within milliseconds, and connects again with
back-off when its SuperLink restarts or forgets it.

Like ``internals`` and ``replies`` in this room it reaches below Flower's public API.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.supercore.inflatable import inflatable_object
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

from fedphd.common.config.links import NodeConfig
from fedphd.common.errors import ConfigError, ConnectionLostError, ReplyError
from fedphd.common.timing import Backoff
from fedphd.common.wire.channel import open_channel
from fedphd.common.wire.diagnosis import IN_USE, explain
from fedphd.common.wire.failures import failed
from fedphd.common.wire.internals import assign_id, cut_up, inflated
from fedphd.common.wire.rhythm import Rhythm

logger = logging.getLogger(__name__)

# The shortest that Flower allows: it gives a node up after two of them, 20 s.
HEARTBEAT_S: Final = 10.0
CALL_S: Final = 60.0
# A server that has just started answers sooner; what takes longer is worth a line.
SAY_WAITING_S: Final = 5.0
_QUICK_CALL_S: Final = 10.0
_GOODBYE_S: Final = 2.0
_HICCUP_S: Final = 3.0
_POLL_FIRST_S: Final = 0.02
# While it waits for its next look, a node finds out so soon that it is to stop.
_STOP_S: Final = 0.1
# Objects of a message that travel at a time.
_TRANSFERS: Final = 2
_FORGOTTEN: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION)
# A link that is cut, or a server too busy to answer. Flower gives a node up after so many seconds
# without a heartbeat: until then what is under way is still waited for.
_PASSING: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_RETRY_S: Final = 2 * HEARTBEAT_S
# So often an answer is sent that does not get through in time; then nobody waits for it.
_TRIES: Final = 3

Handler = Callable[[Message], Message]
Keys = tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]


@dataclass
class _Connection:
    """One registration with a SuperLink."""

    channel: grpc.Channel
    stub: FleetStub
    node: node_pb2.Node
    lost: threading.Event = field(default_factory=threading.Event)
    left: bool = False


@dataclass(eq=False)
class Node:
    """A resident node of one SuperLink.

    Args:
        address: host:port of the SuperLink's Fleet API.
        config: certificates, key and how long the server may be away.
        handler: answers a message; runs in ``run``'s thread, one message at a time.
        stop: set from outside to end ``run``.
        on_change: told "connected" and "lost ...: <why>" as the connection comes and goes, and
            "not there yet: <why>" where that takes longer than ``say_waiting_s``.
        clock: monotonic seconds; for tests.
    """

    address: str
    config: NodeConfig
    handler: Handler
    _: KW_ONLY
    stop: threading.Event
    on_change: Callable[[str], None] = lambda change: None
    say_waiting_s: float = SAY_WAITING_S
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._certificates = _read(self.config.root_certificates, "node.root_certificates")
        private_key = self.config.private_key
        self._own_keys = _read_keys(private_key) if private_key else None
        self._connection: _Connection | None = None
        # Until it has arrived: a SuperLink hands a message out once, and then waits.
        self._unsent: Message | None = None
        self._tries = 0
        self._hurry = threading.Event()

    def hurry(self) -> None:
        """Look for a message now, and often until one comes: the caller knows that one is due."""
        self._hurry.set()

    def leave(self) -> None:
        """Say goodbye at once, even while the handler is at work in another thread."""
        if self._connection is not None:
            self._leave(self._connection)

    def run(self) -> None:
        """Serve until ``stop`` is set.

        Raises:
            ConnectionLostError: no SuperLink at the address for ``lost_after_s`` seconds.
        """
        backoff = Backoff(0.2, 5.0)
        lost_after_s = self.config.lost_after_s
        alive_s, told = self.clock(), ""
        while not self.stop.is_set():
            try:
                connection = self._connect()
            except grpc.RpcError as error:
                away_s = self.clock() - alive_s
                given_up = away_s > lost_after_s
                if given_up or away_s > self.say_waiting_s:
                    why = explain(error, self.address, self._certificates)
                    if given_up:
                        raise ConnectionLostError(
                            f"no SuperLink at {self.address} for {lost_after_s:g} s ({why}); check "
                            "the address and the certificates, and that the server is running"
                        ) from error
                    if why != told:
                        told = why
                        self.on_change(f"not there yet: {why}")
            else:
                backoff.reset()
                self._connection, told = connection, ""
                self.on_change("connected")
                reason = self._serve(connection)
                alive_s = self.clock()
                if not self.stop.is_set():
                    limit = f"{lost_after_s:g} s (node.lost_after_s)"
                    self.on_change(f"lost, trying again for {limit}: {reason}")
            self.stop.wait(backoff.next_s())

    def _connect(self) -> _Connection:
        keys: Keys = self._own_keys or generate_key_pairs()
        version = RuntimeVersionClientInterceptor(component_name="SuperNode")
        interceptors = [version, NodeAuthClientInterceptor(*keys)]
        channel = open_channel(self.address, self._certificates, interceptors)
        stub = FleetStub(channel)
        public_key = public_key_to_bytes(keys[1])
        try:
            if self._own_keys is None:
                request = fleet_pb2.RegisterNodeFleetRequest(public_key=public_key)
                stub.RegisterNode(request, timeout=_QUICK_CALL_S)
            activate = fleet_pb2.ActivateNodeRequest(
                public_key=public_key, heartbeat_interval=HEARTBEAT_S
            )
            reply = stub.ActivateNode(activate, timeout=_QUICK_CALL_S)
        except grpc.RpcError:
            channel.close()
            raise
        return _Connection(channel, stub, node_pb2.Node(node_id=reply.node_id))

    def _serve(self, connection: _Connection) -> str:
        """Answer messages until the connection or the process ends; return why it was lost."""
        threading.Thread(target=self._beat, args=(connection,), daemon=True).start()
        rhythm = Rhythm(self.clock)
        silent_since_s: float | None = None
        try:
            while not self.stop.is_set() and not connection.lost.is_set():
                try:
                    busy = self._serve_one(connection, rhythm)
                    silent_since_s = None
                except grpc.RpcError as error:
                    busy, now_s = False, self.clock()
                    silent_since_s = silent_since_s or now_s
                    # A short hiccup keeps the registration: a new one would lose what is queued.
                    if error.code() in _FORGOTTEN or now_s - silent_since_s > _HICCUP_S:
                        return _say(error)
                if not busy:
                    self._pause(rhythm)
            return "the SuperLink no longer knows this node"
        finally:
            self._leave(connection)

    def _pause(self, rhythm: Rhythm) -> None:
        """Wait for the next look, which ``hurry`` brings forward."""
        until_s = self.clock() + rhythm.next_s()
        while (left_s := until_s - self.clock()) > 0 and not self.stop.is_set():
            if self._hurry.wait(min(left_s, _STOP_S)):
                self._hurry.clear()
                rhythm.hurry()
                return

    def _serve_one(self, connection: _Connection, rhythm: Rhythm) -> bool:
        """Answer one message; False if there is none."""
        if self._unsent is not None:
            self._send(connection, self._unsent)
        request = fleet_pb2.PullMessagesRequest(node=connection.node)
        response = connection.stub.PullMessages(request, timeout=CALL_S)
        if not response.messages_list:
            return False
        rhythm.came()
        head = message_from_proto(response.messages_list[0])
        tree = response.message_object_trees[0]
        self._send(connection, self._answer_to(connection, head, tree))
        rhythm.answered(head.metadata.message_type)
        return True

    def _send(self, connection: _Connection, reply: Message) -> None:
        """Push a reply; one that fails with the connection is kept, for when it is back."""
        self._tries = self._tries if reply is self._unsent else 0
        self._unsent = reply
        try:
            self._push(connection, reply)
        except grpc.RpcError as error:
            self._tries += error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            if error.code() in (*_PASSING, *_FORGOTTEN) and self._tries < _TRIES:
                raise
            # Denied: the run has ended, so nobody waits for an answer.
            if error.code() != grpc.StatusCode.PERMISSION_DENIED:
                kind = reply.metadata.message_type
                logger.warning("the answer to %s is not taken: %s", kind, _say(error))
        self._unsent = None

    def _answer_to(self, connection: _Connection, head: Message, tree: Any) -> Message:
        """The answer to one message; to one that cannot be read, an error that says so."""
        try:
            message = self._pull_content(connection, head, tree)
        except ReplyError as error:
            return _refusal(head, f"your message {error}")
        except grpc.RpcError as error:
            ended = error.code() == grpc.StatusCode.PERMISSION_DENIED
            why = f"your message did not come whole: {_say(error)}"
            return _refusal(head, why, level=logging.DEBUG if ended else logging.WARNING)
        return self._answer(message)

    def _pull_content(self, connection: _Connection, head: Message, tree: Any) -> Message:
        run_id, message_id = head.metadata.run_id, head.metadata.message_id
        object_ids = [item.object_id for item in inflatable_object.iterate_object_tree(tree)]
        pull = partial(self._pull_object, connection, run_id)
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            contents = dict(zip(object_ids, pool.map(pull, object_ids), strict=True))
        received = message_pb2.ConfirmMessageReceivedRequest(
            node=connection.node, run_id=run_id, message_object_id=message_id
        )
        self._call(connection, connection.stub.ConfirmMessageReceived, received)
        return inflated(message_id, contents)

    def _pull_object(self, connection: _Connection, run_id: int, object_id: str) -> bytes:
        """One of a message's objects, which its sender may still be uploading."""
        request = message_pb2.PullObjectRequest(
            node=connection.node, run_id=run_id, object_id=object_id
        )
        backoff, deadline_s = Backoff(_POLL_FIRST_S, 1.0), self.clock() + CALL_S
        while True:
            reply: message_pb2.PullObjectResponse = self._call(
                connection, connection.stub.PullObject, request
            )
            if reply.object_available:
                return reply.object_content
            if not reply.object_found or self.clock() > deadline_s:
                raise _Unavailable(f"object {object_id[:8]} of a message never came")
            time.sleep(backoff.next_s())

    def _answer(self, message: Message) -> Message:
        try:
            return self.handler(message)
        except Exception as error:
            # The asking side needs the reason; this process must live on to serve others.
            return failed(message, error)

    def _push(self, connection: _Connection, reply: Message) -> None:
        cut_up(reply)
        with inflatable_object.no_object_id_recompute():
            assign_id(reply, reply.object_id)
            objects = inflatable_object.get_all_nested_objects(reply)
            announced = fleet_pb2.PushMessagesRequest(
                node=connection.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[inflatable_object.get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
            response = self._call(connection, connection.stub.PushMessages, announced)
            wanted, unwanted = set(response.objects_to_push), threading.Event()

            def push(object_id: str) -> None:
                if unwanted.is_set():
                    return
                request = message_pb2.PushObjectRequest(
                    node=connection.node,
                    run_id=reply.metadata.run_id,
                    object_id=object_id,
                    object_content=objects[object_id].deflate(),
                )
                if not self._call(connection, connection.stub.PushObject, request).stored:
                    # Given up there, so the rest is not wanted either.
                    unwanted.set()

            with ThreadPoolExecutor(_TRANSFERS) as pool:
                # Spent, since an error of a push is raised where its result is taken.
                list(pool.map(push, [key for key in objects if key in wanted]))

    def _call(self, connection: _Connection, method: Callable[..., Any], request: Any) -> Any:
        """Call the SuperLink, again where the link fails for a while; raises grpc.RpcError."""
        backoff, deadline_s = Backoff(_POLL_FIRST_S, 2.0), self.clock() + _RETRY_S
        while True:
            try:
                return method(request, timeout=CALL_S)
            except grpc.RpcError as error:
                over = self.clock() > deadline_s or connection.lost.is_set() or self.stop.is_set()
                if error.code() not in _PASSING or over:
                    raise
                logger.info("%s: once more after %s", self.address, _say(error))
            self.stop.wait(backoff.next_s())

    def _beat(self, connection: _Connection) -> None:
        """Send heartbeats; a SuperLink that no longer knows the node makes it register again."""
        request = heartbeat_pb2.SendNodeHeartbeatRequest(
            node=connection.node, heartbeat_interval=HEARTBEAT_S
        )
        while not connection.lost.wait(HEARTBEAT_S / 3):
            try:
                known = connection.stub.SendNodeHeartbeat(request, timeout=_QUICK_CALL_S).success
            except grpc.RpcError as error:
                known = error.code() not in _FORGOTTEN
            if not known:
                connection.lost.set()

    def _leave(self, connection: _Connection) -> None:
        """Say goodbye, so that the server need not wait for a heartbeat that never comes."""
        if connection.left:
            return
        connection.left = True
        connection.lost.set()
        node_id = connection.node.node_id
        try:
            deactivate = fleet_pb2.DeactivateNodeRequest(node_id=node_id)
            connection.stub.DeactivateNode(deactivate, timeout=_GOODBYE_S)
            if self._own_keys is None:
                unregister = fleet_pb2.UnregisterNodeFleetRequest(node_id=node_id)
                connection.stub.UnregisterNode(unregister, timeout=_GOODBYE_S)
        except grpc.RpcError as error:
            logger.debug("leaving %s: %s", self.address, _say(error))
        connection.channel.close()


def _refusal(asked: Message, why: str, *, level: int = logging.WARNING) -> Message:
    """The answer to a message that could not be read."""
    logger.log(level, "%s cannot be answered: %s", asked.metadata.message_type, why)
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, why), reply_to=asked)


def admitted(address: str, config: NodeConfig) -> str:
    """How a SuperLink takes a node with this configuration, which then leaves again.

    Raises:
        ConnectionLostError: it does not let the node in, and why.
    """
    node = Node(address, config, lambda message: message, stop=threading.Event())
    try:
        connection = node._connect()
    except grpc.RpcError as error:
        if IN_USE in (error.details() or ""):
            return f"{address} knows this key, with which a process is connected now"
        why = explain(error, address, node._certificates)
        raise ConnectionLostError(f"{address}: {why}") from error
    node._leave(connection)
    return f"{address} lets this node in"


class _Unavailable(grpc.RpcError):
    """An object that a message announces does not come."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.NOT_FOUND

    def details(self) -> str:
        return str(self)


def _read(path: Path | None, name: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} = {path}: cannot be read: {error.strerror}") from error


def _read_keys(path: Path) -> Keys:
    content = _read(path, "node.private_key") or b""
    try:
        key = load_ssh_private_key(content, password=None)
    except TypeError as error:
        raise ConfigError(
            f"node.private_key = {path}: is encrypted with a password, which a process that runs "
            "by itself cannot ask for; remove it with `ssh-keygen -p`"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"node.private_key = {path}: is not an OpenSSH private key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"node.private_key = {path}: is not an EC key; make one with "
            '`ssh-keygen -t ecdsa -b 384 -N ""`'
        )
    return key, key.public_key()


def _say(error: grpc.RpcError) -> str:
    """A gRPC error in one short line."""
    details = (error.details() or "").splitlines() or [""]
    return f"{error.code().name}: {details[0]}"[:200]
