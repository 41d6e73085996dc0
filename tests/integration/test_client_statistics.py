"""A cloud without images: the clients' statistics are those of all their images together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from support.clients import NUM_CLIENTS, clients
from support.clients import PARTS as CLIENT_PARTS
from support.federation import FIRST_CLIENT, TINY, Federation, one_at_a_time, run_simulated
from support.memory import MemoryGrid

from fedphd.common.config.data import DataConfig, PartitionConfig
from fedphd.common.data.images import ImageSet, LabelledImages
from fedphd.common.errors import ConfigError, ParticipantsError
from fedphd.common.quality.classifier import ClassifierSettings, load_feature_classifier
from fedphd.common.quality.extractor import classifier_extractor, load_extractor, save_extractor
from fedphd.common.quality.moments import FeatureStatistics, StatisticsFile
from fedphd.common.wire.messages import STATISTICS
from fedphd.deploy.launch.runs import Resumed

CPU = torch.device("cpu")
PARTS = 30


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of public data, here of half of the digits."""
    folder = tmp_path_factory.mktemp("features")
    data = LabelledImages(DataConfig()).decode(image_size=8, channels=1)
    proxy = data.subset(torch.arange(0, len(data), 2))
    model = load_feature_classifier(
        proxy, ClassifierSettings(epochs=2), cache_dir=folder, device=CPU
    )
    save_extractor(classifier_extractor(model, name="proxy"), folder / "features.safetensors")
    return folder / "features.safetensors"


def settings(features: Path, **more: Any) -> dict[str, Any]:
    return {
        "evaluation.features_file": str(features),
        "evaluation.reference_clients": True,
        "schedule.intervals": 1,
        **more,
    }


def pooled(features: Path, numbers: range, *, num_parts: int = PARTS) -> FeatureStatistics:
    """Statistics of the clients' images, laid together in one place."""
    parts = [
        LabelledImages(
            DataConfig(partition=PartitionConfig(num_partitions=num_parts, partition_id=number))
        ).decode(image_size=8, channels=1)
        for number in numbers
    ]
    together = ImageSet(
        torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    )
    extractor = load_extractor(features)
    return extractor.statistics(together, num_classes=10, batch_size=1000, device=CPU)


def assert_equal_statistics(got: FeatureStatistics, expected: FeatureStatistics) -> None:
    """To a relative 1e-6, in the norm of each."""
    assert (got.count, got.label_counts) == (expected.count, expected.label_counts)
    for name in ("sums", "outer", "mean", "covariance"):
        mine, its = getattr(got, name), getattr(expected, name)
        assert (mine - its).norm() <= 1e-6 * its.norm(), name


def simulate(grid: MemoryGrid, folder: Path, overrides: dict[str, Any]) -> None:
    run_simulated(grid, folder, {**TINY, "schedule.min_clients": NUM_CLIENTS, **overrides})


def statistics_messages(grids: list[MemoryGrid]) -> list[Message]:
    return [m for grid in grids for m in grid.pushed if m.metadata.message_type == STATISTICS]


def test_the_clients_sums_are_those_of_all_images(features: Path, tmp_path: Path) -> None:
    # After the first interval the average is still the raw weights.
    more = {"evaluation.raw_too": True, "schedule.intervals": 2}
    federation = Federation(tmp_path, settings(features, **more), num_clients=5)
    assert federation.run().exit_code == 0
    kept = StatisticsFile.load(federation.run_dir / "statistics.safetensors")
    assert kept.features == "classifier(proxy)"
    expected = pooled(features, range(5))
    assert_equal_statistics(kept.statistics, expected)
    # Every client sees both edges, and is asked through one of them.
    assert len(statistics_messages(federation.edge_grids)) == 5
    assert [len(statistics_messages([grid])) for grid in federation.edge_grids] == [3, 2]
    (event,) = federation.events("client_statistics")
    assert event["clients"] == [f"client-{n}" for n in range(5)]
    assert (event["failures"], event["num_images"]) == ([], expected.count)
    assert event["client_edge_bytes"] > 0
    summary = federation.summary()
    assert summary["client_statistics"]["edge_cloud_bytes"] == event["edge_cloud_bytes"]
    links = [summary["client_statistics"], *summary["rounds"]]
    assert sum(part["client_edge_bytes"] for part in links) == summary["bytes"]["client_edge"]
    assert sum(part["edge_cloud_bytes"] for part in links) == summary["bytes"]["edge_cloud"]
    evaluation = summary["evaluation"]
    assert evaluation["features"] == "classifier(proxy)"
    assert evaluation["reference_sha256"] == kept.statistics.sha256()
    assert evaluation["num_reference_images"] == expected.count
    assert evaluation["frechet_distance"] > 0
    assert evaluation["raw"]["frechet_distance"] != evaluation["frechet_distance"]
    # Nobody's single features are there to compare with.
    assert evaluation["precision"] is None
    assert sum(evaluation["class_shares"]) == pytest.approx(1)


