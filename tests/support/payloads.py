"""One message of each kind."""

from __future__ import annotations

from support.metrics import metrics

from fedphd.common.config.run import DiffusionConfig, FederationConfig, TrainingConfig
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.messages import (
    Ack,
    ExtractorSpec,
    Finish,
    Hello,
    HelloReply,
    IntervalReply,
    IntervalTask,
    StatisticsReply,
    StatisticsTask,
    TrainReply,
    TrainTask,
    UNetSpec,
)
from fedphd.common.wire.offers import Choose, ChooseReply, Offer
from fedphd.common.wire.payload import Payload
from fedphd.common.wire.traffic import Traffic

LAYOUT = TensorLayout(("conv.weight", "conv.bias"), ((2, 2), (3,)))
NETWORK = UNetSpec(unet={"image_size": 8, "widths": [8, 16]}, layout=LAYOUT.to_json())
OFFER = Offer(edge_id="edge-0", label_distribution=(0.25, 0.75), num_samples=40.0)
TRAIN_REPLY = TrainReply(
    client_id="client-0", interval=2, edge_round=3, network=NETWORK, num_examples=10,
    metrics=metrics(loss=0.5, sparsity_penalty=7.0, validation_loss=0.25), steps=4,
)  # fmt: skip
PAYLOADS: list[Payload] = [
    Hello(asking="edge-0"),
    HelloReply(kind="edge", name="edge-0", clients={"client-0": 10}),
    Choose(
        asking="edge-0", interval=1, edge_round=2, offers=(OFFER,), target=(0.5, 0.5),
        policy="balanced", factor=4.0, offset=-1.0, epsilon=1e-8, seed=0, offer_wait_s=5.0,
        synchronised=True, num_edges=2, run_name="r", attempt=1,
    ),
    ChooseReply(client_id="a", edge_id="edge-0", label_counts=(1, 2)),
    TrainTask(
        edge_id="edge-0", interval=1, edge_round=1, network=NETWORK, diffusion=DiffusionConfig(),
        training=TrainingConfig(), sparsity_lambda=1e-4, optimizer_moments="prune", cut="{}",
        seed=2**62,
    ),
    TRAIN_REPLY,
    IntervalTask(
        interval=1, sparse=True, num_edges=2, num_clients=3, network=NETWORK,
        plan=FederationConfig(seed=3),
    ),
    IntervalReply(
        edge_id="edge-0", interval=1, network=NETWORK, samples_per_round=12.5, client_rounds=2,
        label_distribution=(0.1, 0.9), metrics=metrics(25, loss=0.1 + 0.2), mean_steps=1.5,
        traffic=Traffic(sent_bytes=2**40, received_bytes=1),
        clients=("client-0",), failures=("client-1: gone",),
    ),
    StatisticsTask(
        extractor=ExtractorSpec.inception("[]"), image_size=8, channels=1,
        num_classes=2, batch_size=64, wait_s=1.5, clients=("client-0",),
    ),
    StatisticsReply(
        name="edge-0", count=3, label_counts=(1, 2), clients=("client-0",), failures=("b: gone",),
        traffic=Traffic(sent_bytes=1),
    ),
    Finish(exit_code=0, message="finished"),
    Ack(name="edge-0"),
]  # fmt: skip
