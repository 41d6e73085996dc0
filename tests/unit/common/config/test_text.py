"""Settings as text: dotted keys, KEY=VALUE, TOML and Flower's command line."""

from __future__ import annotations

import json
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedphd.common.config.data import DataConfig, Section
from fedphd.common.config.roles import (
    PRESETS,
    ClientConfig,
    CloudConfig,
    EdgeConfig,
    load_config,
)
from fedphd.common.config.text import (
    flattened,
    flower_pairs,
    merged,
    parse_settings,
    section_class,
    setting_keys,
    settings_text,
    split_settings,
    to_toml,
    toml_value,
    with_overrides,
    write_config,
)
from fedphd.common.errors import ConfigError


def test_section_class_sees_through_optional() -> None:
    assert section_class(DataConfig) is DataConfig
    assert section_class(DataConfig | None) is DataConfig
    assert section_class(tuple[int, ...]) is None
    assert section_class(int | None) is None


def test_dotted_keys_are_the_leaves_of_sections() -> None:
    assert list(flattened({"a": {"b": {"c": 1}, "d": None}, "e": [2]})) == [
        ("a.b.c", 1), ("a.d", None), ("e", [2]),
    ]  # fmt: skip
    keys = setting_keys(ClientConfig)
    assert {"client_id", "data.source", "data.partition.alpha", "node.private_key"} < set(keys)
    assert "data" not in keys


def test_overrides_replace_values_in_a_copy() -> None:
    values: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    changed = with_overrides(values, {"a.b": 9, "a.c": [3], "e.f": 4, "d": None})
    assert changed == {"a": {"b": 9, "c": [3]}, "d": None, "e": {"f": 4}}
    assert values == {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    with pytest.raises(ConfigError, match=r"a\.b\.x: b is a single value, not a section"):
        with_overrides(values, {"a.b.x": 1})
    assert with_overrides({"a": None}, {"a.b": 1}) == {"a": {"b": 1}}


def test_merging_keeps_what_is_not_replaced() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 3}, "f": 4}
    over = {"a": {"c": [9]}, "d": None, "g": {"h": 5}}
    assert merged(base, over) == {"a": {"b": 1, "c": [9]}, "d": None, "f": 4, "g": {"h": 5}}


def test_settings_are_json_or_text() -> None:
    settings = ["a.b=3", "c=x=y", 'd="3"', "e=[1, 2]", "f=null", "g=", " h =true", "i=1e-05"]
    assert parse_settings(settings) == {
        "a.b": 3, "c": "x=y", "d": "3", "e": [1, 2], "f": None, "g": "", "h": True, "i": 1e-05,
    }  # fmt: skip
    assert parse_settings([]) == {}
    for wrong in ("", "a", "=3", " =3"):
        with pytest.raises(ConfigError, match="write KEY=VALUE, such as "):
            parse_settings([wrong])


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", []),
        (" \n", []),
        ("a.b=3", ["a.b=3"]),
        ("a=[32, 64] b=true\n\tc=null ", ["a=[32, 64]", "b=true", "c=null"]),
        ('a=["x y", "=", "]"] b="c d=e"', ['a=["x y", "=", "]"]', 'b="c d=e"']),
        ('a={"b": {"c": 1}}  d=x=y', ['a={"b": {"c": 1}}', "d=x=y"]),
        # What only begins like JSON is plain text.
        ("a=2-classes b=[x c=1e-05", ["a=2-classes", "b=[x", "c=1e-05"]),
        ("a= b=1", ["a=", "b=1"]),
        ("a=1 b", ["a=1", "b"]),
    ],
)
def test_settings_are_split_at_spaces_outside_of_values(text: str, settings: list[str]) -> None:
    assert split_settings(text) == settings


VALUES = {
    "a.text": "it's \"so\"\n\\ ü", "b": ["Male", "it's"], "c": [1, 2.5], "d": None, "e": True,
    "f": 1e-05, "g": "", "h": "3", "i": {"j": "k l=m"},
}  # fmt: skip


def test_settings_come_back_from_their_text_through_flowers_command_line() -> None:
    from flwr.common.config import parse_config_args

    text = settings_text(VALUES)
    assert parse_settings(split_settings(text)) == VALUES
    sent = {"settings": text, "role-file": "/a b/role.json"}
    assert parse_config_args([flower_pairs(sent)]) == sent


def test_a_setting_that_is_not_key_value_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError, match="file: odd: write KEY=VALUE, such as num_threads=4"):
        parse_settings(split_settings("a=1 odd"), source="file:")


