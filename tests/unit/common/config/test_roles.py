"""Reading the roles' configurations: presets, files, overrides, and what errors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny import write_toml

from fedphd.common.config.data import DataConfig, Section
from fedphd.common.config.roles import (
    PRESETS,
    ClientConfig,
    CloudConfig,
    EdgeConfig,
    NodeConfig,
    check_address,
    check_id,
    load_config,
    read_preset,
    validate,
)
from fedphd.common.config.run import FederationConfig
from fedphd.common.config.text import section_class, setting_keys
from fedphd.common.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "some.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(cls: type[Section], path: Path | None = None, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, values)
    return str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_prune(name: str) -> None:
    config = load_config(CloudConfig, overrides={"preset": name})
    assert config.preset == name
    assert config.schedule.total_edge_rounds > config.pruning.sparse_rounds
    assert config.model.image_size == {
        "digits": 8, "cifar10-16": 16, "cifar10": 32, "celeba": 64,
    }[name]  # fmt: skip


def test_cifar10_is_the_papers() -> None:
    config = load_config(CloudConfig, overrides={"preset": "cifar10"})
    assert config.model.block_out_channels == (128, 256, 256, 256)
    assert config.model.norm_num_groups == 32
    assert (config.training.batch_size, config.training.warmup_steps) == (128, 100)
    assert (config.evaluation.num_samples, config.evaluation.sampling_steps) == (30_000, 100)
    assert (config.schedule.num_edges, config.schedule.min_clients) == (2, 20)
    assert config.schedule.edge_rounds == 5
    assert (config.selection.factor, config.aggregation.factor) == (4.0, 20.0)


def test_digits_is_the_preset_without_a_file() -> None:
    loaded = load_config(CloudConfig)
    assert loaded.preset == "digits"
    assert loaded.evaluation.reference == DataConfig(source="digits")
    assert loaded == load_config(CloudConfig, None, {"preset": "digits"})


def test_file_wins_over_preset_and_override_over_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'preset = "cifar10"\n[schedule]\nintervals = 300\nedge_rounds = 10\n[ema]\ndecay = 0.5\n',
    )
    config = load_config(CloudConfig, path, {"schedule.edge_rounds": 2, "device": "cpu"})
    assert config.schedule.intervals == 300
    assert config.schedule.edge_rounds == 2
    assert config.schedule.min_clients == 20
    assert config.ema.decay == 0.5
    assert config.training.learning_rate == 2e-4
    assert config.device == "cpu"


def test_override_may_choose_the_preset_and_unset_what_it_gives(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "cifar10"\n')
    assert load_config(CloudConfig, path, {"preset": "celeba"}).num_classes == 4
    assert load_config(CloudConfig).evaluation.reference is not None
    unset = load_config(CloudConfig, overrides={"evaluation.reference": None})
    assert unset.evaluation.reference is None
    # As a file says it, for TOML has no null.
    path = write_toml(tmp_path / "cloud.toml", {"evaluation.reference": "none"})
    assert load_config(CloudConfig, path).evaluation.reference is None
    text = refusal(CloudConfig, seed=None)
    assert "seed = None: input should be a valid integer" in text


def test_lists_of_a_file_replace_those_of_the_preset(tmp_path: Path) -> None:
    path = write(tmp_path, "[model]\nblock_out_channels = [32, 64, 64]\nattention_levels = []\n")
    config = load_config(CloudConfig, path)
    assert config.model.block_out_channels == (32, 64, 64)
    assert config.model.attention_levels == ()


def test_federation_is_the_training_part() -> None:
    cloud = load_config(CloudConfig, overrides={"preset": "celeba", "seed": 7})
    part = cloud.federation()
    assert type(part) is FederationConfig
    assert part.seed == 7
    assert part.model == cloud.model
    assert set(type(cloud).model_fields) - set(type(part).model_fields) == {
        "preset", "out_dir", "state_dir", "checkpoint", "tracking", "health", "device",
        "num_threads", "superlink",
    }  # fmt: skip


@pytest.mark.parametrize("cls", [CloudConfig, EdgeConfig, ClientConfig])
def test_resolved_configuration_survives_json(cls: type[Section]) -> None:
    config = load_config(cls)
    assert validate(cls, config.model_dump(mode="json"), source="copy") == config


def test_edge_keeps_its_own_port_when_its_superlink_has_settings() -> None:
    assert load_config(EdgeConfig).superlink.address == "0.0.0.0:9192"
    tls = {f"superlink.ssl_{name}": "x.pem" for name in ("certfile", "keyfile", "ca_certfile")}
    assert load_config(EdgeConfig, overrides=tls).superlink.address == "0.0.0.0:9192"
    assert load_config(CloudConfig, overrides=tls).superlink.address == "0.0.0.0:9092"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"training": {"batch_size": 0}},
         "training.batch_size = 0: input should be greater than or equal to 1 (images per step)"),
        ({"training": {"batch_size": 2.5}}, "training.batch_size = 2.5: input should be a valid"),
        ({"schedule": {"interval": 3}},
         "schedule.interval: unknown key; did you mean 'schedule.intervals'"),
        ({"ema": {"zzz": 3}}, "ema.zzz: unknown key; known keys: decay"),
        ({"evaluation": {"reference": {"partition": {"alhpa": 1}}}},
         "partition.alhpa: unknown key; did you mean 'evaluation.reference.partition.alpha'?"),
        ({"device": "gpu"}, "device = 'gpu': input should be 'auto', 'cpu' or 'cuda'"),
        ({"target": [0.5, "x"]}, "target.1 = 'x': input should be a valid number (target label"),
        ({"schedule": 3}, "schedule = 3: input should be an object"),
        ({"schedule": {"intervals": 3}}, "\n  pruning.sparse_rounds = 25 prunes after the last of"),
        ({"model": {"image_size": 9}}, "\n  model: image_size = 9 cannot be halved"),
        ({"superlink": {"address": "here"}}, "superlink.address: 'here' is not an address; write "),
        ({"preset": "mnist"}, "preset = 'mnist': unknown; choose one of digits, cifar10-16, cifar"),
        ({"preset": ["digits"]}, "preset = ['digits']: unknown"),
    ],
)  # fmt: skip
def test_error_names_field_value_and_fix(values: dict[str, Any], text: str) -> None:
    assert text in refusal(CloudConfig, **values)


def test_all_wrong_fields_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, 'seed = -1\ndevice = "gpu"\nsede = 3\n')
    text = refusal(CloudConfig, path)
    assert text.startswith(f"{path}: 3 setting(s) refused\n")
    assert "seed = -1" in text
    assert "device = 'gpu'" in text
    assert "sede: unknown key; did you mean 'seed'?" in text
    assert refusal(EdgeConfig, edge_id="").startswith("command line: 1 setting(s) refused")
    good = write(tmp_path, "seed = 1\n")
    beside = refusal(CloudConfig, good, seed=-1)
    assert beside.startswith(f"{good} and command line: 1 setting(s) refused")


def test_names_keep_their_case_in_errors() -> None:
    text = refusal(ClientConfig, data={"partition": {"kind": "IID"}})
    assert "data.partition.kind = 'IID': input should be 'pathological', 'dirichlet' or" in text


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert f"--config {missing}: cannot be read: No such file" in refusal(CloudConfig, missing)
    assert "cannot be read: Is a directory" in refusal(CloudConfig, tmp_path)
    broken = write(tmp_path, "seed = \n")
    assert ": not valid TOML: Invalid value (at line 1" in refusal(CloudConfig, broken)
    broken.write_bytes(b'device = "\xff"\n')
    assert ": not valid TOML: 'utf-8' codec" in refusal(CloudConfig, broken)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text('client_id = "\N{GRINNING FACE}"', encoding="utf-8-sig")
    with pytest.raises(ConfigError, match="client_id: '\N{GRINNING FACE}' is not a valid name"):
        load_config(ClientConfig, path)
    path.write_text('client_id = "a"\r\n', encoding="utf-8-sig")
    assert load_config(ClientConfig, path).client_id == "a"


def test_override_below_a_single_value_is_refused() -> None:
    assert "seed.x: seed is a single value" in refusal(CloudConfig, **{"seed": 3, "seed.x": 1})


def test_plain_text_must_be_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"superlink.address = 0.0.0.0:9092: would serve plain"):
        load_config(CloudConfig).superlink.check_protected()
    with pytest.raises(ConfigError, match=r"node.root_certificates is not given, so all would"):
        load_config(ClientConfig).node.check_protected()
    certificates = {f"superlink.ssl_{name}": "x" for name in ("certfile", "keyfile", "ca_certfile")}
    for asked in ({"superlink.insecure": True}, certificates):
        load_config(EdgeConfig, overrides=asked).superlink.check_protected()
    for asked in ({"node.insecure": True}, {"node.root_certificates": "ca.pem"}):
        load_config(EdgeConfig, overrides=asked).node.check_protected()


def test_cross_field_rules_of_tls() -> None:
    text = refusal(CloudConfig, superlink={"ssl_certfile": "a.pem"})
    assert "give all of ssl_certfile, ssl_keyfile and ssl_ca_certfile, or none" in text
    assert "needs ssl_certfile" in refusal(EdgeConfig, superlink={"node_keys": "keys"})
    text = refusal(ClientConfig, node={"private_key": "a"})
    assert "private_key needs root_certificates" in text
    certificates = {f"ssl_{name}": "x" for name in ("certfile", "keyfile", "ca_certfile")}
    text = refusal(CloudConfig, superlink={**certificates, "insecure": True})
    assert "insecure = true contradicts ssl_certfile" in text
    text = refusal(ClientConfig, node={"root_certificates": "ca.pem", "insecure": True})
    assert "insecure = true contradicts root_certificates" in text
    whole = NodeConfig(private_key=Path("a"), root_certificates=Path("b"))
    assert whole.private_key == Path("a")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "edge-0.example.org:65535", "[::1]:9092", "my_host:9092"]
)
def test_addresses(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:", ":9092", "host:0", "host:65536", "::1:9092", "host:9092\n", "host:٩٠٩٢",
     "http://host:9092", "a b:1", "host:-1"],
)  # fmt: skip
def test_not_addresses(address: str) -> None:
    with pytest.raises(ValueError, match="is not an address; write host:port"):
        check_address(address)


def test_names_of_participants() -> None:
    for name in ("a", "client-0", "0.b_c", "x" * 64):
        assert check_id(name) == name
    for name in ("", "-a", "a b", "x" * 65, "a/b", "a\n", "é"):
        with pytest.raises(ValueError, match="is not a valid name; use 1 to 64"):
            check_id(name)


def test_client_addresses_are_checked() -> None:
    twice = "names an address twice, a:1; name each edge once"
    assert twice in refusal(ClientConfig, edges=["a:1", "a:1"])
    # Host names know no case, and ports no zeros in front.
    assert "twice, A:01; name" in refusal(ClientConfig, edges=["a:1", "b:1", "A:01"])
    assert "'b' is not an address" in refusal(ClientConfig, edges=["a:1", "b"])
    assert "edges = []" in refusal(ClientConfig, edges=[])
    assert load_config(ClientConfig, overrides={"edges": ["a:1", "b:2"]}).edges == ("a:1", "b:2")


def test_reading_a_preset_gives_fresh_values() -> None:
    read_preset("digits")["schedule"]["intervals"] = 999
    assert read_preset("digits")["schedule"]["intervals"] == 12


def test_edges_started_in_one_folder_keep_apart() -> None:
    first, second = (load_config(EdgeConfig, None, {"edge_id": f"edge-{n}"}) for n in (0, 1))
    assert first.state_folder == Path(".fedphd/edge-0")
    assert second.state_folder == Path(".fedphd/edge-1")
    own = load_config(EdgeConfig, None, {"state_dir": "/tmp/own"})
    assert own.state_folder == Path("/tmp/own")


def test_the_file_of_another_role_is_known_by_its_keys(tmp_path: Path) -> None:
    path = write_toml(tmp_path / "cloud.toml", {"preset": "digits", "schedule.intervals": 3})
    with pytest.raises(ConfigError, match=f"another role: `fedphd cloud --config {path}`"):
        load_config(EdgeConfig, path)
    other = write_toml(tmp_path / "client.toml", {"client_id": "a", "edges": ["h:1"]})
    with pytest.raises(ConfigError, match=f"another role: `fedphd client --config {other}`"):
        load_config(CloudConfig, other)
    # A slip of the pen, and what two others have.
    for values in ({"edge_id": "a", "cluod": "h:1"}, {"device": "cpu"}):
        with pytest.raises(ConfigError) as raised:
            load_config(EdgeConfig, write_toml(tmp_path / "edge.toml", values))
        assert "another role" not in str(raised.value)


@pytest.mark.parametrize(
    ("cls", "key"),
    [
        (CloudConfig, "out_dir"),
        (CloudConfig, "state_dir"),
        (CloudConfig, "superlink.node_keys"),
        (CloudConfig, "evaluation.features_file"),
        (EdgeConfig, "state_dir"),
        (EdgeConfig, "superlink.ssl_certfile"),
        (ClientConfig, "state_dir"),
        (ClientConfig, "node.root_certificates"),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_path(
    cls: type[Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tls = {f"superlink.ssl_{name}": "x.pem" for name in ("certfile", "keyfile", "ca_certfile")}
    others = tls if key.startswith("superlink") else {}
    value: Any = load_config(cls, overrides={**others, key: "~/place"})
    for name in key.split("."):
        value = getattr(value, name)
    assert value == tmp_path / "place"


def test_every_path_of_a_section_is_expanded() -> None:
    # But for a data set's, which may be a hub's name.
    plain = []
    for cls in (CloudConfig, EdgeConfig, ClientConfig):
        for key in setting_keys(cls):
            section, _, name = key.rpartition(".")
            owner: Any = cls
            for part in filter(None, section.split(".")):
                owner = section_class(owner.model_fields[part].annotation)
            field = owner.model_fields[name]
            if "pathlib" in str(field.annotation) and not (
                "expanded" in str(field.metadata) or "expanded" in str(field.annotation)
            ):
                plain.append(key)
    assert plain == []


def test_the_home_of_nobody_is_named() -> None:
    text = refusal(EdgeConfig, state_dir="~nobody-of-that-name/x")
    assert "state_dir: '~nobody-of-that-name/x' begins with the home folder of a user" in text
