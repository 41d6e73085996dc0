"""Data that another process opens is what this one would have read."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fedphd.common.config.data import DataConfig, PartitionConfig
from fedphd.common.data.apart import Opening
from fedphd.common.data.images import LabelledImages
from fedphd.common.errors import ConfigError

PART = PartitionConfig(num_partitions=20, partition_id=7)


def opening_of(config: DataConfig) -> Opening:
    opening = Opening.begin(config)
    assert opening is not None
    return opening


@pytest.mark.parametrize("partition", [None, PART, PART.model_copy(update={"kind": "dirichlet"})])
def test_the_same_images_labels_and_parts(partition: PartitionConfig | None) -> None:
    config = DataConfig(partition=partition, validation_fraction=0.2)
    apart, here = LabelledImages(config, opening_of(config).wait()), LabelledImages(config)
    assert apart.part_sizes == here.part_sizes
    assert apart.partition_name == here.partition_name
    assert np.array_equal(apart.train_indices, here.train_indices)
    ours, theirs = (data.decode(image_size=8, channels=1) for data in (apart, here))
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.labels, theirs.labels)


def test_a_split_that_cannot_be_made_is_this_processs_error() -> None:
    config = DataConfig(partition=PartitionConfig(num_partitions=2000))
    opened = opening_of(config).wait()
    assert opened is None
    with pytest.raises(ConfigError, match="only 1797 images"):
        LabelledImages(config, opened)


@pytest.mark.parametrize(
    "config", [DataConfig(source="some/name"), DataConfig(max_images=100),
               DataConfig(format="parquet"), DataConfig(label_file="labels.csv")],
)  # fmt: skip
def test_only_the_digits_as_they_are_are_opened_apart(config: DataConfig) -> None:
    assert Opening.begin(config) is None


def test_what_that_takes_stays_out_of_this_process() -> None:
    code = """
import sys
from fedphd.common.config.data import DataConfig, PartitionConfig
from fedphd.common.data.apart import Opening
config = DataConfig(partition=PartitionConfig(num_partitions=6, partition_id=0))
opening = Opening.begin(config)
from fedphd.common.data.images import LabelledImages
assert len(LabelledImages(config, opening.wait()).labels) > 0
print([name for name in ("sklearn", "datasets", "pandas", "pyarrow") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_other_process_imports_no_more_than_it_needs() -> None:
    code = """
import sys
from fedphd.common.data.apart import main
main()
left_out = ("sklearn", "scipy", "matplotlib", "seaborn", "torch")
print([name for name in left_out if name in sys.modules], file=sys.stderr)
# It is there for whoever wants plots of a split.
from flwr_datasets.visualization import plot_label_distributions
print(plot_label_distributions.__module__, "matplotlib" in sys.modules, file=sys.stderr)
"""
    command = [sys.executable, "-c", code, PART.model_dump_json()]
    done = subprocess.run(command, capture_output=True)
    assert done.stderr.decode() == "[]\nflwr_datasets.visualization.label_distribution True\n"
