"""What the processes say to one another: a type per message, and its form on Flower's wire.

A message's scalars travel as one JSON text in a ``ConfigRecord``; model weights travel as ONE
flat float32 array in an ``ArrayRecord``, beside the manifest of names and shapes that says how
to cut it up. So a message is 5 Flower objects instead of 223 for the digits network, 32 instead of
471 for CIFAR-10's, each of them several remote calls; and an average is one addition
(``tests/benchmarks/packing.py``). SCAFFOLD's control variates are a second such array.
Nothing that arrives is unpickled or executed; everything is checked here or against a template.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any, Final, Literal, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedphd.common.errors import ReplyError
from fedphd.common.layout import TensorLayout
from fedphd.common.parts import PARTS, Part
from fedphd.common.settings import (
    INCEPTION,
    DiffusionConfig,
    FederationConfig,
    ModelConfig,
    ObjectiveConfig,
    SelectionPolicy,
    TrainingConfig,
)

PROTOCOL: Final = 1
PACKAGE_VERSION: Final = version("fedphd")

HELLO: Final = "query.hello"
CHOOSE: Final = "query.choose"
FINISH: Final = "query.finish"
STATISTICS: Final = "query.statistics"
TRAIN: Final = "train"

# Beyond any honest figure, and small enough that an edge's sums of them pass at the cloud and
# the cloud's sums do not overflow.
MOST_OF_CLIENT: Final = 10**12
MOST: Final = 10**30

# Who asks when edges share one question: the answer is for whichever edge is chosen.
EVERY_EDGE: Final = "*"

_RECORD: Final = "fedphd"
_PAYLOAD: Final = "payload"
_WEIGHTS: Final = "weights"
_VARIATE: Final = "variate"

# Matched as bytes: NumPy's own reader evaluates the header, and fails in many ways on a bad one.
_NPY_HEAD: Final = re.compile(
    rb"\x93NUMPY\x01\x00(?s:..)"
    rb"\{'descr': '(?P<dtype><f[48])', 'fortran_order': False, "
    rb"'shape': \((?P<numel>[0-9]{1,15}),\), \} *\n"
)
_NPY_SHOWN_BYTES: Final = 96
_NPY_CODES: Final = {"float32": "<f4", "float64": "<f8"}
Dtype = Literal["float32", "float64"]


class Payload(BaseModel):
    """Base of every message's scalars: strict types, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Hello(Payload):
    """Server to node: who are you? The first message to every node that appears."""

    asking: str
    protocol: int = PROTOCOL
    version: str = PACKAGE_VERSION
    # An edge greets its own new clients before it answers; in seconds.
    wait_s: float = Field(20.0, gt=0)


class HelloReply(Payload):
    """A node introduces itself; an edge also lists the clients that it sees now."""

    kind: Literal["client", "edge"]
    name: str
    protocol: int = PROTOCOL
    version: str = PACKAGE_VERSION
    num_samples: int = Field(0, ge=0)
    clients: dict[str, int] = Field(default_factory=dict)


class EdgeOffer(Payload):
    """What an edge holds in this interval so far: label shares and number of samples."""

    edge_id: str
    label_distribution: tuple[float, ...]
    num_samples: float = Field(ge=0)


class Choose(Payload):
    """Edge to client: will you train with one of these edges in this round?"""

    asking: str
    interval: int = Field(ge=1)
    edge_round: int = Field(ge=1)
    offers: tuple[EdgeOffer, ...] = Field(min_length=1)
    target: tuple[float, ...]
    policy: SelectionPolicy
    factor: float = Field(ge=0)
    offset: float
    epsilon: float = Field(gt=0)
    seed: int = Field(ge=0)
    offer_wait_s: float = Field(ge=0)
    synchronised: bool


class ChooseReply(Payload):
    """Client to edge: the chosen edge, and the label counts if it is the asking one."""

    edge_id: str
    num_samples: int = Field(ge=0)
    label_counts: tuple[int, ...] = ()


class Network(Payload):
    """The U-Net that a message's flat weights belong to; ``layout`` lists those that travel."""

    unet: dict[str, Any]
    layout: str

    def tensor_layout(self) -> TensorLayout:
        """The manifest of names and shapes; raises ReplyError if it is malformed."""
        return read_layout(self.layout)


class TrainTask(Payload):
    """Edge to client: train these weights on your data for one edge round.

    ``parts`` of the U-Net come with it, ``send`` are to go back. What does not come starts from
    what the client has, or from the seeded weights of ``initial``, the U-Net before pruning.
    """

    edge_id: str
    interval: int = Field(ge=1)
    edge_round: int = Field(ge=1)
    network: Network
    diffusion: DiffusionConfig
    training: TrainingConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    parts: tuple[Part, ...] = PARTS
    send: tuple[Part, ...] = PARTS
    initial: ModelConfig | None = None
    sparsity_lambda: float = Field(ge=0)
    optimizer_moments: Literal["prune", "reset"]
    cut: str | None = None
    seed: int = Field(ge=0)


