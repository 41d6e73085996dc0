"""A SuperLink's Control API: which keys it lets in. Flower's ``flwr supernode`` talks to it too.

That command takes a second or two for each key; a federation may have a thousand of them.
"""

from typing import Final

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto import control_pb2
from flwr.proto.control_pb2_grpc import ControlStub
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedphd.common.errors import FedPhDError, RefusedError
from fedphd.common.wire.channel import open_channel

_CALL_S: Final = 20.0


class Control:
    """A connection to the Control API at ``address``; without ``authority`` in plain text.

    It is made at once, and stays also after the SuperLink's certificate has expired.

    Raises FedPhDError where the SuperLink does not answer.
    """

    def __init__(self, address: str, authority: bytes | None) -> None:
        version = RuntimeVersionClientInterceptor(component_name="flwr CLI")
        self._channel = open_channel(address, authority, [version])
        try:
            grpc.channel_ready_future(self._channel).result(_CALL_S)
        except grpc.FutureTimeoutError as error:
            self.close()
            raise FedPhDError(f"{address}: no answer within {_CALL_S:g} s") from error
        self._stub = ControlStub(self._channel)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def register(self, key: ec.EllipticCurvePublicKey) -> int:
        """Let a node with this key in; returns the id that it will have.

        Raises:
            RefusedError: not with this key, which for example was revoked before.
            FedPhDError: the SuperLink does not answer.
        """
        request = control_pb2.RegisterNodeRequest(public_key=public_key_to_bytes(key))
        try:
            return int(self._stub.RegisterNode(request, timeout=_CALL_S).node_id)
        except grpc.RpcError as error:
            refused = error.code() == grpc.StatusCode.FAILED_PRECONDITION
            raise (RefusedError if refused else FedPhDError)(_say(error)) from error

    def unregister(self, node_id: int) -> None:
        """Let the node in no more, also if it is connected.

        Raises FedPhDError where the SuperLink does not answer.
        """
        request = control_pb2.UnregisterNodeRequest(node_id=node_id)
        try:
            self._stub.UnregisterNode(request, timeout=_CALL_S)
        except grpc.RpcError as error:
            # Flower takes out one that was never connected, and then fails over it; NOT_FOUND
            # says that this has happened before.
            if error.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.NOT_FOUND):
                raise FedPhDError(_say(error)) from error


def _say(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"
