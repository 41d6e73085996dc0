"""What the sections of the cloud's configuration accept, refuse and say about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError

from fedphd.common.config.data import PartitionConfig, Section
from fedphd.common.config.evaluation import EvaluationConfig, check_steps, usual_steps
from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig, load_config
from fedphd.common.config.run import (
    MOST_SEED,
    ExchangeConfig,
    FederationConfig,
    ModelConfig,
    ObjectiveConfig,
    PruningConfig,
    ScheduleConfig,
    SelectionConfig,
    TrainingConfig,
)
from fedphd.common.config.text import section_class
from fedphd.common.config.waits import WaitConfig
from fedphd.common.config.widths import prune_width
from fedphd.common.errors import ConfigError


def federation(**values: Any) -> FederationConfig:
    return FederationConfig.model_validate(values)


def sections(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield cls
    for field in cls.model_fields.values():
        section = section_class(field.annotation)
        if section is not None:
            yield from sections(section)


@pytest.mark.parametrize("role", [CloudConfig, EdgeConfig, ClientConfig])
def test_every_field_says_what_it_means(role: type[BaseModel]) -> None:
    for section in sections(role):
        assert section.__doc__
        for name, field in section.model_fields.items():
            is_section = section_class(field.annotation) is not None
            assert field.description or is_section, f"{section.__name__}.{name}"
            if name.endswith("_s"):
                assert "seconds" in str(field.description), f"{section.__name__}.{name}"


@pytest.mark.parametrize("role", [CloudConfig, EdgeConfig, ClientConfig])
def test_every_section_is_strict_and_frozen(role: type[BaseModel]) -> None:
    for section in sections(role):
        assert issubclass(section, Section)
    with pytest.raises(ValidationError, match="frozen"):
        role().num_threads = 3  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        role.model_validate({"nope": 1})


def test_types_are_not_converted() -> None:
    for value in ("8", 8.0, True):
        with pytest.raises(ValidationError, match="valid integer"):
            ScheduleConfig(intervals=value)  # type: ignore[arg-type]
    assert TrainingConfig(learning_rate=1).learning_rate == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        SelectionConfig(offset=value)
    with pytest.raises(ValidationError, match="finite"):
        federation(num_classes=2, target=(value, 1.0))
    with pytest.raises(ValidationError, match="round_s"):
        WaitConfig(round_s=value)


def test_bounds_are_where_they_should_be() -> None:
    assert ScheduleConfig(participation=1.0).participation == 1.0
    for section, field, value in [
        (ScheduleConfig, "participation", 0.0),
        (ScheduleConfig, "participation", 1.01),
        (PruningConfig, "ratio", 1.0),
        (PruningConfig, "ratio", 0.0),
        (TrainingConfig, "learning_rate", 0.0),
        (WaitConfig, "round_s", 0.0),
        (TrainingConfig, "optimizer", "sgdm"),
        (ObjectiveConfig, "method", "fednova"),
        (ObjectiveConfig, "proximal_mu", -0.1),
        (ObjectiveConfig, "moon_mu", -0.1),
        (ObjectiveConfig, "moon_temperature", 0.0),
        (ExchangeConfig, "parts", "encoder"),
    ]:
        with pytest.raises(ValidationError, match=field):
            section.model_validate({field: value})


def test_a_seed_is_one_that_torch_takes() -> None:
    seed = federation(seed=MOST_SEED).seed
    assert torch.Generator().manual_seed(seed).initial_seed() == MOST_SEED
    with pytest.raises(ValidationError, match="seed"):
        federation(seed=MOST_SEED + 1)


def test_partition_must_exist() -> None:
    assert PartitionConfig(num_partitions=3, partition_id=2).partition_id == 2
    with pytest.raises(ValidationError, match=r"partition_id = 3.*num_partitions = 3.*use 0 to 2"):
        PartitionConfig(num_partitions=3, partition_id=3)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"block_out_channels": (32, 60)}, r"width 60, which norm_num_groups = 8 does not divide"),
        ({"block_out_channels": (0, 64)}, r"width 0"),
        ({"image_size": 9}, r"image_size = 9 cannot be halved 1 times.*multiple of 2"),
        (
            {"image_size": 10, "block_out_channels": (8, 8, 8)},
            r"halved 2 times for 3 levels; use a multiple of 4",
        ),
        ({"attention_levels": (2,)}, r"attention_levels has 2, but levels run from 0 to 1"),
        ({"attention_levels": (-1,)}, r"attention_levels has -1"),
        # The middle block attends even where no level does.
        (
            {"attention_levels": (), "attention_head_dim": 24},
            r"block_out_channels\[1\] = 64 .*not a multiple of attention_head_dim = 24",
        ),
    ],
)
def test_impossible_networks_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        ModelConfig.model_validate(values)


@pytest.mark.parametrize(
    ("width", "ratio", "groups", "kept"),
    [
        (128, 0.25, 32, 96),  # 4 a group, 1 goes
        (256, 0.25, 32, 192),  # 8 a group, 2 go
        (256, 0.44, 32, 128),  # 3.52 of 8 go: 4
        (128, 0.44, 32, 64),  # 1.76 of 4 go: 2
        (128, 0.125, 32, 128),  # half a channel of 4: halves are kept
        (128, 0.375, 32, 96),  # 1.5 of 4: 1 goes
        (32, 0.99, 8, 8),  # one of each group stays
        (8, 0.9, 8, 8),
    ],
)
def test_pruned_widths_are_whole_groups(width: int, ratio: float, groups: int, kept: int) -> None:
    assert prune_width(width, ratio, groups) == kept


def test_target_is_uniform_or_given() -> None:
    assert federation(num_classes=4).target_distribution == (0.25, 0.25, 0.25, 0.25)
    assert federation(num_classes=2, target=(0.75, 0.25)).target_distribution == (0.75, 0.25)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ((0.5, 0.25, 0.25), "target has 3 shares, but num_classes = 2"),
        ((), "target has 0 shares, but num_classes = 2"),
        ((1.5, -0.5), "must be shares >= 0 that sum to 1; they sum to 1"),
        ((0.5, 0.4), "they sum to 0.9"),
    ],
)
def test_target_must_be_a_distribution(target: tuple[float, ...], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        federation(num_classes=2, target=target)


def schedule(**values: int) -> dict[str, Any]:
    return {"edge_rounds": 5, "intervals": 8, **values}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"pruning": {"ratio": 0.1}}, "ratio = 0.1 removes nothing from a width"),
        (
            {"pruning": {"ratio": 0.9}},
            r"ratio = 0.9 makes widths \[8, 8\] of \[32, 64\]: levels that differ must go on to",
        ),
        # 24 and 40 in groups of 8 are 3 and 5 a group; 0.3 takes 1 of 3 and 1 (1.5) of 5.
        (
            {
                "model": {"block_out_channels": (24, 40), "attention_levels": (0, 1)},
                "pruning": {"ratio": 0.3},
            },
            r"ratio = 0.3 makes widths \[16, 32\], with attention heads of \[5.3.*, 6.4\] channels",
        ),
        # 32 channels do not go into 5 heads; the middle block attends at the last level.
        (
            {
                "model": {"block_out_channels": (40, 40), "attention_levels": ()},
                "pruning": {"ratio": 0.3},
            },
            r"makes widths \[32, 32\], with attention heads of \[6.4\] channels at levels \[1\]",
        ),
        (
            {"pruning": {"sparse_rounds": 7}, "schedule": schedule()},
            "sparse_rounds = 7 ends inside an interval; use a multiple of .*edge_rounds = 5",
        ),
        (
            {"pruning": {"sparse_rounds": 40}, "schedule": schedule()},
            "sparse_rounds = 40 prunes after the last of 40 edge rounds",
        ),
    ],
)
def test_impossible_pruning_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        federation(**values)
    switched_off = {**values["pruning"], "mode": "none"}
    assert federation(**{**values, "pruning": switched_off}).pruning.mode == "none"


@pytest.mark.parametrize("link", ["cloud", "client"])
def test_weights_that_are_rounded_down_do_not_come_back_whole(link: str) -> None:
    text = f"wire.{link}_down = 'int8' cannot be used with wire.{link}_up = 'fp32'"
    with pytest.raises(ValidationError, match=text):
        federation(wire={f"{link}_down": "int8", f"{link}_up": "fp32"})
    both = federation(wire={f"{link}_down": "int8", f"{link}_up": "bf16"})
    assert both.wire.model_dump()[f"{link}_up"] == "bf16"
    # What goes up is a change, whatever came down.
    exact_down = federation(wire={f"{link}_down": "fp32", f"{link}_up": "int4"})
    assert exact_down.wire.model_dump()[f"{link}_up"] == "int4"


@pytest.mark.parametrize(
    ("codec", "variate"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "bf16"), ("int4", "bf16")]
)
def test_whole_variates_go_down_in_16_bits_at_least(codec: str, variate: str) -> None:
    wire = federation(wire={"cloud_down": codec, "cloud_up": codec}).wire
    assert wire.cloud_variate_down == variate


def test_more_sampling_steps_than_the_diffusion_has() -> None:
    text = "sampling_steps = 50 is more than diffusion.num_train_timesteps = 20"
    with pytest.raises(ValidationError, match=text):
        federation(diffusion={"num_train_timesteps": 20}, evaluation={"sampling_steps": 50})
    fits = federation(diffusion={"num_train_timesteps": 50}, evaluation={"sampling_steps": 50})
    assert fits.evaluation.sampling_steps == 50


@pytest.mark.parametrize(
    ("method", "parts", "use"),
    [
        ("scaffold", "usplit", "exchange.parts = 'full', or objective.method = 'fedavg'"),
        ("scaffold", "udec", "exchange.parts = 'full', or"),
        ("moon", "ulatdec", "exchange.parts = 'full' or 'usplit', or"),
        ("fedprox", "udec", "exchange.parts = 'full' or 'usplit', or"),
    ],
)
def test_method_needs_the_weights_it_compares_with(method: str, parts: str, use: str) -> None:
    text = (
        f"objective.method = '{method}' cannot be used with exchange.parts = '{parts}'.*use {use}"
    )
    with pytest.raises(ValidationError, match=text):
        federation(objective={"method": method}, exchange={"parts": parts})
    for fits in ({"method": "fedavg"}, {"method": method, "proximal_mu": 0.5}):
        free = parts if fits["method"] == "fedavg" else "full"
        assert federation(objective=fits, exchange={"parts": free}).exchange.parts == free
    assert federation(objective={"method": "moon"}, exchange={"parts": "usplit"})


def test_one_shot_pruning_ignores_the_sparse_phase() -> None:
    pruning = {"mode": "one_shot", "sparse_rounds": 7}
    assert federation(pruning=pruning).pruning.mode == "one_shot"
    assert federation(pruning={"sparse_rounds": 35}, schedule=schedule()).pruning.ratio == 0.25
    assert federation(schedule=schedule()).schedule.total_edge_rounds == 40


FILE = "f.safetensors"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"reference": {}, "reference_clients": True},
            "evaluation.reference and evaluation.reference_clients are given together",
        ),
        (
            {"reference_file": FILE, "reference_clients": True, "features_file": FILE},
            "evaluation.reference_file and evaluation.reference_clients are given together",
        ),
        (
            {"reference": {"validation_fraction": 0.25}},
            "evaluation.reference.validation_fraction = 0.25: only clients hold out images",
        ),
        ({"reference_clients": True}, "reference_clients needs features that do not depend on"),
        ({"reference_file": FILE}, "reference_file needs features that do not depend on images"),
        ({"inception_sha256": "0" * 64}, "inception_sha256 needs evaluation.inception_weights"),
        ({"inception_sha256": "0" * 63, "inception_weights": "w"}, "inception_sha256"),
        (
            {"inception_weights": "w", "features": "classifier"},
            "inception_weights is given, but evaluation.features = 'classifier'",
        ),
    ],
)
def test_references_and_features_that_do_not_go_together_are_refused(
    values: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValidationError, match=text):
        EvaluationConfig.model_validate_json(json.dumps(values))


def test_inception_is_used_where_its_weights_are_or_where_it_is_asked_for() -> None:
    weights = Path("w")
    for config, expected in (
        (EvaluationConfig(), False),
        (EvaluationConfig(inception_weights=weights), True),
        (EvaluationConfig(features="inception"), True),
        (EvaluationConfig(features="classifier"), False),
        (EvaluationConfig(features_file=weights), False),
    ):
        assert config.wants_inception is expected
    assert EvaluationConfig(inception_weights=weights, reference_clients=True).reference is None


def test_a_wait_for_offers_that_outlasts_the_answer_is_refused() -> None:
    assert federation(waits={"offer_s": 19.9}).waits.query_s == 20.0
    with pytest.raises(ValidationError, match="offer_s = 20 is not below query_s = 20"):
        federation(waits={"offer_s": 20.0})


def test_a_quorum_is_refused_where_who_is_late_must_not_matter() -> None:
    assert federation(schedule={"quorum": 0.5}).waits.straggler_s == 30.0
    assert federation(schedule={"quorum": 1.0}, reproducible=True).schedule.quorum == 1.0
    with pytest.raises(ValidationError, match=r"schedule.quorum = 0.5 cannot be used with"):
        federation(schedule={"quorum": 0.5}, reproducible=True)


def test_a_class_conditional_network_gets_a_row_for_each_class_and_one_for_none() -> None:
    told = federation(num_classes=4, model={"class_conditional": True})
    assert told.model.num_class_embeds == 5
    assert told.told_classes == (0.25,) * 4
    assert FederationConfig.model_validate_json(told.model_dump_json()) == told
    assert federation().told_classes is None


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"model": {"num_class_embeds": 11}}, "of a class-conditional network only"),
        ({"model": {"class_conditional": True, "num_class_embeds": 10}}, "num_classes \\+ 1 = 11"),
        ({"evaluation": {"guidance": 2.0}}, "evaluation.guidance = 2 needs a network that knows"),
    ],
)
def test_settings_of_classes_that_contradict_are_refused(
    values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem):
        federation(**values)


@pytest.mark.parametrize(
    ("widths", "groups", "fix"), [((15, 32), 1, 16), ((15, 30), 5, 20), ((21, 42), 3, 24)]
)
def test_an_odd_first_width_is_refused_for_what_it_is(
    widths: tuple[int, ...], groups: int, fix: int
) -> None:
    model = {"block_out_channels": widths, "norm_num_groups": groups, "attention_head_dim": 2}
    text = (
        rf"model.block_out_channels = \[{widths[0]}, {widths[1]}\]: its first width, {widths[0]}, "
        rf"is odd, .* use an even multiple of model.norm_num_groups = {groups}, such as {fix}"
    )
    # Pruning, which would not fit either, is not what is wrong.
    with pytest.raises(ValidationError, match=text):
        federation(model=model)
    even = {**model, "block_out_channels": (fix, 2 * fix)}
    assert federation(model=even, pruning={"mode": "none"}).model.block_out_channels[0] == fix


@pytest.mark.parametrize(("width", "when"), [(8, ""), (16, " after pruning")])
def test_a_level_that_normalisation_would_empty_is_refused(width: int, when: str) -> None:
    model = {
        "image_size": 8, "block_out_channels": (width,) * 4, "norm_num_groups": 8,
        "attention_levels": (3,), "attention_head_dim": width // 2,
    }  # fmt: skip
    pruning = {"mode": "one_shot", "ratio": 0.5} if when else {"mode": "none"}
    text = rf"last level of widths \[8, 8, 8, 8\]{when} has 1x1 pixels .* level 3's channels, "
    with pytest.raises(ValidationError, match=text):
        federation(model=model, pruning=pruning)
    fewer = {**model, "norm_num_groups": 4}
    assert federation(model=fewer, pruning=pruning).model.norm_num_groups == 4


@pytest.mark.parametrize(
    ("widths", "pruning", "text"),
    [
        ((8, 8, 4, 8), {"mode": "none"}, r"\[8, 8, 4, 8\] has 1x1 pixels"),
        ((8, 8, 8, 16), {"ratio": 0.5}, r"\[4, 4, 4, 8\] after pruning has 1x1 pixels"),
    ],
)
def test_a_level_that_would_be_emptied_on_entering_the_last_is_refused(
    widths: tuple[int, ...], pruning: dict[str, Any], text: str
) -> None:
    model = {"image_size": 8, "block_out_channels": widths, "norm_num_groups": 4}
    with pytest.raises(ValidationError, match=rf"{text} .* level 2's channels, "):
        federation(model=model, pruning=pruning)
    assert federation(model={**model, "image_size": 16}, pruning=pruning).model.image_size == 16


def test_a_reference_is_no_part_of_a_data_set() -> None:
    with pytest.raises(ValidationError, match=r"evaluation.reference.partition: only clients"):
        federation(evaluation={"reference": {"partition": {"num_partitions": 2}}})


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 100, 333, 500, 900, 1000])
def test_steps_that_go_through_the_diffusion(steps: int) -> None:
    check_steps(steps, 1000)


def test_steps_that_would_start_in_the_middle_of_the_diffusion_are_refused() -> None:
    """1000 // 501 is 1, so the first of them would be timestep 500."""
    near = r"sampling_steps = 501 leaves out .*num_train_timesteps = 1000; use 500 or 900$"
    with pytest.raises(ConfigError, match=near):
        load_config(CloudConfig, overrides={"evaluation.sampling_steps": 501})
    # Former runs' configurations can still be opened.
    assert federation(evaluation={"sampling_steps": 501}).evaluation.sampling_steps == 501
    with pytest.raises(ConfigError, match=r"--steps = 30 is more than .* = 20; use 20$"):
        check_steps(30, 20, "--steps")
    assert [usual_steps(timesteps) for timesteps in (1000, 75, 50, 7, 1)] == [50, 37, 50, 7, 1]
