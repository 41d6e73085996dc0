"""What edges ask a client, and a client that answers as Flower's own app lets it."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import Context, Message, RecordDict

from fedphd.client.app import ClientRuntime, build_app
from fedphd.common.config.roles import ClientConfig
from fedphd.common.config.run import DiffusionConfig, ModelConfig, TrainingConfig
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_unet, unet_config
from fedphd.common.wire.messages import (
    TrainTask,
    UNetSpec,
)
from fedphd.common.wire.offers import Choose, Offer
from fedphd.common.wire.payload import Payload
from fedphd.common.wire.records import to_records

TARGET = (0.1,) * 10
MODEL = ModelConfig(
    block_out_channels=(8, 16), attention_levels=(1,), attention_head_dim=4, norm_num_groups=4
)


def config(partition_id: int = 0, **partition: Any) -> ClientConfig:
    """A client with two classes of the digits, in a sixtieth of them."""
    part = {"num_partitions": 60, "partition_id": partition_id} | partition
    return ClientConfig.model_validate(
        {"client_id": f"client-{partition_id}", "data": {"partition": part}, "device": "cpu"}
    )


def offer(edge_id: str, num_samples: float = 0.0, label: int | None = None) -> Offer:
    """An edge that holds nothing, or only images of one class."""
    shares = TARGET if label is None else tuple(float(n == label) for n in range(10))
    return Offer(edge_id=edge_id, label_distribution=shares, num_samples=num_samples)


def question(*offers: Offer, asking: str = "edge-0", **changes: Any) -> Choose:
    values: dict[str, Any] = {
        "interval": 1, "edge_round": 1, "target": TARGET, "policy": "homogeneity", "factor": 100.0,
        "offset": 0.0, "epsilon": 1e-8, "seed": 0, "offer_wait_s": 0.0, "synchronised": False,
        "num_edges": 2,
    }  # fmt: skip
    return Choose(asking=asking, offers=offers, **(values | changes))


class App:
    """The ClientApp of one runtime, spoken to with messages."""

    def __init__(self, runtime: ClientRuntime) -> None:
        self.app = build_app(lambda context: runtime)
        self.context = Context(
            run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={}
        )

    def ask(
        self,
        kind: str,
        payload: Payload,
        weights: torch.Tensor | None = None,
        variate: torch.Tensor | None = None,
    ) -> Message:
        """One message there and back."""
        records = to_records(payload, weights, variate)
        return self.app(Message(records, 2, kind), self.context)


def task(**changes: Any) -> tuple[TrainTask, torch.Tensor]:
    """One edge round of a tiny U-Net, and its weights, (numel,)."""
    unet = build_unet(MODEL, seed=0)
    layout = TensorLayout.of(unet.state_dict())
    values: dict[str, Any] = {
        "edge_id": "edge-0", "interval": 1, "edge_round": 1, "seed": 0,
        "network": UNetSpec(unet=unet_config(unet), layout=layout.to_json()),
        "diffusion": DiffusionConfig(), "training": TrainingConfig(batch_size=8, local_amount=1),
        "sparsity_lambda": 0.0, "optimizer_moments": "prune",
    }  # fmt: skip
    return TrainTask(**(values | changes)), layout.pack(unet.state_dict())
