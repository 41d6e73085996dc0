"""Units and manifests: what they start exists, and their configurations are good."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from support.compose import DEPLOY, composed
from typer.main import get_command

from fedphd.common.config.links import HealthConfig
from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig, validate
from fedphd.common.config.text import merged
from fedphd.common.errors import ConfigError, Interrupted
from fedphd.common.history.status import StatusBoard
from fedphd.deploy.cli.main import app
from fedphd.deploy.keys.development import make_all
from fedphd.deploy.launch.health import serving

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MANIFEST = DEPLOY / "kubernetes/fedphd.yaml"
CLASSES = {"cloud.toml": CloudConfig, "edge.toml": EdgeConfig, "client.toml": ClientConfig}


def check_command(words: list[str]) -> None:
    """Parse a command line of ``fedphd``; raises click's errors."""
    group: Any = get_command(app)
    context = group.make_context("fedphd", words, resilient_parsing=False)
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, rest)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_restarts_by_the_exit_codes(path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(path)
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert program == "/opt/fedphd/bin/fedphd"
    check_command(words)
    assert words[0] == path.stem.removeprefix("fedphd-")
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == str(ConfigError.exit_code)
    assert service["SuccessExitStatus"] == str(Interrupted.exit_code)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_has_a_place_for_what_libraries_keep(path: Path, tmp_path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert {"ProtectHome=true", "ProtectSystem=strict", "CacheDirectory=fedphd"} <= {*lines}
    given = [line.removeprefix("Environment=") for line in lines if line.startswith("Environment=")]
    settings = dict(word.split("=") for text in given for word in text.split())
    assert settings.keys() == {"XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "MPLCONFIGDIR"}
    # The folder that systemd makes of CacheDirectory.
    cache = "/var/cache/fedphd"
    assert all(Path(value).is_relative_to(cache) for value in settings.values())
    if path.stem != "fedphd-client":
        return
    # Own images are read in where no home folder can be seen; below /proc nobody can make one.
    for label in ("0", "1"):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / label / "a.png")
    mapped = {name: value.replace(cache, str(tmp_path)) for name, value in settings.items()}
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))
    }
    program = (
        "import sys; from fedphd.common.config.data import DataConfig; "
        "from fedphd.common.data.labelled import LabelledData; "
        "print(len(LabelledData(DataConfig(source=sys.argv[1])).labels))"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "images")]
    environment = {**kept, **mapped, "HOME": "/proc/no-home", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_understands_the_unit(path: Path, tmp_path: Path) -> None:
    # It also looks whether the program is there.
    text = path.read_text("utf-8").replace("/opt/fedphd/bin/fedphd", "/bin/true")
    (tmp_path / path.name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / path.name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    documents = yaml.safe_load_all(MANIFEST.read_text("utf-8"))
    return {(doc["kind"], doc["metadata"]["name"]): doc for doc in documents}


def test_the_manifests_fit_kubernetes_schema() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in manifests().values():
        kubernetes_validate.validate(document, "1.32", strict=True)


def test_the_manifests_configurations_are_good() -> None:
    files = manifests()["ConfigMap", "fedphd-config"]["data"]
    assert files.keys() == CLASSES.keys()
    for name, cls in CLASSES.items():
        values = tomllib.loads(files[name])
        config = validate(cls, merged({}, values), source=name)
        tier = name.removesuffix(".toml")
        (container,) = manifests()["StatefulSet", tier]["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert config.health.address == f"0.0.0.0:{ports['health']}"
        assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "health"}
        live = {"path": "/live", "port": "health"}
        assert container["livenessProbe"]["httpGet"] == container["startupProbe"]["httpGet"] == live
        if not isinstance(config, ClientConfig):
            assert config.superlink.address == f"0.0.0.0:{ports['fleet']}"
            check_command([word.replace("$(POD)", "edge-0") for word in container["args"]])


def test_a_pod_has_half_an_hour_to_open_its_data() -> None:
    tiers = [doc for (kind, _), doc in manifests().items() if kind == "StatefulSet"]
    assert len(tiers) == 3
    for tier in tiers:
        (container,) = tier["spec"]["template"]["spec"]["containers"]
        start = container["startupProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 30 * 60
        assert "initialDelaySeconds" not in container["livenessProbe"]


def test_a_pod_sees_its_own_keys_alone(tmp_path: Path) -> None:
    # Of the secret that is made of `keys`, in which all private keys are.
    hosts = ("edge-0.edge", "edge-1.edge")
    make_all(tmp_path, edges=2, clients=4, hosts=hosts, days=1)
    found = manifests()
    for pod, own in {
        "cloud": {"ca.pem": "ca.pem", "server.pem": "cloud.pem", "server.key": "cloud.key"},
        "edge-1": {
            "ca.pem": "ca.pem",
            "server.pem": "edge-1.pem",
            "server.key": "edge-1.key",
            "node": "edge-1-node",
        },
        "client-3": {"ca.pem": "ca.pem", "node": "client-3-node"},
    }.items():
        spec = found["StatefulSet", pod.partition("-")[0]]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        mounted = {
            Path(mount["mountPath"]): mount.get("subPath")
            or mount["subPathExpr"].replace("$(POD)", pod)
            for mount in container["volumeMounts"]
            if mount["name"] == "keys"
        }
        assert mounted == {Path("/keys") / path: name for path, name in own.items()}
        assert all((tmp_path / name).is_file() for name in own.values())
        registries = [v["configMap"]["name"] for v in spec["volumes"] if v["name"] == "registered"]
        assert registries == {"cloud": ["registered-edges"], "edge-1": ["registered-clients"]}.get(
            pod, []
        )


def test_compose_starts_as_many_as_the_run_waits_for() -> None:
    services = composed()
    cloud = tomllib.loads((DEPLOY / "cluster/cloud.toml").read_text("utf-8"))["schedule"]
    tiers = Counter(n.partition("-")[0] for n, one in services.items() if "profiles" not in one)
    assert tiers == {
        "keys": 1, "cloud": 1, "edge": cloud["num_edges"], "client": cloud["min_clients"]
    }  # fmt: skip
    client = tomllib.loads((DEPLOY / "cluster/client.toml").read_text("utf-8"))
    assert client["data"]["partition"]["num_partitions"] == tiers["client"]
    # Clients and cloud have no network in common.
    networks = {name: set(service.get("networks", ())) for name, service in services.items()}
    expected = {
        "cloud": {"upper"}, "edge": {"upper", "lower"}, "client": {"lower"},
        "prometheus": {"upper", "lower", "monitor"}, "grafana": {"monitor", "desk"},
    }  # fmt: skip
    for name, own in networks.items():
        assert own == expected.get(name.partition("-")[0], set())


def test_a_composed_service_comes_back_however_often() -> None:
    # Docker counts against a limit what happened days ago.
    services = composed()
    assert {name for name, one in services.items() if one.get("restart") != "on-failure"} == {
        "keys"
    }


def check_healthy(test: list[str], folder: Path) -> None:
    """A service's check asks the process itself, where the environment names a proxy too."""
    assert test[:2] == ["CMD", "python"]
    with serving(HealthConfig(), StatusBoard("client", "a"), folder) as address:
        program = test[-1].replace("127.0.0.1:8080/ready", f"{address}/live")
        assert program != test[-1]
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:1"}
        subprocess.run([sys.executable, *test[2:-1], program], env=environment, check=True)


@pytest.mark.parametrize("name", sorted(set(composed()) - {"keys", "prometheus", "grafana"}))
def test_a_composed_service_has_a_good_command(name: str, tmp_path: Path) -> None:
    service = composed()[name]
    # As compose fills it in where the environment says nothing.
    command = [word.replace("${METRICS:-false}", "false") for word in service["command"]]
    check_command(command)
    tier = name.partition("-")[0]
    assert command[0] == tier
    config = DEPLOY / "cluster" / Path(command[command.index("--config") + 1]).name
    values = tomllib.loads(config.read_text("utf-8"))
    checked = validate(CLASSES[config.name], merged({}, values), source=config.name)
    assert checked.health.address == "0.0.0.0:8080"
    assert command[-2:] == ["--set", "health.metrics=false"]
    check_healthy(service["healthcheck"]["test"], tmp_path)
    if tier != "cloud":
        assert command[command.index(f"--{tier}-id") + 1] == name
    if tier == "client":
        assert command[command.index("--partition") + 1] == name.partition("-")[2]
    # Its own keys, and its own data.
    assert service["volumes"] == ["./cluster:/cluster:ro", f"keys-{name}:/keys:ro", f"{name}:/data"]


def test_the_manifest_starts_as_many_as_the_run_waits_for() -> None:
    found = manifests()
    cloud = tomllib.loads(found["ConfigMap", "fedphd-config"]["data"]["cloud.toml"])
    replicas = {
        name: doc["spec"]["replicas"]
        for (kind, name), doc in found.items()
        if kind == "StatefulSet"
    }
    assert replicas == {
        "cloud": 1,
        "edge": cloud["schedule"]["num_edges"],
        "client": cloud["schedule"]["min_clients"],
    }
