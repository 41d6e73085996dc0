"""Where a participant's images and labels are, and which part of them it holds.

``Section`` is the base of these and of all other sections (``common/config/run.py``).
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all configuration sections: frozen, strict types, finite, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def setting(default: object, meaning: str, **limits: Any) -> Any:
    """A field of a section: its default, its meaning in a sentence, and pydantic's limits."""
    return Field(default, description=meaning, **limits)


class PartitionConfig(Section):
    """Which part of the data set this process holds (flwr-datasets partitioners)."""

    kind: Literal["pathological", "dirichlet", "iid"] = setting(
        "pathological",
        "pathological: a fixed number of classes per client; dirichlet: label shares drawn from "
        "Dirichlet(alpha); iid: equal shuffled shares",
    )
    num_partitions: int = setting(6, "parts that the data set is cut into", ge=1)
    partition_id: int = setting(0, "which part is this client's, from 0", ge=0)
    classes_per_partition: int = setting(2, "classes per client (pathological)", ge=1)
    alpha: float = setting(0.5, "Dirichlet concentration (dirichlet)", gt=0)
    min_partition_size: int = setting(10, "fewest images per part (dirichlet)", ge=1)
    seed: int = setting(0, "seed of the split; the same for all clients", ge=0)

    @model_validator(mode="after")
    def _partition_exists(self) -> Self:
        if self.partition_id >= self.num_partitions:
            raise ValueError(
                f"partition_id = {self.partition_id}, but there are num_partitions = "
                f"{self.num_partitions} parts; use 0 to {self.num_partitions - 1}"
            )
        return self


class DataConfig(Section):
    """An image data set with labels: the embedded digits, or anything HF ``datasets`` can load."""

    source: str = setting(
        "digits", "'digits' (embedded), a hub name, or a local path", min_length=1
    )
    format: Literal["auto", "parquet", "imagefolder", "saved", "hub"] = setting(
        "auto", "how to read source; auto decides by the path"
    )
    split: str = setting("train", "split of the data set", min_length=1)
    image_column: str = setting("image", "column with the images", min_length=1)
    label_column: str = setting("label", "column with integer labels", min_length=1)
    attribute_file: str | None = setting(
        None, "attribute list (CelebA's text, or CSV) to take the labels from"
    )
    label_attributes: tuple[str, ...] | None = setting(
        None,
        "attributes that make the class, binary digits from the most significant: "
        '["Male", "Young"] is 2 * Male + Young',
        min_length=1,
        # Every one doubles the number of classes, and a label is at most 2^31 - 1.
        max_length=31,
    )
    label_file: str | None = setting(
        None, "file written by `fedphd pseudo-labels` to take the labels from"
    )
    max_images: int | None = setting(
        None, "use at most so many images, drawn from all and the same for everybody", ge=1
    )
    partition: PartitionConfig | None = setting(None, "which part of it is used; absent: all of it")
    validation_fraction: float = setting(
        0.0,
        "share of a client's images that it holds out from training, to measure the loss of the "
        "weights that it receives on them",
        ge=0,
        lt=1,
    )

    @model_validator(mode="after")
    def _labels_have_one_origin(self) -> Self:
        attributes = self.label_attributes or ()
        if bool(attributes) != (self.attribute_file is not None):
            names = ("label_attributes", "attribute_file")
            given, other = names if attributes else reversed(names)
            raise ValueError(f"{given} needs {other}; give both, or neither")
        if len(set(attributes)) < len(attributes):
            raise ValueError(f"label_attributes = {list(attributes)} names an attribute twice")
        if self.label_file is not None and self.attribute_file is not None:
            raise ValueError("label_file and attribute_file both give labels; keep one")
        return self

    @model_validator(mode="after")
    def _digits_have_one_split(self) -> Self:
        if self.source == "digits" and self.format == "auto" and self.split != "train":
            raise ValueError(
                f"split = {self.split!r}: the embedded digits have only the split 'train'; leave "
                "split out, or name other data (./digits for a folder of that name)"
            )
        return self
