"""What the processes say to one another: a type per message; ``common/wire/records.py`` sends them.

Nothing that arrives is unpickled or executed; everything is checked here or against a template.
"""

from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field

from fedphd.common.config import run
from fedphd.common.config.wire import CodecName
from fedphd.common.errors import ReplyError
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.parts import PARTS, Part, joined
from fedphd.common.wire.metrics import TrainMetrics
from fedphd.common.wire.payload import MOST, MOST_OF_CLIENT, Payload, Shown
from fedphd.common.wire.traffic import Traffic

PROTOCOL: Final = 8
PACKAGE_VERSION: Final = version("fedphd")

HELLO: Final = "query.hello"
FINISH: Final = "query.finish"
STATISTICS: Final = "query.statistics"
TRAIN: Final = "train"


# Of what a server sends, and an edge of ten thousand clients that all failed.
_LONG: Final = 32 << 20

# A SHA-256.
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Greeting(Payload):
    """What says who speaks. Unknown keys pass, so that versions can tell one another apart."""

    model_config = ConfigDict(extra="ignore")

    protocol: int = PROTOCOL
    version: str = PACKAGE_VERSION

    def mismatch(self, speaker: str) -> str | None:
        """Why ``speaker``, who sent this, is not understood here, and the fix; None if it is."""
        if self.protocol == PROTOCOL:
            return None
        return (
            f"{speaker} speaks protocol {self.protocol} (fedphd {self.version}); this is protocol "
            f"{PROTOCOL} (fedphd {PACKAGE_VERSION}): install the same version on every machine"
        )


class Hello(_Greeting):
    """Server to node: who are you? The first message to every node that appears."""

    asking: str
    # An edge greets its own new clients before it answers; in seconds.
    wait_s: float = Field(20.0, gt=0)


class HelloReply(_Greeting):
    """A node introduces itself; an edge also lists the clients that it sees now.

    ``holds`` is the digest of the weights that the cloud's next difference may build on.
    """

    # An edge may have ten thousand clients.
    most_bytes: ClassVar[int] = 4 << 20

    kind: Literal["client", "edge"]
    name: str
    num_samples: int = Field(0, ge=0)
    clients: dict[str, int] = Field(default_factory=dict)
    holds: Digest | None = None


class _WithLayout(Payload):
    layout: str

    def tensor_layout(self) -> TensorLayout:
        """The manifest of names and shapes; raises ReplyError if it is malformed."""
        try:
            return TensorLayout.from_json(self.layout)
        except ValueError as error:
            raise ReplyError(f"layout of the weights is malformed: {error}") from error


class UNetSpec(_WithLayout):
    """The U-Net that a message's flat weights belong to; ``layout`` lists those that travel."""

    unet: dict[str, Any]


