"""The U-Net and the noise scheduler, and how a U-Net is described in a message."""

import json
from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.utils.import_utils import is_accelerate_available
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from fedphd.common.config.run import MOST_WIDTH, DiffusionConfig, ModelConfig
from fedphd.common.errors import ConfigError, ReplyError
from fedphd.common.first_weights import WithoutFirstWeights
from fedphd.common.lean_imports import bare_packages
from fedphd.common.unet.layout import TensorLayout

with bare_packages("diffusers.models.transformers", "diffusers.models.unets"):
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    # A diffusers pipeline looks for it beside the class that it is to load.
    from diffusers.models.modeling_utils import ModelMixin as ModelMixin
    from diffusers.models.unets.unet_2d import UNet2DModel as UNet2DModel
    from diffusers.models.unets.unet_2d import UNet2DOutput as UNet2DOutput

MAX_PARAMETERS = 1_000_000_000


class PrunedUNet(UNet2DModel):
    """``UNet2DModel`` whose sinusoidal time features may be wider than its first level.

    The stock class takes one from the other. Pruning narrows the level but not the features,
    which have no weights. ``save_pretrained`` and ``from_pretrained`` work as for any model.
    A class-conditional network that is not told a class takes the label embedding's last row,
    ``no_label``; so whoever knows nothing of classes can use it, a diffusers pipeline too.
    ``time_feature_width`` is even; ``config`` is what ``UNet2DModel`` takes, with a positional
    time embedding.
    """

    def __init__(self, *, time_feature_width: int, **config: Any) -> None:
        super().__init__(**config)
        self.register_to_config(time_feature_width=time_feature_width)  # type: ignore[no-untyped-call]
        self.time_proj: Timesteps = Timesteps(  # type: ignore[assignment]
            time_feature_width, self.config["flip_sin_to_cos"], self.config["freq_shift"]
        )
        self.time_embedding = TimestepEmbedding(
            time_feature_width, self.time_embedding.linear_2.out_features
        )

    @classmethod
    def from_pretrained(cls, *place: Any, **options: Any) -> Self:
        """As of any diffusers model."""
        # Without accelerate, diffusers can do no other, and says so as if something were wrong.
        has_accelerate = is_accelerate_available()  # type: ignore[no-untyped-call]
        options.setdefault("low_cpu_mem_usage", has_accelerate)
        loaded: Self = super().from_pretrained(*place, **options)
        return loaded

    @property
    def no_label(self) -> int | None:
        """The label that stands for none, the number of classes; None if it knows no classes."""
        rows: int | None = self.config["num_class_embeds"]
        return None if rows is None else rows - 1

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The predicted noise, as ``UNet2DModel``; ``class_labels`` are (B,), int64."""
        if class_labels is None and self.no_label is not None:
            class_labels = torch.full((len(sample),), self.no_label, device=sample.device)
        return super().forward(sample, timestep, class_labels, return_dict)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # ConfigMixin reads the keys of a stored config off the signature, which is open here.
        return {*UNet2DModel._get_init_keys(UNet2DModel), "time_feature_width"}


def plain_unet(unet: PrunedUNet) -> UNet2DModel:
    """A stock ``UNet2DModel`` that computes the same with the same weights, where there is one.

    A network that was never pruned has one; a pruned one, whose time features are wider than its
    first level, is given back as it is. So is a class-conditional one, which the stock class does
    not use without a class, as a pipeline does.
    """
    config: Any = unet.config
    if unet.no_label is not None or config["time_feature_width"] != config["block_out_channels"][0]:
        return unet
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    del own["time_feature_width"]
    # Building draws first weights, and the caller's random state must not move.
    with torch.random.fork_rng(devices=[]):
        stock: UNet2DModel = UNet2DModel(**own)
    stock.load_state_dict(unet.state_dict())
    stock.train(unet.training)
    return stock


class _UNetDescription(ModelConfig):
    """A U-Net in a message: every key is required."""

    time_feature_width: int = Field(ge=2, le=MOST_WIDTH, multiple_of=2)

    @model_validator(mode="after")
    def _nothing_is_missing(self) -> Self:
        # A default that the peer did not mean would build another network than the peer's.
        if missing := sorted(set(type(self).model_fields) - self.model_fields_set):
            raise ValueError(f"{missing[0]} is missing")
        if self.class_conditional != (self.num_class_embeds is not None):
            raise ValueError("class_conditional and num_class_embeds contradict one another")
        return self


def resolve_device(name: str) -> torch.device:
    """The device for "auto" (CUDA where there is one), "cpu" or "cuda"; raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        text = 'device = "cuda", but PyTorch sees no CUDA device; use "auto" or "cpu"'
        raise ConfigError(text).for_peers()
    if name not in ("cpu", "cuda"):
        raise ConfigError(f'device = "{name}": unknown; use "auto", "cpu" or "cuda"')
    return torch.device(name)


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes of a GPU's memory: "peak" of what tensors took, "reserved" by this process, "total".

    Empty for a CPU.
    """
    if device.type != "cuda":
        return {}
    return {
        "peak": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }


def build_unet(config: ModelConfig, *, seed: int) -> PrunedUNet:
    """The dense U-Net with random weights that follow from ``seed`` alone.

    The sinusoidal time features are as wide as the first level. The caller's random state stays.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds accelerators too: those are not restored.
        torch.default_generator.manual_seed(seed)
        return _build(config, time_feature_width=config.block_out_channels[0])


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the dense U-Net; nothing is allocated for them."""
    return _layout_of(config, config.block_out_channels[0]).numel


def unet_config(unet: PrunedUNet) -> dict[str, Any]:
    """What a peer needs to build ``unet`` without its weights: JSON scalars and lists."""
    config = unet.config
    return {
        "image_size": config["sample_size"],
        "channels": config["in_channels"],
        "block_out_channels": list(config["block_out_channels"]),
        "layers_per_block": config["layers_per_block"],
        "attention_levels": [
            i for i, k in enumerate(config["down_block_types"]) if k in _ATTENTION
        ],
        "attention_head_dim": config["attention_head_dim"],
        "norm_num_groups": config["norm_num_groups"],
        "dropout": config["dropout"],
        "class_conditional": config["num_class_embeds"] is not None,
        "num_class_embeds": config["num_class_embeds"],
        "time_feature_width": config["time_feature_width"],
    }


def unet_from_config(
    config: Mapping[str, Any], *, max_parameters: int = MAX_PARAMETERS
) -> PrunedUNet:
    """A U-Net as ``unet_config`` described it; its weights are arbitrary until they are loaded.

    Raises:
        ReplyError: a key is unknown, missing, of the wrong type or out of range, or the U-Net would
            be larger than ``max_parameters``; raised before anything of it is built.
    """
    description = _described(config)
    _checked_layout(description, description.time_feature_width, max_parameters)
    with WithoutFirstWeights():
        return _build(description, time_feature_width=description.time_feature_width)


def layout_of_config(config: Mapping[str, Any]) -> TensorLayout:
    """The tensors of the U-Net that ``unet_config`` described; none of them gets memory.

    Raises:
        ReplyError: as ``unet_from_config``.
    """
    description = _described(config)
    return _checked_layout(description, description.time_feature_width, MAX_PARAMETERS)


def layout_of_dense(model: ModelConfig) -> TensorLayout:
    """The tensors of ``build_unet(model)``; none of them gets memory; ReplyError if too many."""
    return _checked_layout(model, model.block_out_channels[0], MAX_PARAMETERS)


def _described(config: Mapping[str, Any]) -> _UNetDescription:
    try:
        return _UNetDescription.model_validate_json(json.dumps(dict(config)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        raise ReplyError(f"U-Net config: {where + ': ' if where else ''}{what}") from error
    except (TypeError, ValueError) as error:
        raise ReplyError(f"U-Net config holds more than plain values: {error}") from error


def _checked_layout(
    unet: ModelConfig, time_feature_width: int, max_parameters: int
) -> TensorLayout:
    """The tensors of a U-Net that a peer describes: a short text can ask for more than there is."""
    layout = _layout_of(unet, time_feature_width)
    if layout.numel > max_parameters:
        raise ReplyError(
            f"U-Net config: block_out_channels = {list(unet.block_out_channels)} and "
            f"layers_per_block = {unet.layers_per_block} make {layout.numel:,} "
            f"parameters; at most {max_parameters:,} are accepted"
        )
    return layout


def _layout_of(unet: ModelConfig, time_feature_width: int) -> TensorLayout:
    """The tensors of the U-Net that ``_build`` makes of these; none of them gets memory."""
    with torch.device("meta"), WithoutFirstWeights():
        built = _build(unet, time_feature_width=time_feature_width)
    return TensorLayout.of(built.state_dict())


def build_scheduler(config: DiffusionConfig) -> DDPMScheduler:
    """The forward process (DDPM, arXiv:2006.11239), predicting the noise."""
    # diffusers clips the predicted image but continues with the unclipped noise, which costs
    # quality; a sampler that is made from this one inherits the choice.
    scheduler: DDPMScheduler = DDPMScheduler(**config.model_dump(), clip_sample=False)
    return scheduler


_PLAIN = ("DownBlock2D", "UpBlock2D")
_ATTENTION = ("AttnDownBlock2D", "AttnUpBlock2D")


def _build(config: ModelConfig, *, time_feature_width: int) -> PrunedUNet:
    levels = range(len(config.block_out_channels))
    kinds = [_ATTENTION if level in config.attention_levels else _PLAIN for level in levels]
    return PrunedUNet(
        sample_size=config.image_size,
        in_channels=config.channels,
        out_channels=config.channels,
        down_block_types=[down for down, _ in kinds],
        up_block_types=[up for _, up in reversed(kinds)],
        block_out_channels=list(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        num_class_embeds=config.num_class_embeds,
        time_feature_width=time_feature_width,
    )
