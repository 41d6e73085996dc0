"""Where a participant's images and labels are, and which part of them it holds.

``Section`` is the base of these and of all other sections (``common/config/run.py``).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all configuration sections: frozen, strict types, finite, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PartitionConfig(Section):
    """Which part of the data set this process holds (flwr-datasets partitioners)."""

    kind: Literal["pathological", "dirichlet", "iid"] = Field(
        "pathological",
        description="pathological: a fixed number of classes per client; dirichlet: label "
        "shares drawn from Dirichlet(alpha); iid: equal shuffled shares",
    )
    num_partitions: int = Field(6, ge=1, description="parts that the data set is cut into")
    partition_id: int = Field(0, ge=0, description="which part is this client's, from 0")
    classes_per_partition: int = Field(2, ge=1, description="classes per client (pathological)")
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration (dirichlet)")
    min_partition_size: int = Field(10, ge=1, description="fewest images per part (dirichlet)")
    seed: int = Field(0, ge=0, description="seed of the split; the same for all clients")

    @model_validator(mode="after")
    def _partition_exists(self) -> PartitionConfig:
        if self.partition_id >= self.num_partitions:
            raise ValueError(
                f"partition_id = {self.partition_id}, but there are num_partitions = "
                f"{self.num_partitions} parts; use 0 to {self.num_partitions - 1}"
            )
        return self


class DataConfig(Section):
    """An image data set with labels: the embedded digits, or anything HF ``datasets`` can load."""

    source: str = Field(
        "digits", min_length=1, description="'digits' (embedded), a hub name, or a local path"
    )
    format: Literal["auto", "parquet", "imagefolder", "saved", "hub"] = Field(
        "auto", description="how to read source; auto decides by the path"
    )
    split: str = Field("train", min_length=1, description="split of the data set")
    image_column: str = Field("image", min_length=1, description="column with the images")
    label_column: str = Field("label", min_length=1, description="column with integer labels")
    attribute_file: str | None = Field(
        None, description="attribute list (CelebA's text, or CSV) to take the labels from"
    )
    label_attributes: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="attributes that make the class, binary digits from the most significant: "
        '["Male", "Young"] is 2 * Male + Young',
    )
    label_file: str | None = Field(
        None, description="file written by `fedphd pseudo-labels` to take the labels from"
    )
    partition: PartitionConfig | None = Field(
        None, description="which part of it is used; absent: all of it"
    )
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a client's images that it holds out from training, to measure "
        "the loss of the weights that it receives on them",
    )

    @model_validator(mode="after")
    def _labels_have_one_origin(self) -> DataConfig:
        if (self.label_attributes is None) != (self.attribute_file is None):
            given, other = "label_attributes", "attribute_file"
            if self.label_attributes is None:
                given, other = other, given
            raise ValueError(f"{given} needs {other}; give both, or neither")
        if self.label_attributes and len(set(self.label_attributes)) < len(self.label_attributes):
            raise ValueError(
                f"label_attributes = {list(self.label_attributes)} names an attribute twice"
            )
        if self.label_file is not None and self.attribute_file is not None:
            raise ValueError("label_file and attribute_file both give labels; keep one")
        return self
