"""Codecs on real federations in one process: they learn as with float32, in fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.federation import Federation

from fedphd.common.config.wire import WireConfig
from fedphd.common.unet.model import PrunedUNet

RUN: dict[str, Any] = {
    "schedule.intervals": 2,
    "schedule.edge_rounds": 2,
    "training.local_amount": 1,
    "pruning.mode": "none",
    "reproducible": True,
}
CODECS = {
    "wire.cloud_down": "bf16", "wire.client_down": "bf16",
    "wire.cloud_up": "int8", "wire.client_up": "int8",
}  # fmt: skip
DEFAULTS = {f"wire.{link}": codec for link, codec in WireConfig().model_dump().items()}


def finished(folder: Path, settings: dict[str, Any]) -> Federation:
    federation = Federation(folder, {**RUN, **settings})
    assert federation.run().exit_code == 0
    assert not any(event["failures"] for event in federation.events("interval"))
    return federation


def weights(federation: Federation) -> torch.Tensor:
    unet = PrunedUNet.from_pretrained(federation.run_dir / "checkpoint", subfolder="unet")
    return torch.nn.utils.parameters_to_vector(unet.parameters()).detach()


@pytest.mark.parametrize("codecs", [CODECS, DEFAULTS], ids=["int8", "defaults"])
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_codecs_hardly_change_the_result_and_save_bytes(
    method: str, codecs: dict[str, Any], tmp_path: Path
) -> None:
    own = {"objective.method": method}
    exact = finished(tmp_path / "exact", own)
    coded = finished(tmp_path / "coded", {**own, **codecs})
    again = finished(tmp_path / "again", {**own, **codecs})
    assert torch.equal(weights(coded), weights(again)), "the same bits every time"
    apart = (weights(coded) - weights(exact)).norm() / weights(exact).norm()
    assert 0 < apart < 0.05
    losses = [[e["loss"] for e in run.events("interval")] for run in (coded, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    for link in ("client_edge", "edge_cloud"):
        saved = 1 - coded.summary()["bytes"][link] / exact.summary()["bytes"][link]
        # Biases and norms, many in so small a network, and the messages' scalars stay.
        assert saved > 0.3, link


def test_half_of_a_network_that_shrinks_travels_coded(tmp_path: Path) -> None:
    pruning = {"pruning.mode": "scheduled", "pruning.sparse_rounds": 2}
    run = finished(tmp_path, {"exchange.parts": "usplit", **pruning, **CODECS})
    assert len(run.events("pruned")) == 1
