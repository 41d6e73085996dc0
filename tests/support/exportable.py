"""Folders of finished runs whose owners have secrets, for what is shared of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.data.partition import PARTITION_FILE
from fedphd.common.events import write_json
from fedphd.common.history.evaluation import Anchors, EvaluationRecord, Quality
from fedphd.common.history.events import StatisticsFigures
from fedphd.common.history.progress import Progress, Reported
from fedphd.common.history.summary import IntervalCosts
from fedphd.common.unet.checkpoint import CHECKPOINT, save_checkpoint
from fedphd.common.unet.model import build_scheduler, build_unet
from fedphd.common.wire.traffic import Traffic
from fedphd.deploy.launch.runs import CLIENTS, CONFIG
from fedphd.server.pruning import count_costs, prune_unet

CLIENT: Final = "ward-7-mueller"
SOURCE: Final = "/clinic/lungs-of-bern/train.parquet"
# What must not be found in a folder that is shared.
SECRETS: Final = (CLIENT, "clinic", "lungs", "bern", "cloud-key", "feature-file")
SETTINGS: Final[dict[str, Any]] = {
    "model.block_out_channels": [8, 16],
    "model.norm_num_groups": 4,
    "model.attention_head_dim": 4,
    "schedule.intervals": 2,
    "pruning.sparse_rounds": 5,
    "pruning.ratio": 0.5,
    "evaluation.reference.source": SOURCE,
    "evaluation.features_file": "/clinic/feature-file.safetensors",
    "superlink.ssl_certfile": "/clinic/cloud-key.pem",
    "superlink.ssl_keyfile": "/clinic/cloud-key.key",
    "superlink.ssl_ca_certfile": "/clinic/cloud-key-ca.pem",
}
# A machine that does a GFLOP per joule needs a kilowatt hour for it.
TRAINING_FLOPS: Final = 3.6e15


def write_exportable(
    folder: Path,
    *,
    pruned: bool,
    **settings: Any,
) -> Path:
    """A run's folder, with averaged weights twice the raw ones.

    Args:
        pruned: after the first of its two intervals, to half of the widths.
        settings: dotted keys with ``__`` for ``.``.
    """
    mode = "scheduled" if pruned else "none"
    own = {key.replace("__", "."): value for key, value in settings.items()}
    config = load_config(CloudConfig, None, {**SETTINGS, "pruning.mode": mode, **own})
    dense = build_unet(config.model, seed=0)
    cut = prune_unet(dense, ratio=config.pruning.ratio) if pruned else None
    unet = cut.unet if cut else dense
    quality = Quality(
        frechet_distance=12.5, precision=0.75, recall=0.5, least_class=3, least_class_ratio=0.25
    )
    record = EvaluationRecord(
        **quality.model_dump(),
        interval=2,
        features="classifier(lungs-of-bern)",
        num_samples=64,
        sampler="DDIM",
        sampling_steps=20,
        seed=1234,
        num_reference_images=99,
        reference_sha256="ab" * 32,
        anchors=Anchors(real=2.0),
        seconds=1.0,
    )
    row = IntervalCosts(
        interval=1, client_rounds=3, client_edge_bytes=0, edge_cloud_bytes=0, images=9,
        training_flops=TRAINING_FLOPS / 2,
    )  # fmt: skip
    asked = StatisticsFigures(
        num_images=99, label_counts=[9], clients=[CLIENT], failures=[f"{CLIENT}: late"],
        client_edge_bytes=0, edge_cloud_bytes=0,
    )  # fmt: skip
    progress = Progress(
        interval=2,
        intervals=2,
        ema_steps=40.0,
        config=config.federation().model_dump(mode="json"),
        run="r",
        resumed=(),
        events=0,
        elapsed_s=61.0,
        reported=Reported(
            dense=count_costs(dense),
            costs=count_costs(unet),
            client_edge=Traffic(sent_bytes=5_000_000),
            cloud=Traffic(sent_bytes=2_000_000),
            evaluations=[record],
            pruning=cut.report if cut else None,
            rounds=[row, row.model_copy(update={"interval": 2})],
            client_statistics=asked,
            ema_steps=40.0,
            ema_span=5.0,
        ),
    )
    save_checkpoint(
        folder / CHECKPOINT,
        unet=unet,
        ema_state={name: 2 * tensor for name, tensor in unet.state_dict().items()},
        scheduler=build_scheduler(config.diffusion),
        state=json.loads(progress.model_dump_json()),
    )
    write_json(folder / CONFIG, config.model_dump(mode="json"))
    write_json(folder / CLIENTS, {"data.source": SOURCE})
    split = {"name": "lungs-of-bern-pathological-2x3-seed0-00c0ffee", "sizes": [30, 33, 36]}
    write_json(folder / PARTITION_FILE, split)
    (folder / "metrics.jsonl").write_text(json.dumps({"clients": [CLIENT]}) + "\n", "utf-8")
    return folder
