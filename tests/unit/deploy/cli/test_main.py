"""The ``fedphd`` command as a user meets it: output, errors and exit codes."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from click import Command, Group
from PIL import Image
from support.command import fedphd
from support.processes import free_port

from fedphd.common.config.data import Section
from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig, load_config, validate
from fedphd.common.config.text import parse_settings
from fedphd.deploy.cli.flags import overrides
from fedphd.deploy.cli.main import app
from fedphd.deploy.launch.needs import CLIENTS_PER_CORE, cores

ROLES: dict[str, type[Section]] = {
    "cloud": CloudConfig,
    "edge": EdgeConfig,
    "client": ClientConfig,
    "local": CloudConfig,
}


# What --insecure sets; everything else of theirs is to be encrypted.
INSECURE = {
    "cloud": ["superlink.insecure"],
    "edge": ["superlink.insecure", "node.insecure"],
    "client": ["node.insecure"],
    "local": [],
}
PLAIN = {role: ["--insecure"] for role, keys in INSECURE.items() if keys}


@pytest.fixture
def busy() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("role", ROLES)
def test_dry_run_prints_the_configuration_and_starts_nothing(role: str, tmp_path: Path) -> None:
    done = fedphd(role, *PLAIN.get(role, ()), "--dry-run", "--set", "num_threads=3", cwd=tmp_path)
    assert done.returncode == 0
    # Only the launcher of clients knows how their data is split.
    split = r"data      digits-pathological-2x6-seed0-[0-9a-f]{8}: 180 to 363 images per client\n"
    # On a machine that is short of memory.
    split += r"(note .*\n)?"
    assert re.fullmatch(split if role == "local" else "", done.stderr)
    plain = [f"{key}=true" for key in INSECURE[role]]
    expected = load_config(ROLES[role], overrides={"num_threads": 3, **parse_settings(plain)})
    assert validate(ROLES[role], json.loads(done.stdout), source="output") == expected
    assert not list(tmp_path.iterdir())


def test_set_wins_over_flags_and_flags_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "cloud.toml").write_text(
        'seed = 1\npreset = "celeba"\n[superlink]\naddress = "a:1"\n', encoding="utf-8"
    )
    done = fedphd(
        "cloud", "--insecure", "--dry-run", "--config", "cloud.toml", "--preset", "cifar10",
        "--address", "b:2", "--set", "superlink.address=c:3", "--set", "schedule.intervals=300",
        cwd=tmp_path,
    )  # fmt: skip
    shown = json.loads(done.stdout)
    assert (shown["seed"], shown["preset"], shown["num_classes"]) == (1, "cifar10", 10)
    assert shown["superlink"]["address"] == "c:3"
    assert shown["schedule"]["intervals"] == 300


def test_flags_reach_their_fields() -> None:
    arguments = ["--edge-id", "7", "--cloud", "c:1", "--address", "d:2"]
    edge = json.loads(fedphd("edge", "--insecure", *arguments, "--dry-run").stdout)
    assert (edge["edge_id"], edge["cloud"], edge["superlink"]["address"]) == ("7", "c:1", "d:2")
    arguments = ["--client-id", "me", "--edge", "a:1", "--edge", "b:2", "--partition", "0"]
    client = json.loads(fedphd("client", "--insecure", *arguments, "--dry-run").stdout)
    assert (client["client_id"], client["edges"]) == ("me", ["a:1", "b:2"])
    assert client["data"]["partition"]["partition_id"] == 0
    local = json.loads(fedphd("local", "--edges", "3", "--clients", "9", "--dry-run").stdout)
    assert (local["schedule"]["num_edges"], local["schedule"]["min_clients"]) == (3, 9)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["cloud", "--set", "training.batch_size=0"],
         "training.batch_size = 0: input should be greater than or equal to 1 (images per step)"),
        (["cloud", "--set", "schedule.interval=3"],
         "schedule.interval: unknown key; did you mean 'schedule.intervals'?"),
        (["cloud", "--set", "schedule.intervals=3"],
         "pruning.sparse_rounds = 25 prunes after the last of 15 edge rounds"),
        (["cloud", "--preset", "mnist"], "preset = 'mnist': unknown; choose one of digits"),
        (["cloud", "--config", "no.toml"], "--config no.toml: cannot be read: No such file"),
        (["cloud", "--set", "seed"], "--set seed: write KEY=VALUE"),
        (["edge", "--cloud", "nowhere"], "cloud: 'nowhere' is not an address; write host:port"),
        (["client", "--partition", "6"],
         "data.partition: partition_id = 6, but there are num_partitions = 6 parts; use 0 to 5"),
        (["client", "--edge", "a:1", "--edge", "a:1"], "names an address twice"),
        (["local", "--clients", "0"], "schedule.min_clients = 0: input should be greater"),
    ],
)  # fmt: skip
def test_bad_configuration_exits_2_and_says_what_to_do(
    arguments: list[str], text: str, tmp_path: Path
) -> None:
    done = fedphd(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fedphd: ")
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["cloud", "--addres", "a:1"], ["nope"], ["config", "server"], ["edge", "extra"]]
)
def test_unknown_words_exit_2(arguments: list[str]) -> None:
    done = fedphd(*arguments)
    assert done.returncode == 2
    assert arguments[-1] in done.stderr or arguments[-2] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["local", "--topology", "flat"], "It is a setting: --set topology=VALUE."),
        (["simulate", "--learning-rate=1"], "a setting: --set training.learning_rate=VALUE."),
        (["compare", "--partition-seed", "1"], "or --set data.partition.seed=VALUE."),
        (["client", "--lost-after-s", "1"], "a setting: --set node.lost_after_s=VALUE."),
        (
            ["cloud", "--colour", "red"],
            "Settings are given by --set KEY=VALUE; fedphd config cloud lists",
        ),
        (["status", "--topology", "flat"], ""),
    ],
)
def test_a_setting_that_is_written_as_a_flag_is_met_with_the_flag(
    arguments: list[str], text: str
) -> None:
    done = fedphd(*arguments)
    assert done.returncode == 2
    assert arguments[1].partition("=")[0] in done.stderr
    assert text in done.stderr
    assert bool(text) == (" --set " in done.stderr)


def test_cloud_names_a_busy_port_and_exits_3(busy: str, tmp_path: Path) -> None:
    done = fedphd("cloud", "--insecure", "--address", busy, "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 3
    assert f"fedphd: superlink.address = {busy}: cannot listen there" in done.stderr
    assert "Traceback" not in done.stderr
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text("utf-8"))
    assert verdict["exit_code"] == 3
    assert busy in verdict["message"]
    again = fedphd("cloud", "--insecure", "--address", busy, "--run-dir", "run", cwd=tmp_path)
    assert "cannot listen there" in again.stderr


def test_a_cloud_that_cannot_write_its_state_exits_3_and_leaves_no_run(tmp_path: Path) -> None:
    (tmp_path / "state" / "superlink.log").mkdir(parents=True)
    address = f"127.0.0.1:{free_port()}"
    done = fedphd(
        "cloud", "--insecure", "--address", address, "--set", "state_dir=state", cwd=tmp_path
    )
    assert done.returncode == 3
    assert done.stderr.startswith("fedphd: state_dir = state: cannot be written to: Is a directory")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_checkpoint_that_is_not_there_exits_2(tmp_path: Path) -> None:
    for command in ("evaluate", "sample"):
        done = fedphd(command, "nowhere", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("fedphd: checkpoint nowhere: there is no such folder")


def test_a_missing_features_file_is_found_before_anything_starts(tmp_path: Path) -> None:
    done = fedphd(
        "cloud", "--insecure", "--dry-run", "--set", "evaluation.features_file=no", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "evaluation.features_file = no: no such file" in done.stderr
    done = fedphd(
        "cloud", "--insecure", "--dry-run", "--set", "evaluation.inception_weights=no", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "evaluation.inception_weights = no: no such file" in done.stderr


def test_the_clients_data_are_named_and_not_what_samples_are_compared_with(tmp_path: Path) -> None:
    for command in ("local", "simulate"):
        done = fedphd(command, "--dry-run", "--data", "./no", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("fedphd: in [data]: source = './no': no such file or folder")
    for label in ("crow", "jay"):
        (tmp_path / "birds" / label).mkdir(parents=True)
        for number in range(6):
            Image.new("L", (8, 8)).save(tmp_path / "birds" / label / f"{number}.png")
    done = fedphd("local", "--dry-run", "--data", "./birds", "--clients", "2", cwd=tmp_path)
    assert "in [data]: num_classes = 10, but source = './birds' has only 2 classes" in done.stderr


def test_edge_names_a_busy_port_and_exits_3(busy: str, tmp_path: Path) -> None:
    done = fedphd("edge", "--insecure", "--address", busy, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith(f"fedphd: superlink.address = {busy}: cannot listen there")


@pytest.mark.parametrize("command", ["cloud", "local"])
def test_run_folder_that_cannot_be_used_exits_3(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = fedphd(command, *PLAIN.get(command, ()), "--run-dir", "file", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "fedphd: --run-dir = file: cannot be created: File exists" in done.stderr
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").touch()
    done = fedphd(command, *PLAIN.get(command, ()), "--run-dir", "old", cwd=tmp_path)
    assert done.returncode == 3
    assert "already holds a run" in done.stderr
    assert "file" in fedphd(command, "--set", "out_dir=file", cwd=tmp_path).stderr


@pytest.mark.parametrize("role", ["cloud", "edge", "client"])
def test_config_lists_settings_as_toml_with_their_defaults(role: str) -> None:
    done = fedphd("config", role)
    assert (done.returncode, done.stderr) == (0, "")
    cls = ROLES[role]
    assert validate(cls, tomllib.loads(done.stdout), source="output") == load_config(cls)
    assert "seconds" in done.stdout


def test_config_lists_meaning_unit_and_range() -> None:
    text = fedphd("config", "cloud").stdout
    for expected in (
        "# cloud rounds  [>= 1]\nschedule.intervals = 12\n",
        "# learning rate, the optimiser's step size  [> 0, <= 1]\ntraining.learning_rate = 0.002\n",
        "# seconds for a client's training reply  [> 0]\nwaits.round_s = 600.0\n",
        "# where evaluation runs  [auto | cpu | cuda]\ndevice = \"auto\"\n",
        "# target label distribution; absent: uniform over num_classes\n# target = (absent)\n",
        "\nevaluation.reference.source = \"digits\"\n",
        "  [length >= 1]\nmodel.block_out_channels = [32, 64]\n",
        "out_dir = \"runs\"\n",
    ):  # fmt: skip
        assert expected in text
    assert 'superlink.address = "0.0.0.0:9192"' in fedphd("config", "edge").stdout


def test_config_shows_a_setting_a_section_or_another_preset() -> None:
    one = fedphd("config", "cloud", "schedule.intervals", "--preset", "cifar10").stdout
    assert one.endswith("\n\n# cloud rounds  [>= 1]\nschedule.intervals = 200\n")
    assert "Settings of `fedphd cloud`, preset cifar10" in one
    section = tomllib.loads(fedphd("config", "cloud", "ema").stdout)
    assert section == {"ema": {"decay": 0.995, "warmup": 10}}
    done = fedphd("config", "cloud", "schedule.interval")
    problem = "the cloud has no such setting; did you mean 'schedule.intervals'?"
    assert (done.returncode, done.stderr) == (2, f"fedphd: schedule.interval: {problem}\n")
    assert fedphd("config", "edge", "--preset", "digits").returncode == 2


def commands() -> dict[str, Command]:
    group = typer.main.get_command(app)
    assert isinstance(group, Group)
    return group.commands


@pytest.mark.parametrize("name", [*ROLES, "config", "evaluate", "sample"])
def test_help_explains_every_flag_with_its_default(name: str) -> None:
    done = fedphd(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    options = [option for option in commands()[name].params if option.param_type_name == "option"]
    for option in options:
        assert max(option.opts, key=len) in text
        assert getattr(option, "help", None), option.name
    plain = ("plain", "no_report", "dry_run", "as_json", "go_on", "insecure", "help")
    with_default = [option for option in options if option.name not in plain]
    assert text.count("[default: ") == len(with_default)


def leaves(command: Command, *path: str) -> Iterator[tuple[str, ...]]:
    """The words of every command below this one."""
    if isinstance(command, Group):
        for name, one in command.commands.items():
            yield from leaves(one, *path, name)
    else:
        yield path


@pytest.mark.parametrize("words", list(leaves(typer.main.get_command(app))), ids=" ".join)
def test_help_is_whole_on_a_terminal_of_80_columns(words: tuple[str, ...]) -> None:
    text = fedphd(*words, "--help", columns=80).stdout
    assert text
    # What does not fit is cut off with one of these.
    assert "…" not in text


def test_defaults_in_the_help_are_the_real_ones() -> None:
    edge, client = load_config(EdgeConfig), load_config(ClientConfig)
    cloud = load_config(CloudConfig)
    for name, values in {
        "cloud": [cloud.superlink.address, cloud.preset, str(cloud.out_dir)],
        "edge": [edge.edge_id, edge.cloud, edge.superlink.address],
        "client": [client.client_id, client.edges[0]],
        "local": [str(cloud.schedule.num_edges), str(cloud.schedule.min_clients)],
    }.items():
        defaults = " ".join(str(getattr(p, "show_default", "")) for p in commands()[name].params)
        for value in values:
            assert value in defaults


def test_overview_lists_commands_and_exit_codes() -> None:
    text = " ".join(fedphd("--help").stdout.split())
    for word in (*ROLES, "config", "0 success", "2 bad configuration", "130 interrupted"):
        assert word in text
    assert fedphd("--version").stdout == f"fedphd {version('fedphd')}\n"
    alone = fedphd()
    assert "Usage: fedphd" in alone.stdout + alone.stderr or "Usage: " in alone.stdout


def test_commands_start_without_the_heavy_libraries() -> None:
    code = (
        "import sys, fedphd.deploy.cli.main\n"
        "heavy = {'torch', 'diffusers', 'flwr', 'datasets', 'matplotlib', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        # A launcher stays for the whole run, with all that it has imported.
        "from fedphd.common.config.data import DataConfig, PartitionConfig\n"
        "from fedphd.common.config.roles import CloudConfig\n"
        "from fedphd.deploy.launch.runs import check_data, open_client_data\n"
        "check_data(CloudConfig())\n"
        "open_client_data(DataConfig(partition=PartitionConfig()), 10)\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\nFalse\n"


def test_flags_that_were_not_given_override_nothing() -> None:
    assert overrides({"a": None, "b": 0, "c": ""}, None) == {"b": 0, "c": ""}
    assert overrides({"a": 1, "b": 2}, ["a=null"]) == {"a": None, "b": 2}


def test_a_number_of_edges_beside_a_flat_federation_is_refused(tmp_path: Path) -> None:
    flat = ("--set", "topology=flat", "--set", "pruning.mode=none")
    done = fedphd("local", "--edges", "3", *flat, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        "--edges (schedule.num_edges) = 3, but a flat federation has no edges: leave it out, or "
        "set topology=hierarchical"
    ) in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_many_processes_need(tmp_path: Path) -> None:
    many = str(CLIENTS_PER_CORE * cores() + 1)
    done = fedphd("local", "--clients", many, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"note      {int(many) + 3} processes on {cores()} core(s) need about ")
    assert json.loads(done.stdout)["schedule"]["min_clients"] == int(many)


def test_clients_that_leave_classes_out_are_told_the_flags(tmp_path: Path) -> None:
    done = fedphd("simulate", "--clients", "3", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith(
        "use at least 5 parts (num_partitions), or 4 classes per part (classes_per_partition); "
        "the flags are --clients (num_partitions) and --classes-per-client "
        "(classes_per_partition)"
    )


def test_a_local_run_that_cannot_start_leaves_no_folder(tmp_path: Path) -> None:
    names = ("node_keys", "ssl_certfile", "ssl_keyfile", "ssl_ca_certfile")
    words = [word for name in names for word in ("--set", f"superlink.{name}=keys")]
    done = fedphd("local", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "superlink.node_keys = keys" in done.stderr
    assert list((tmp_path / "runs").iterdir()) == []
