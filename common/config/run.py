"""What is trained and how: the sections of the cloud's configuration.

Every section is frozen and refuses unknown keys. Units are in the names (``_s`` seconds,
``_bytes``) or in the field's description, which ``fedphd config ROLE`` prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import Field, model_validator

from fedphd.common.config.data import DataConfig, Section
from fedphd.common.config.widths import levels_with_heads, prune_widths, pruned_head_dim

SelectionPolicy = Literal[
    "homogeneity", "best_homogeneity", "balanced", "min_kl", "random", "static"
]

# The name in reports of the only features in which a Frechet distance is a FID.
INCEPTION: Final = "inception-v3"


class ModelConfig(Section):
    """The U-Net (diffusers ``UNet2DModel``) before pruning."""

    image_size: int = Field(8, ge=4, le=1024, description="height and width in pixels")
    channels: int = Field(1, ge=1, le=4, description="image channels")
    block_out_channels: tuple[int, ...] = Field(
        (32, 64), min_length=1, description="widths per resolution level, in channels"
    )
    layers_per_block: int = Field(1, ge=1, description="residual blocks per level")
    attention_levels: tuple[int, ...] = Field(
        (1,), description="levels with self-attention, 0 = full resolution"
    )
    attention_head_dim: int = Field(8, ge=1, description="channels per attention head")
    norm_num_groups: int = Field(8, ge=1, description="groups of each group normalisation")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability")

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        levels = len(self.block_out_channels)
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has width {width}, which norm_num_groups = "
                    f"{self.norm_num_groups} does not divide; use multiples of it"
                )
        if self.image_size % 2 ** (levels - 1):
            raise ValueError(
                f"image_size = {self.image_size} cannot be halved {levels - 1} times for "
                f"{levels} levels; use a multiple of {2 ** (levels - 1)}"
            )
        for level in self.attention_levels:
            if not 0 <= level < levels:
                raise ValueError(
                    f"attention_levels has {level}, but levels run from 0 to {levels - 1}"
                )
        for level in levels_with_heads(self.attention_levels, levels):
            if self.block_out_channels[level] % self.attention_head_dim:
                raise ValueError(
                    f"block_out_channels[{level}] = {self.block_out_channels[level]} has "
                    f"attention, but is not a multiple of attention_head_dim = "
                    f"{self.attention_head_dim}; change either"
                )
        return self


class DiffusionConfig(Section):
    """The forward process (DDPM, arXiv:2006.11239)."""

    num_train_timesteps: int = Field(1000, ge=2, description="diffusion steps T")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        "linear", description="noise schedule, as diffusers names it"
    )
    beta_start: float = Field(1e-4, gt=0, lt=1, description="first beta (linear schedules)")
    beta_end: float = Field(0.02, gt=0, lt=1, description="last beta (linear schedules)")


class TrainingConfig(Section):
    """Local training of a client in one edge round."""

    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="optimiser; sgd is plain, without momentum"
    )
    learning_rate: float = Field(
        1e-3, gt=0, le=1, description="learning rate, the optimiser's step size"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, L2 for adam and sgd")
    beta1: float = Field(0.9, ge=0, lt=1, description="first moment's decay (adam, adamw)")
    beta2: float = Field(0.999, ge=0, lt=1, description="second moment's decay (adam, adamw)")
    batch_size: int = Field(32, ge=1, description="images per step")
    local_unit: Literal["epochs", "steps"] = Field(
        "epochs", description="unit of local_amount: passes over the data, or optimiser steps"
    )
    local_amount: int = Field(1, ge=1, description="local work per edge round, in local_unit")
    warmup_steps: int = Field(
        0, ge=0, description="optimiser steps of linear learning-rate warm-up per client"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this 2-norm")
    horizontal_flip: bool = Field(False, description="mirror half of the images at random")
    optimizer_state: Literal["keep", "fresh"] = Field(
        "keep", description="keep each client's moments across rounds, or start afresh"
    )


class ObjectiveConfig(Section):
    """What a federated method adds to a client's loss or gradient."""

    method: Literal["fedavg", "fedprox", "moon", "scaffold"] = Field(
        "fedavg",
        description="fedavg: nothing; fedprox: stay near the received weights; moon: contrast "
        "with the previous local model; scaffold: control variates, which double the traffic "
        "(its update is derived for sgd; with adam they correct the gradient before the moments)",
    )
    proximal_mu: float = Field(
        0.01, ge=0, description="mu of fedprox: half of it times the squared distance, in the loss"
    )
    moon_mu: float = Field(1.0, ge=0, description="mu of moon: weight of the contrast in the loss")
    moon_temperature: float = Field(
        0.5, gt=0, description="temperature of moon: divides the cosine similarities"
    )