class TrainReply(Payload):
    """Client to edge, with its weights: how the round went."""

    client_id: str
    interval: int = Field(ge=1)
    edge_round: int = Field(ge=1)
    network: Network
    num_examples: int = Field(ge=0)
    loss: float = Field(ge=-MOST_OF_CLIENT, le=MOST_OF_CLIENT)
    sparsity_penalty: float = Field(0.0, ge=0, le=MOST_OF_CLIENT)
    objective_term: float = Field(0.0, ge=0, le=MOST_OF_CLIENT)
    steps: int = Field(ge=0, le=MOST_OF_CLIENT)
    seconds: float = Field(ge=0)


class IntervalTask(Payload):
    """Cloud to edge: run one interval from these weights; the whole plan is in ``plan``.

    ``num_clients`` are known at the cloud: those of all edges.
    """

    interval: int = Field(ge=1)
    sparse: bool
    num_clients: int = Field(ge=1)
    network: Network
    cut: str | None = None
    plan: FederationConfig


class Traffic(Payload):
    """Bytes over one link, as counted by the server side of it."""

    sent_bytes: int = Field(0, ge=0, le=MOST)
    received_bytes: int = Field(0, ge=0, le=MOST)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            sent_bytes=self.sent_bytes + other.sent_bytes,
            received_bytes=self.received_bytes + other.received_bytes,
        )

    def minus(self, earlier: Traffic) -> Traffic:
        """What came since ``earlier``."""
        return Traffic(
            sent_bytes=self.sent_bytes - earlier.sent_bytes,
            received_bytes=self.received_bytes - earlier.received_bytes,
        )

    @property
    def total_bytes(self) -> int:
        """Bytes in both directions."""
        return self.sent_bytes + self.received_bytes


class IntervalReply(Payload):
    """Edge to cloud, with its weights: how the interval went.

    ``parts`` are those that it sends; ``images`` those of all clients' optimiser steps together.
    """

    edge_id: str
    interval: int = Field(ge=1)
    network: Network
    parts: tuple[Part, ...] = PARTS
    samples_per_round: float = Field(ge=0)
    client_rounds: int = Field(ge=0)
    label_distribution: tuple[float, ...]
    loss: float = Field(ge=-MOST, le=MOST)
    mean_steps: float = Field(ge=0, le=MOST)
    images: int = Field(0, ge=0, le=MOST)
    traffic: Traffic
    seconds: float = Field(ge=0)
    clients: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


class ExtractorSpec(Payload):
    """The network whose features are summed up; its flat weights travel beside it."""

    kind: Literal["classifier", "inception"]
    name: str = Field(min_length=1, max_length=200)
    num_features: int = Field(ge=1, le=65536)
    channels: int = Field(ge=1, le=4)
    image_size: int = Field(ge=4, le=1024)
    num_classes: int = Field(ge=1, le=1_000_000)
    layout: str

    @classmethod
    def inception(cls, layout: str) -> ExtractorSpec:
        """Inception v3, which takes images of any size."""
        return cls(
            kind="inception",
            name=INCEPTION,
            num_features=2048,
            channels=3,
            image_size=299,
            num_classes=1008,
            layout=layout,
        )

    def tensor_layout(self) -> TensorLayout:
        """The manifest of names and shapes; raises ReplyError if it is malformed."""
        return read_layout(self.layout)


class StatisticsTask(Payload):
    """Cloud to edge, and edge to client: sum up the features of the training images."""

    asking: str
    extractor: ExtractorSpec
    image_size: int = Field(ge=4, le=1024)
    channels: int = Field(ge=1, le=4)
    num_classes: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    wait_s: float = Field(gt=0)
    clients: tuple[str, ...] = ()


class StatisticsReply(Payload):
    """The sums beside it, one float64 vector, are of ``count`` images."""

    name: str
    count: int = Field(ge=0, le=MOST)
    label_counts: tuple[int, ...]
    clients: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    traffic: Traffic = Traffic()


class Finish(Payload):
    """The run is over; said by the cloud to its edges, and by an edge to its clients."""

    exit_code: int
    message: str


class Ack(Payload):
    """Answer to a message that asks for nothing."""

    name: str


PayloadT = TypeVar("PayloadT", bound=Payload)


def read_layout(text: str) -> TensorLayout:
    """The layout that came as JSON text; raises ReplyError if it is malformed."""
    try:
        return TensorLayout.from_json(text)
    except ValueError as error:
        raise ReplyError(f"layout of the weights is malformed: {error}") from error


def to_records(
    payload: Payload, weights: torch.Tensor | None = None, variate: torch.Tensor | None = None
) -> RecordDict:
    """Convert to Flower records.

    Args:
        payload: the message's scalars.
        weights: (numel,), contiguous, on the CPU; float32, or float64 for sums of features.
        variate: a control variate of these weights, or its change; as the weights.
    """
    records = RecordDict({_RECORD: ConfigRecord({_PAYLOAD: payload.model_dump_json()})})
    if weights is not None:
        arrays = weights_record(weights)
        if variate is not None:
            arrays[_VARIATE] = Array(variate.numpy())
        records[_WEIGHTS] = arrays
    return records


