"""What is trained and how: the sections of the cloud's configuration.

Units are in the names (``_s`` seconds) or in the meaning, which ``fedphd config ROLE`` prints.
"""

import math
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from fedphd.common.config.averages import AggregationConfig, EmaConfig
from fedphd.common.config.data import Section, setting
from fedphd.common.config.evaluation import EvaluationConfig, Precision
from fedphd.common.config.waits import WaitConfig
from fedphd.common.config.widths import (
    check_first_width,
    check_levels,
    check_lowest_level,
    levels_with_heads,
    prune_widths,
    pruned_head_dim,
)
from fedphd.common.config.wire import WireConfig

SelectionPolicy = Literal[
    "homogeneity", "best_homogeneity", "balanced", "min_kl", "random", "static"
]

# The name in reports of the only features in which a Frechet distance is a FID.
INCEPTION: Final = "inception-v3"

# Bounds of what a message may make a process allocate, far above what anybody trains.
MOST_CLASSES: Final = 100_000
# What torch's generators take.
MOST_SEED: Final = 2**64 - 1
MOST_WIDTH: Final = 8192
_MOST_LEVELS: Final = 8
_MOST_LAYERS: Final = 16
_MOST_TIMESTEPS: Final = 1_000_000


class ModelConfig(Section):
    """The U-Net (diffusers ``UNet2DModel``) before pruning."""

    image_size: int = setting(8, "height and width in pixels", ge=4, le=1024)
    channels: int = setting(1, "image channels", ge=1, le=4)
    block_out_channels: tuple[Annotated[int, Field(le=MOST_WIDTH)], ...] = setting(
        (32, 64),
        "widths per resolution level, in channels",
        min_length=1,
        max_length=_MOST_LEVELS,
    )
    layers_per_block: int = setting(1, "residual blocks per level", ge=1, le=_MOST_LAYERS)
    attention_levels: tuple[int, ...] = setting(
        (1,), "levels with self-attention, 0 = full resolution"
    )
    attention_head_dim: int = setting(8, "channels per attention head", ge=1)
    norm_num_groups: int = setting(8, "groups of each group normalisation", ge=1)
    dropout: float = setting(0.0, "dropout probability", ge=0, lt=1)
    class_conditional: bool = setting(
        False, "tell the network the class of each image, so that samples of a class can be drawn"
    )
    num_class_embeds: int | None = setting(
        None,
        "rows of the label embedding of a class-conditional network, the last one for no label; "
        "absent: num_classes + 1",
        ge=2,
        le=MOST_CLASSES + 1,
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
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
                last = levels - 1
                raise ValueError(f"attention_levels has {level}, but levels run from 0 to {last}")
        for level in levels_with_heads(self.attention_levels, levels):
            if self.block_out_channels[level] % self.attention_head_dim:
                raise ValueError(
                    f"block_out_channels[{level}] = {self.block_out_channels[level]} has attention,"
                    " but is not a multiple of attention_head_dim = "
                    f"{self.attention_head_dim}; change either"
                )
        return self


class DiffusionConfig(Section):
    """The forward process (DDPM, arXiv:2006.11239)."""

    num_train_timesteps: int = setting(1000, "diffusion steps T", ge=2, le=_MOST_TIMESTEPS)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = setting(
        "linear", "noise schedule, as diffusers names it"
    )
    beta_start: float = setting(1e-4, "first beta (linear schedules)", gt=0, lt=1)
    beta_end: float = setting(0.02, "last beta (linear schedules)", gt=0, lt=1)


class TrainingConfig(Section):
    """Local training of a client in one edge round."""

    optimizer: Literal["adam", "adamw", "sgd"] = setting(
        "adam", "optimiser; sgd is plain, without momentum"
    )
    learning_rate: float = setting(1e-3, "learning rate, the optimiser's step size", gt=0, le=1)
    weight_decay: float = setting(0.0, "decoupled for adamw, L2 for adam and sgd", ge=0)
    beta1: float = setting(0.9, "first moment's decay (adam, adamw)", ge=0, lt=1)
    beta2: float = setting(0.999, "second moment's decay (adam, adamw)", ge=0, lt=1)
    batch_size: int = setting(32, "images per step", ge=1)
    local_unit: Literal["epochs", "steps"] = setting(
        "epochs", "unit of local_amount: passes over the data, or optimiser steps"
    )
    local_amount: int = setting(1, "local work per edge round, in local_unit", ge=1)
    warmup_steps: int = setting(
        0, "optimiser steps of linear learning-rate warm-up per client", ge=0
    )
    max_grad_norm: float = setting(1.0, "gradients are clipped to this 2-norm", gt=0)
    horizontal_flip: bool = setting(False, "mirror half of the images at random")
    label_dropout: float = setting(
        0.1,
        "share of images whose class a class-conditional network is not told, which guidance "
        "needs (arXiv:2207.12598)",
        ge=0,
        le=1,
    )
    precision: Precision = setting(
        "auto",
        "arithmetic of the network; bf16: by autocast, weights stay fp32; auto: bf16 on GPUs that "
        "have instructions for it and where a CPU is faster with it, fp32 elsewhere and where "
        "reproducible = true (of which GPUs keep ten bits in convolutions, as torch has it: TF32)",
    )
    compile: Literal["auto", "always", "never"] = setting(
        "auto",
        "compile the network's passes by torch.compile; auto: on CUDA, once its steps would have "
        "gained what that takes; always: at once; never where reproducible = true, or with moon",
    )
    optimizer_state: Literal["keep", "fresh"] = setting(
        "keep", "keep each client's moments across rounds, or start afresh"
    )

    def usual_steps(self, num_images: float) -> int:
        """Steps of a client with that many images in an edge round, at least 1."""
        per_pass = 1 if self.local_unit == "steps" else math.ceil(num_images / self.batch_size)
        return self.local_amount * max(1, per_pass)

    def most_steps(self, num_images: int) -> int:
        """Steps that no client with that many images can exceed in an edge round."""
        # A step takes at least one image.
        return self.local_amount * (num_images if self.local_unit == "epochs" else 1)


class ObjectiveConfig(Section):
    """What a federated method adds to a client's loss or gradient."""

    method: Literal["fedavg", "fedprox", "moon", "scaffold"] = setting(
        "fedavg",
        "fedavg: nothing; fedprox: stay near the received weights; moon: contrast with the "
        "previous local model; scaffold: control variates, which double the traffic (its update "
        "is derived for sgd; with adam they correct the gradient before the moments)",
    )
    proximal_mu: float = setting(
        0.01, "mu of fedprox: half of it times the squared distance, in the loss", ge=0
    )
    moon_mu: float = setting(1.0, "mu of moon: weight of the contrast in the loss", ge=0)
    moon_temperature: float = setting(
        0.5, "temperature of moon: divides the cosine similarities", gt=0
    )


class ExchangeConfig(Section):
    """Which parts of the U-Net travel (FedDiffuse, arXiv:2406.12575)."""

    # The cloud's own copy of parts that never travel stays at the run's seeded initial weights:
    # its samples show the shared parts on an untrained rest, so their distance says little about
    # the clients' complete networks.
    parts: Literal["full", "usplit", "ulatdec", "udec"] = setting(
        "full",
        "full: all parts; usplit: all go down, a client sends back the encoder or the rest, in "
        "turn; ulatdec: bottleneck and decoder travel; udec: the decoder travels. What never "
        "travels each client trains for itself, and stays initial at the cloud, whose samples "
        "then come from a partly untrained network",
    )


class ScheduleConfig(Section):
    """Intervals, edge rounds and who takes part."""

    intervals: int = setting(8, "cloud rounds", ge=1)
    edge_rounds: int = setting(5, "edge rounds per interval (r_g)", ge=1)
    participation: float = setting(
        1.0, "share of the known clients sampled in an edge round", gt=0, le=1
    )
    query_batch: int = setting(
        1, "clients asked at a time; 1: each by the latest counts; large: as in the paper", ge=1
    )
    quorum: float = setting(
        1.0,
        "share of an edge round's clients whose replies are enough; the others then have "
        "waits.straggler_s more",
        gt=0,
        le=1,
    )
    num_edges: int = setting(2, "edges that must have joined before the start", ge=1)
    min_clients: int = setting(6, "clients that must have joined before the start", ge=1)
    max_client_samples: int = setting(
        10_000_000, "a client that claims more images is refused", ge=1
    )

    @property
    def total_edge_rounds(self) -> int:
        """Edge rounds of the whole run."""
        return self.intervals * self.edge_rounds


class SelectionConfig(Section):
    """A client's choice of edge (Eq. 9 of arXiv:2507.06449, and others)."""

    policy: SelectionPolicy = setting(
        "balanced",
        "balanced: the edge whose imbalance the client makes up for; homogeneity: the "
        "paper's, drawn by Eq. 9; best_homogeneity: the best score of Eq. 9, never cut off; "
        "min_kl: least KL divergence to the target; random: uniform; static: always the same edge",
    )
    factor: float = setting(
        4.0, "a, in mean samples per client (balanced, homogeneity, best_homogeneity)", ge=0
    )
    offset: float = setting(0.0, "b, in mean samples per client (homogeneity)")
    epsilon: float = setting(1e-8, "keeps every probability above 0, samples (homogeneity)", gt=0)


class PruningConfig(Section):
    """Sparse training and structured pruning."""

    mode: Literal["scheduled", "one_shot", "none"] = setting(
        "scheduled", "scheduled: after sparse_rounds; one_shot: before round 1; none: never"
    )
    ratio: float = setting(0.25, "share of each width that is removed", gt=0, lt=1)
    sparse_rounds: int = setting(20, "edge rounds of sparse training (R_s)", ge=1)
    sparsity_lambda: float = setting(
        1e-4, "weight of the group 2-norms in the loss during sparse training", ge=0
    )
    optimizer_moments: Literal["prune", "reset"] = setting(
        "prune", "what happens to clients' moments when the network is pruned"
    )


class FederationConfig(Section):
    """Everything that defines a training run; the cloud is its single source of truth."""

    topology: Literal["hierarchical", "flat"] = setting(
        "hierarchical", "hierarchical: clients, edges, cloud; flat: the cloud averages its clients"
    )
    num_classes: int = setting(
        10, "number of classes in the clients' labels", ge=1, le=MOST_CLASSES
    )
    target: tuple[float, ...] | None = setting(
        None, "target label distribution; absent: uniform over num_classes"
    )
    seed: int = setting(0, "seed of weights, participation, choices and noise", ge=0, le=MOST_SEED)
    reproducible: bool = setting(
        False, "fixed order of replies and synchronised offers: bit-equal runs, on CPUs of one kind"
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    exchange: ExchangeConfig = Field(default_factory=ExchangeConfig)
    wire: WireConfig = Field(default_factory=WireConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    aggregation: AggregationConfig = Field(default_factory=AggregationConfig)
    pruning: PruningConfig = Field(default_factory=PruningConfig)
    ema: EmaConfig = Field(default_factory=EmaConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    waits: WaitConfig = Field(default_factory=WaitConfig)

    @property
    def codecs(self) -> WireConfig:
        """``wire`` as it is used: a flat federation has no link between cloud and edges."""
        if self.topology == "hierarchical":
            return self.wire
        return self.wire.model_copy(update={"cloud_down": "fp32", "cloud_up": "fp32"})

    @property
    def target_distribution(self) -> tuple[float, ...]:
        """The target label distribution, shape (num_classes,), sums to 1."""
        return self.target or (1.0 / self.num_classes,) * self.num_classes

    @property
    def local_training(self) -> TrainingConfig:
        """``training`` as clients get it: a reproducible run leaves nothing to a trial."""
        if not self.reproducible:
            return self.training
        precision = self.training.precision
        exact = {"precision": "fp32" if precision == "auto" else precision, "compile": "never"}
        return self.training.model_copy(update=exact)

    @property
    def measuring(self) -> EvaluationConfig:
        """``evaluation`` as it is done: a reproducible run leaves nothing to the device."""
        if self.reproducible and self.evaluation.precision == "auto":
            return self.evaluation.model_copy(update={"precision": "fp32"})
        return self.evaluation

    @property
    def told_classes(self) -> tuple[float, ...] | None:
        """The label distribution of samples; None where the network is not told a class."""
        return self.target_distribution if self.model.class_conditional else None

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        rows, needed = self.model.num_class_embeds, self.num_classes + 1
        if not self.model.class_conditional:
            if rows is not None:
                raise ValueError(
                    f"model.num_class_embeds = {rows} is of a class-conditional network only; set "
                    "model.class_conditional = true, or leave it out"
                )
            if (guidance := self.evaluation.guidance) != 1:
                raise ValueError(
                    f"evaluation.guidance = {guidance:g} needs a network that knows classes; set "
                    "model.class_conditional = true, or leave it out"
                )
            return self
        if rows is None:
            model = self.model.model_copy(update={"num_class_embeds": needed})
            # The whole network is then in ``model``, which also travels alone.
            object.__setattr__(self, "model", model)
        elif rows != needed:
            raise ValueError(
                f"model.num_class_embeds = {rows} must be num_classes + 1 = {needed}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _target_is_a_distribution(self) -> Self:
        target, classes = self.target, self.num_classes
        if target is None:
            return self
        if len(target) != classes:
            raise ValueError(f"target has {len(target)} shares, but num_classes = {classes}")
        if min(target) < 0 or abs(sum(target) - 1) > 1e-6:
            raise ValueError(
                f"target = {list(target)} must be shares >= 0 that sum to 1; "
                f"they sum to {sum(target):g}"
            )
        return self

    @model_validator(mode="after")
    def _sampling_fits(self) -> Self:
        steps, most = self.evaluation.sampling_steps, self.diffusion.num_train_timesteps
        if steps > most:
            raise ValueError(
                f"evaluation.sampling_steps = {steps} is more than diffusion.num_train_timesteps = "
                f"{most}; use at most as many"
            )
        return self

    @model_validator(mode="after")
    def _quorum_fits(self) -> Self:
        if self.reproducible and self.schedule.quorum < 1:
            raise ValueError(
                f"schedule.quorum = {self.schedule.quorum:g} cannot be used with reproducible = "
                "true: who is late would change the result; use schedule.quorum = 1"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
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
    def _aggregation_fits(self) -> Self:
        if self.aggregation.method == "trimmed_mean" and self.objective.method == "scaffold":
            raise ValueError(
                "aggregation.method = 'trimmed_mean' cannot be used with objective.method = "
                "'scaffold': its server variate is a sum over all clients, which trimming would "
                "make inconsistent with theirs; use aggregation.method = 'mean'"
            )
        return self

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        # Not in ``ModelConfig``, which also describes networks that pruning has left.
        model = self.model
        check_first_width(model.block_out_channels, model.norm_num_groups)
        check_lowest_level(model.image_size, model.block_out_channels, model.norm_num_groups)
        return self

    @model_validator(mode="after")
    def _pruning_fits(self) -> Self:
        pruning, schedule, groups = self.pruning, self.schedule, self.model.norm_num_groups
        if pruning.mode == "none":
            return self
        full_widths = self.model.block_out_channels
        widths = prune_widths(full_widths, pruning.ratio, groups)
        check_levels(full_widths, widths, pruning.ratio)
        check_lowest_level(self.model.image_size, widths, groups, " after pruning")
        if any(kept == full for kept, full in zip(widths, full_widths, strict=True)):
            raise ValueError(
                f"pruning.ratio = {pruning.ratio} removes nothing from a width of "
                f"{list(full_widths)} in whole groups of {groups} (model.norm_num_groups); "
                "use a larger ratio or fewer groups"
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