class ExchangeConfig(Section):
    """Which parts of the U-Net travel (FedDiffuse, arXiv:2406.12575)."""

    # The cloud's own copy of parts that never travel stays at the run's seeded initial weights:
    # its samples show the shared parts on an untrained rest, so their distance says little about
    # the clients' complete networks.
    parts: Literal["full", "usplit", "ulatdec", "udec"] = Field(
        "full",
        description="full: all parts; usplit: all go down, a client sends back the encoder or "
        "the rest, in turn; ulatdec: bottleneck and decoder travel; udec: the decoder travels. "
        "What never travels each client trains for itself, and stays initial at the cloud, whose "
        "samples then come from a partly untrained network",
    )


class ScheduleConfig(Section):
    """Intervals, edge rounds and who takes part."""

    intervals: int = Field(8, ge=1, description="cloud rounds")
    edge_rounds: int = Field(5, ge=1, description="edge rounds per interval (r_g)")
    participation: float = Field(
        1.0, gt=0, le=1, description="share of the known clients sampled in an edge round"
    )
    query_batch: int = Field(
        1,
        ge=1,
        description="clients asked at a time; 1: by the latest counts; large: as in the paper",
    )
    num_edges: int = Field(2, ge=1, description="edges that must have joined before the start")
    min_clients: int = Field(6, ge=1, description="clients that must have joined before the start")
    max_client_samples: int = Field(
        10_000_000, ge=1, description="a client that claims more images is refused"
    )

    @property
    def total_edge_rounds(self) -> int:
        """Edge rounds of the whole run."""
        return self.intervals * self.edge_rounds


class SelectionConfig(Section):
    """A client's choice of edge (Eq. 9 of arXiv:2507.06449, and others)."""

    policy: SelectionPolicy = Field(
        "balanced",
        description="balanced: the edge whose imbalance the client makes up for; homogeneity: the "
        "paper's, drawn by Eq. 9; best_homogeneity: the best score of Eq. 9, never cut off; "
        "min_kl: least KL divergence to the target; random: uniform; static: always the same edge",
    )
    factor: float = Field(
        4.0, ge=0, description="a, in mean samples per client (the first three policies)"
    )
    offset: float = Field(0.0, description="b, in mean samples per client (homogeneity)")
    epsilon: float = Field(
        1e-8, gt=0, description="keeps every probability above 0, samples (homogeneity)"
    )


class AggregationConfig(Section):
    """The cloud's weights of the edges (Eq. 10 of arXiv:2507.06449)."""

    factor: float = Field(20.0, ge=0, description="a, in mean samples per client")
    offset: float = Field(0.0, description="b, in mean samples per client")


class PruningConfig(Section):
    """Sparse training and structured pruning."""

    mode: Literal["scheduled", "one_shot", "none"] = Field(
        "scheduled",
        description="scheduled: after sparse_rounds; one_shot: before round 1; none: never",
    )
    ratio: float = Field(0.25, gt=0, lt=1, description="share of each width that is removed")
    sparse_rounds: int = Field(20, ge=1, description="edge rounds of sparse training (R_s)")
    sparsity_lambda: float = Field(
        1e-4, ge=0, description="weight of the group 2-norms in the loss during sparse training"
    )
    optimizer_moments: Literal["prune", "reset"] = Field(
        "prune", description="what happens to clients' moments when the network is pruned"
    )


class EmaConfig(Section):
    """Exponential moving average of the global weights, kept at the cloud."""

    decay: float = Field(0.995, ge=0, lt=1, description="decay per client optimiser step")