def weights_record(weights: torch.Tensor) -> ArrayRecord:
    """One flat array, shape (numel,), float32 or float64, as a Flower record."""
    return ArrayRecord({_WEIGHTS: Array(weights.numpy())})


def read_payload(message: Message, kind: type[PayloadT]) -> PayloadT:
    """Read a message's scalars as ``kind``.

    Raises:
        ReplyError: the message is an error reply, or not a well-formed ``kind``.
    """
    if message.has_error():
        raise ReplyError(f"error {message.error.code}: {message.error.reason}")
    if not message.has_content():
        raise ReplyError("not a FedPhD message: it has no content")
    try:
        text = message.content.config_records[_RECORD][_PAYLOAD]
        return kind.model_validate_json(text)  # type: ignore[arg-type]
    except KeyError as error:
        raise ReplyError(f"not a FedPhD message: record {error} is missing") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or kind.__name__
        raise ReplyError(f"malformed {kind.__name__}: {where}: {first['msg']}") from error


def read_weights(message: Message, dtype: Dtype = "float32") -> torch.Tensor:
    """The flat weights of a message, shape (numel,), of ``dtype``; read-only memory, no copy.

    Raises:
        ReplyError: no such array, or another dtype, number of dimensions or length.
    """
    return _read_named(message, _WEIGHTS, dtype, "weights", "are")


def read_variate(message: Message) -> torch.Tensor:
    """The control variate, or its change, beside the weights of a message; as ``read_weights``."""
    return _read_named(message, _VARIATE, "float32", "control variate", "is")


def _read_named(message: Message, name: str, dtype: Dtype, meaning: str, verb: str) -> torch.Tensor:
    try:
        array = message.content.array_records[_WEIGHTS][name]
    except KeyError as error:
        raise ReplyError(f"carries no {meaning}") from error
    return read_array(array, dtype, f"{meaning} {verb}")


def read_array(
    array: Array, dtype: Dtype = "float32", what_is: str = "weights are"
) -> torch.Tensor:
    """View a serialised vector in place (Flower stores NumPy's ``.npy`` format)."""
    code = _NPY_CODES[dtype]
    head = _NPY_HEAD.match(array.data)
    if head is None or head["dtype"] != code.encode():
        got = array.data[:_NPY_SHOWN_BYTES]
        raise ReplyError(f"{what_is} no flat {dtype} array in NumPy's format; got {got!r}")
    numel, offset, width = int(head["numel"]), head.end(), np.dtype(code).itemsize
    if len(array.data) - offset != width * numel:
        got_bytes = len(array.data) - offset
        raise ReplyError(f"{numel} weights take {width * numel} bytes; got {got_bytes}")
    return torch.from_numpy(np.asarray(_Lent(np.frombuffer(array.data, code, offset=offset))))


class _Lent:
    """Lends read-only memory to torch, which knows no read-only tensors and would warn.

    Whoever gets the tensor must not write to it; ``owner`` keeps the bytes alive.
    """

    def __init__(self, owner: np.ndarray[Any, Any]) -> None:
        self.owner = owner
        address, _ = owner.__array_interface__["data"]
        self.__array_interface__ = {**owner.__array_interface__, "data": (address, False)}


def check_reply_weights(
    weights: torch.Tensor, network: Network, expected: TensorLayout
) -> torch.Tensor:
    """Check weights that came back against the layout that was sent.

    Args:
        weights: (numel,), float32.
        network: what the sender says they are.
        expected: the layout of the network that was sent out.

    Raises:
        ReplyError: names the first tensor that differs or is not finite.
    """
    problem = expected.mismatch(network.tensor_layout())
    problem = problem or _bad_values(weights, expected, "weights have")
    if problem:
        raise ReplyError(problem)
    return weights


def check_variate(variate: torch.Tensor, expected: TensorLayout) -> torch.Tensor:
    """Check a control variate, (numel,), float32, for weights of layout ``expected``.

    Raises:
        ReplyError: another number of values, or one that is not finite; names its tensor.
    """
    problem = _bad_values(variate, expected, "it has")
    if problem:
        raise ReplyError(f"control variate: {problem}")
    return variate


def _bad_values(flat: torch.Tensor, expected: TensorLayout, have: str) -> str | None:
    if flat.numel() != expected.numel:
        return f"{have} {flat.numel()} values; expected {expected.numel}"
    return expected.first_non_finite(flat)


def check_version(reply: HelloReply) -> None:
    """Raise ReplyError if a peer speaks another protocol."""
    if reply.protocol != PROTOCOL:
        raise ReplyError(
            f"{reply.kind} {reply.name} speaks protocol {reply.protocol} (fedphd "
            f"{reply.version}); this is protocol {PROTOCOL} (fedphd {PACKAGE_VERSION}): "
            "install the same version on every machine"
        )