def test_a_run_that_goes_on_compares_in_the_features_that_it_began_with(
    features: Path, tmp_path: Path
) -> None:
    own = tmp_path / "features.safetensors"
    shutil.copy(features, own)
    federation = Federation(tmp_path, settings(own))
    assert federation.run().exit_code == 0
    longer = settings(own, **{"schedule.intervals": 2})
    other = load_extractor(features)
    with torch.no_grad():
        next(other.network.parameters()).add_(0.1)
    save_extractor(other, own)
    with pytest.raises(ConfigError, match=r"the clients' statistics = .* with other weights than"):
        Federation(tmp_path, longer).run(resumed=Resumed(interval=1))
    shutil.copy(features, own)
    assert Federation(tmp_path, longer).run(resumed=Resumed(interval=1)).exit_code == 0


def test_a_flat_federation_gives_the_same(features: Path, tmp_path: Path) -> None:
    simulate(clients(), tmp_path, {**settings(features), "topology": "flat"})
    kept = StatisticsFile.load(tmp_path / "statistics.safetensors")
    expected = pooled(features, range(NUM_CLIENTS), num_parts=CLIENT_PARTS)
    assert_equal_statistics(kept.statistics, expected)


def test_virtual_edges_ask_every_client_once(features: Path, tmp_path: Path) -> None:
    grid = clients()
    simulate(grid, tmp_path, settings(features))
    kept = StatisticsFile.load(tmp_path / "statistics.safetensors")
    expected = pooled(features, range(NUM_CLIENTS), num_parts=CLIENT_PARTS)
    assert_equal_statistics(kept.statistics, expected)
    assert len(statistics_messages([grid])) == NUM_CLIENTS


def failing(grid: MemoryGrid, number: int) -> None:
    """Have a client fail on statistics, and on nothing else."""
    answer = grid.nodes[FIRST_CLIENT + number]

    def handle(message: Message) -> Message | None:
        if message.metadata.message_type == STATISTICS:
            raise ConfigError("its disk is gone")
        return answer(message)

    grid.nodes[FIRST_CLIENT + number] = one_at_a_time(handle)


def test_a_client_that_fails_is_named_and_the_others_count(features: Path, tmp_path: Path) -> None:
    federation = Federation(tmp_path, settings(features))
    for grid in federation.edge_grids:
        failing(grid, 2)
    assert federation.run().exit_code == 0
    kept = StatisticsFile.load(federation.run_dir / "statistics.safetensors")
    others = pooled(features, range(2)) + pooled(features, range(3, 4))
    assert_equal_statistics(kept.statistics, others)
    (event,) = federation.events("client_statistics")
    assert event["num_images"] == others.count
    assert "client-2" not in event["clients"]
    (failure,) = event["failures"]
    assert failure.startswith("client-2: ")
    assert "its disk is gone" in failure


def test_nobody_at_all_ends_the_run(features: Path, tmp_path: Path) -> None:
    federation = Federation(tmp_path, settings(features))
    for grid in federation.edge_grids:
        for number in range(4):
            failing(grid, number)
    with pytest.raises(ParticipantsError, match=r"no client gave reference stat.*client-3: "):
        federation.run()


def test_features_for_other_images_end_the_run_before_it_waits(
    features: Path, tmp_path: Path
) -> None:
    federation = Federation(tmp_path, {**settings(features), "model.image_size": 16})
    with pytest.raises(ConfigError, match=r"for images of shape \(1, 8, 8\), these are \(1, 16"):
        federation.run()
    assert federation.cloud_grid.pushed == []


def test_training_flops_follow_macs_and_images(features: Path, tmp_path: Path) -> None:
    """Two epochs in each of two intervals of one round, pruned after the first."""
    federation = Federation(
        tmp_path,
        settings(
            features,
            **{
                "schedule.intervals": 2, "pruning.mode": "scheduled", "pruning.sparse_rounds": 1,
            },
        ),
    )  # fmt: skip
    assert federation.run().exit_code == 0
    summary = federation.summary()
    images = 2 * pooled(features, range(4)).count
    dense, pruned = summary["macs"]["before"], summary["macs"]["after"]
    flops = [6 * dense * images, 6 * pruned * images]
    assert pruned < dense
    assert [row["images"] for row in summary["rounds"]] == [images, images]
    assert [row["training_flops"] for row in summary["rounds"]] == flops
    assert summary["training_cost"]["flops"] == sum(flops)
    assert "3 x 2 x MACs" in json.dumps(summary["training_cost"])