class EvaluationConfig(Section):
    """Samples and distances computed at the cloud."""

    every_intervals: int = Field(2, ge=1, description="intervals from one evaluation to the next")
    num_samples: int = Field(512, ge=2, description="generated images per distance")
    sampling_steps: int = Field(50, ge=1, description="DDIM steps (arXiv:2010.02502)")
    batch_size: int = Field(256, ge=1, description="images sampled at a time")
    grid_rows: int = Field(8, ge=1, le=32, description="rows and columns of samples.png")
    seed: int = Field(1234, ge=0, description="seed of the sampling noise")
    classifier_epochs: int = Field(
        20, ge=1, description="epochs of the feature classifier on the reference data"
    )
    features: Literal["auto", "classifier", "inception"] = Field(
        "auto",
        description="features in which images are compared, a small classifier's or Inception's; "
        "auto: Inception's if inception_weights is given",
    )
    features_file: Path | None = Field(
        None,
        description="classifier written by `fedphd features train`; absent: trained on reference",
    )
    inception_weights: Path | None = Field(
        None, description="file with torch-fidelity's Inception weights"
    )
    inception_sha256: str | None = Field(
        None,
        pattern="^[0-9a-fA-F]{64}$",
        description="SHA-256 that the file inception_weights must have",
    )
    raw_too: bool = Field(
        False, description="measure the raw weights as well as the averaged (EMA) ones"
    )
    reference_file: Path | None = Field(
        None, description="compare with statistics written by `fedphd statistics`"
    )
    reference_clients: bool = Field(
        False, description="compare with the sum of the statistics that clients compute"
    )
    reference: DataConfig | None = Field(
        None, description="data set to compare with; absent: samples, but no distance"
    )

    @property
    def wants_inception(self) -> bool:
        """Whether distances are in Inception's features."""
        auto = self.features == "auto" and self.inception_weights is not None
        return auto or self.features == "inception"

    @model_validator(mode="after")
    def _one_reference(self) -> EvaluationConfig:
        given = {
            "reference": self.reference is not None,
            "reference_file": self.reference_file is not None,
            "reference_clients": self.reference_clients,
        }
        names = [name for name, there in given.items() if there]
        if len(names) > 1:
            raise ValueError(
                f"evaluation.{' and evaluation.'.join(names)} are given together; there is only "
                "one reference, so unset the others (null, or false)"
            )
        ready = self.wants_inception or self.features_file is not None
        if names and self.reference is None and not ready:
            raise ValueError(
                f"evaluation.{names[0]} needs features that do not depend on images at the cloud: "
                "set evaluation.features_file (fedphd features train) or "
                "evaluation.inception_weights"
            )
        return self

    @model_validator(mode="after")
    def _all_of_the_reference(self) -> EvaluationConfig:
        if self.reference is not None and self.reference.validation_fraction:
            raise ValueError(
                "evaluation.reference.validation_fraction = "
                f"{self.reference.validation_fraction}: only clients hold out images "
                "(data.validation_fraction); leave it out"
            )
        return self

    @model_validator(mode="after")
    def _inception_is_meant(self) -> EvaluationConfig:
        if self.inception_sha256 is not None and self.inception_weights is None:
            raise ValueError("evaluation.inception_sha256 needs evaluation.inception_weights")
        if self.features == "classifier" and self.inception_weights is not None:
            raise ValueError(
                "evaluation.inception_weights is given, but evaluation.features = 'classifier'; "
                "set features to 'auto' or 'inception', or unset the weights"
            )
        return self


class WaitConfig(Section):
    """Upper bounds of every wait, in seconds."""

    start_s: float = Field(
        300.0, gt=0, description="seconds for edges and clients to join at the start"
    )
    query_s: float = Field(20.0, gt=0, description="seconds for a client's answer to a QUERY")
    offer_s: float = Field(
        5.0,
        gt=0,
        description="seconds that a client waits for other edges' offers in an edge round; once "
        "one has waited in vain, its edge lets no other client wait in that round",
    )
    round_s: float = Field(600.0, gt=0, description="seconds for a client's training reply")
    upload_stall_s: float = Field(
        20.0, gt=0, description="seconds of an upload without any progress"
    )
    interval_s: float = Field(
        7200.0, gt=0, description="seconds for an edge's reply for an interval"
    )
    retry_s: float = Field(
        60.0, gt=0, description="seconds before a client that failed is asked again"
    )

    @model_validator(mode="after")
    def _answers_outlast_offers(self) -> WaitConfig:
        if self.offer_s >= self.query_s:
            raise ValueError(
                f"offer_s = {self.offer_s:g} is not below query_s = {self.query_s:g}: a client "
                "that waits for an edge's offer would answer too late; lower offer_s or raise "
                "query_s"
            )
        return self