ODD_TEXTS = [
    "", "plain", 'say "hi"', "back\\slash", "C:\\new\\table", "tab\tnew\nline\r", "'single'",
    "# no comment", "ü 漢 😀", "del \x7f bell \x07 nul \x00", "]\n[section]\nkey = 1", '"""',
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_strings_survive_toml(text: str) -> None:
    values = {"key": text, "list": [text, text], "section": {"key": text}}
    assert tomllib.loads(to_toml(values)) == values


@pytest.mark.parametrize(
    "value",
    [0, -3, 10**15, 1e-05, 1e-8, 0.1, 1.0, 1e16, 1e22, -2.5e-300, True, False, [], [1, 2], [0.5]],
)
def test_plain_values_survive_toml_with_their_type(value: object) -> None:
    back = tomllib.loads(to_toml({"key": value}))["key"]
    assert back == value
    assert type(back) is type(value)


def test_tuples_become_lists_and_paths_strings() -> None:
    values = {"widths": (32, 64), "names": ("a", "b"), "path": Path("a b/c"), "none": None}
    back = tomllib.loads(to_toml(values))
    assert back == {"widths": [32, 64], "names": ["a", "b"], "path": "a b/c"}


def test_values_after_a_section_stay_out_of_it() -> None:
    values = {
        "first": {"x": 1, "deep": {"deeper": {"y": 2}, "z": 3}, "after": 4},
        "empty": {},
        "second": {"deep": {"y": 5}},
        "last": 6,
    }
    text = to_toml(values)
    assert tomllib.loads(text) == values
    assert text.index("last = 6") < text.index("[first]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")]])
def test_numbers_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        toml_value(value)


def test_toml_strings_are_those_of_json_but_for_del() -> None:
    assert toml_value("a\n") == json.dumps("a\n")
    assert toml_value("\x7f") == '"\\u007f"'


def odd_cloud(preset: str) -> CloudConfig:
    overrides: dict[str, Any] = {
        "preset": preset,
        "out_dir": 'a "b"\\c',
        "training.learning_rate": 1e-05,
        "waits.round_s": 3,
        "seed": 2**40,
        "evaluation.reference.source": "C:\\data",
        "evaluation.reference.max_images": 7,
        "training.max_grad_norm": 1e-7,
        "num_classes": 3,
        "target": [1.0, 0, 0],
    }
    return load_config(CloudConfig, overrides=overrides)


@pytest.mark.parametrize(
    "config",
    [
        *(load_config(CloudConfig, overrides={"preset": name}) for name in PRESETS),
        *(odd_cloud(name) for name in PRESETS),
        load_config(EdgeConfig),
        load_config(EdgeConfig, overrides={"node.root_certificates": "c\\a.pem"}),
        load_config(ClientConfig),
        load_config(
            ClientConfig,
            overrides={"edges": ["a:1", "[::1]:2"], "data.partition.kind": "iid"},
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_configurations_survive_toml(config: Section, tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    write_config(path, config.model_dump(mode="json"))
    assert tomllib.loads(path.read_text("utf-8")) == config.model_dump(
        mode="json", exclude_none=True
    )
    assert load_config(type(config), path) == config


def test_a_written_configuration_is_read_back_by_its_flags(tmp_path: Path) -> None:
    values = {"a": None, "b": {"c": None, "d": 1, "e": {"f": None}}, "g": 2}
    path = tmp_path / "some.toml"
    flags = write_config(path, values)
    assert flags[:2] == ["--config", str(path)]
    assert tomllib.loads(path.read_text("utf-8")) == {"b": {"d": 1, "e": {}}, "g": 2}
    settings = [word for flag, word in pairwise(flags) if flag == "--set"]
    assert settings == ["a=null", "b.c=null", "b.e.f=null"]
    assert len(flags) == 2 + 2 * len(settings)
    # The preset has a reference, which nobody can leave out in TOML.
    cloud = load_config(CloudConfig, None, {"evaluation.reference": None})
    _, written, *more = write_config(path, cloud.model_dump(mode="json"))
    assert load_config(CloudConfig, Path(written), parse_settings(more[1::2])) == cloud


@pytest.mark.parametrize(
    "value",
    ['["Male", "Young"]', "C:\\\\data", "it's", "/\U0001f600/\u6570.toml", 3, 0.5, True, ""],
)
def test_flower_reads_the_values_that_are_submitted(value: object) -> None:
    from flwr.common.config import parse_config_args

    assert parse_config_args([flower_pairs({"a.b": value, "c": 1})]) == {"a.b": value, "c": 1}