def _in_order(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    if not parts or parts != joined([parts]):
        raise ValueError(f"{list(parts)} are not parts of a U-Net, each once and in its order")
    return parts


# At least one part, each once, in the order of the network.
SomeParts = Annotated[tuple[Part, ...], AfterValidator(_in_order)]


# Of each time that a run was resumed, after how many intervals it went on.
Resumed = tuple[Annotated[int, Field(ge=0)], ...]


class TrainTask(Payload):
    """Edge to client: train these weights on your data for one edge round.

    ``parts`` of the U-Net come with it, ``send`` are to go back. What does not come starts from
    what the client has, or from the seeded weights of ``initial``, the U-Net before pruning.
    The weights come as ``codec`` packed them, and go back as ``reply_codec`` does, on top of those
    that came. ``run_name`` and ``resumed`` are as in ``IntervalTask``.
    """

    most_bytes: ClassVar[int] = _LONG

    edge_id: str
    interval: int = Field(ge=1)
    edge_round: int = Field(ge=1)
    network: UNetSpec
    diffusion: run.DiffusionConfig
    training: run.TrainingConfig
    objective: run.ObjectiveConfig = Field(default_factory=run.ObjectiveConfig)
    parts: SomeParts = PARTS
    send: SomeParts = PARTS
    initial: run.ModelConfig | None = None
    sparsity_lambda: float = Field(ge=0)
    optimizer_moments: Literal["prune", "reset"]
    cut: str | None = None
    codec: CodecName = "fp32"
    reply_codec: CodecName = "fp32"
    seed: int = Field(ge=0, le=run.MOST_SEED)
    run_name: str = Field("", max_length=64)
    resumed: Resumed = ()

    @property
    def attempt(self) -> int:
        """How often the run was resumed."""
        return len(self.resumed)


class TrainReply(Payload):
    """Client to edge, with its weights: how the round went."""

    client_id: str
    interval: int = Field(ge=1)
    edge_round: int = Field(ge=1)
    network: UNetSpec
    num_examples: int = Field(ge=0)
    metrics: TrainMetrics
    steps: int = Field(ge=0, le=MOST_OF_CLIENT)


class IntervalTask(Payload):
    """Cloud to edge: run one interval from these weights; the whole plan is in ``plan``.

    With ``base`` the weights are a difference to those with that digest, which the edge holds, cut
    as ``cut`` says if the network was pruned since; without, they come whole, as float32. They come
    to those with ``digest``, which the edge holds from then on; None: it need not.

    ``num_edges`` get an order for this interval. ``num_clients`` are those that an edge sees, or
    that have trained. ``run_name`` names the run, ``resumed`` says after which interval it went on
    each time that it was resumed: those after it came again. No client trained in ``tries`` of this
    interval before.
    """

    most_bytes: ClassVar[int] = _LONG

    interval: int = Field(ge=1)
    tries: int = Field(0, ge=0)
    sparse: bool
    num_edges: int = Field(ge=1)
    num_clients: int = Field(ge=1)
    network: UNetSpec
    cut: str | None = None
    base: Digest | None = None
    digest: Digest | None = None
    run_name: str = Field("", max_length=64)
    resumed: Resumed = ()
    plan: run.FederationConfig

    @property
    def attempt(self) -> int:
        """How often the run was resumed."""
        return len(self.resumed)


class RoundMembers(Payload):
    """Who trained in an edge round, and who was left out of it, by name."""

    clients: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


class IntervalReply(Payload):
    """Edge to cloud, with its weights: how the interval went.

    ``parts`` are those that it sends; ``images`` those of all clients' optimiser steps together.
    ``metrics`` weigh by the images that trained in an edge round, on average; their validation
    loss is that of the cloud's weights, as the clients of the first edge round received them.
    ``rounds`` are its edge rounds, in their order.
    """

    most_bytes: ClassVar[int] = _LONG

    edge_id: str
    interval: int = Field(ge=1)
    network: UNetSpec
    parts: tuple[Part, ...] = PARTS
    samples_per_round: float = Field(ge=0)
    client_rounds: int = Field(ge=0)
    label_distribution: tuple[float, ...]
    metrics: TrainMetrics
    mean_steps: float = Field(ge=0, le=MOST)
    images: int = Field(0, ge=0, le=MOST)
    traffic: Traffic
    clients: tuple[str, ...] = ()
    rounds: tuple[RoundMembers, ...] = ()
    failures: tuple[Shown, ...] = ()


class ExtractorSpec(_WithLayout):
    """The network whose features are summed up; its flat weights travel beside it."""

    kind: Literal["classifier", "inception"]
    name: str = Field(min_length=1, max_length=200)
    # Their outer products are summed: 134 MB for the most, and 34 MB for Inception's 2048.
    num_features: int = Field(ge=1, le=4096)
    channels: int = Field(ge=1, le=4)
    image_size: int = Field(ge=4, le=1024)
    num_classes: int = Field(ge=1, le=run.MOST_CLASSES)

    @classmethod
    def inception(cls, layout: str) -> Self:
        """Inception v3, which takes images of any size."""
        return cls(
            kind="inception",
            name=run.INCEPTION,
            num_features=2048,
            channels=3,
            image_size=299,
            num_classes=1008,
            layout=layout,
        )


class StatisticsTask(Payload):
    """Cloud to edge, and edge to client: sum up the features of the training images."""

    most_bytes: ClassVar[int] = _LONG

    extractor: ExtractorSpec
    image_size: int = Field(ge=4, le=1024)
    channels: int = Field(ge=1, le=4)
    num_classes: int = Field(ge=1, le=run.MOST_CLASSES)
    batch_size: int = Field(ge=1)
    wait_s: float = Field(gt=0)
    clients: tuple[str, ...] = ()


class StatisticsReply(Payload):
    """The sums beside it, one float64 vector, are of ``count`` images."""

    most_bytes: ClassVar[int] = 4 << 20

    name: str
    count: int = Field(ge=0, le=MOST)
    label_counts: tuple[int, ...]
    clients: tuple[str, ...] = ()
    failures: tuple[Shown, ...] = ()
    traffic: Traffic = Traffic()


class Finish(Payload):
    """The run is over; said by the cloud to its edges, and by an edge to its clients."""

    exit_code: int
    message: str


class Ack(Payload):
    """Answer to a message that asks for nothing."""

    name: str