class FederationConfig(Section):
    """Everything that defines a training run; the cloud is its single source of truth."""

    topology: Literal["hierarchical", "flat"] = Field(
        "hierarchical",
        description="hierarchical: clients, edges, cloud; flat: the cloud averages its clients",
    )
    num_classes: int = Field(10, ge=1, description="number of classes in the clients' labels")
    target: tuple[float, ...] | None = Field(
        None, description="target label distribution; absent: uniform over num_classes"
    )
    seed: int = Field(0, ge=0, description="seed of weights, participation, choices and noise")
    reproducible: bool = Field(
        False, description="fixed order of replies and synchronised offers: bit-equal runs"
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    exchange: ExchangeConfig = Field(default_factory=ExchangeConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    aggregation: AggregationConfig = Field(default_factory=AggregationConfig)
    pruning: PruningConfig = Field(default_factory=PruningConfig)
    ema: EmaConfig = Field(default_factory=EmaConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    waits: WaitConfig = Field(default_factory=WaitConfig)

    @property
    def target_distribution(self) -> tuple[float, ...]:
        """The target label distribution, shape (num_classes,), sums to 1."""
        return self.target or (1.0 / self.num_classes,) * self.num_classes

    @model_validator(mode="after")
    def _target_is_a_distribution(self) -> FederationConfig:
        if self.target is None:
            return self
        if len(self.target) != self.num_classes:
            raise ValueError(
                f"target has {len(self.target)} shares, but num_classes = {self.num_classes}"
            )
        if min(self.target) < 0 or abs(sum(self.target) - 1) > 1e-6:
            raise ValueError(
                f"target = {list(self.target)} must be shares >= 0 that sum to 1; "
                f"they sum to {sum(self.target):g}"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> FederationConfig:
        method, parts = self.objective.method, self.exchange.parts
        allowed = {"scaffold": ["full"], "fedprox": ["full", "usplit"], "moon": ["full", "usplit"]}
        if parts not in allowed.get(method, [parts]):
            raise ValueError(
                f"objective.method = {method!r} cannot be used with exchange.parts = {parts!r}: it "
                "compares with weights that would not travel; use exchange.parts = "
                f"{' or '.join(map(repr, allowed[method]))}, or objective.method = 'fedavg'"
            )
        return self

    @model_validator(mode="after")
    def _pruning_fits(self) -> FederationConfig:
        pruning, schedule, groups = self.pruning, self.schedule, self.model.norm_num_groups
        if pruning.mode == "none":
            return self
        full_widths = self.model.block_out_channels
        widths = prune_widths(full_widths, pruning.ratio, groups)
        if any(kept == full for kept, full in zip(widths, full_widths, strict=True)):
            raise ValueError(
                f"pruning.ratio = {pruning.ratio} removes nothing from a width of "
                f"{list(full_widths)} in whole groups of {groups} "
                "(model.norm_num_groups); use a larger ratio or fewer groups"
            )
        pruned_head_dim(self.model.model_dump(), widths, pruning.ratio)
        if pruning.mode == "scheduled":
            if pruning.sparse_rounds % schedule.edge_rounds:
                raise ValueError(
                    f"pruning.sparse_rounds = {pruning.sparse_rounds} ends inside an interval; "
                    f"use a multiple of schedule.edge_rounds = {schedule.edge_rounds}"
                )
            if pruning.sparse_rounds >= schedule.total_edge_rounds:
                raise ValueError(
                    f"pruning.sparse_rounds = {pruning.sparse_rounds} prunes after the last of "
                    f"{schedule.total_edge_rounds} edge rounds (schedule.intervals x "
                    "schedule.edge_rounds); use fewer sparse rounds or more intervals"
                )
        return self
