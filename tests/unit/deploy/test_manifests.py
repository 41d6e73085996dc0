"""Units and manifests: what they start exists, and their configurations are good."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from fedphd.common.config.roles import ClientConfig, CloudConfig, EdgeConfig, validate
from fedphd.common.config.text import merged
from fedphd.common.errors import ConfigError, Interrupted
from fedphd.deploy.cli.main import app

ROOT = Path(__file__).parents[3]
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
MANIFEST = ROOT / "deploy/kubernetes/fedphd.yaml"
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
        (container,) = manifests()["StatefulSet", f"fedphd-{tier}"]["spec"]["template"]["spec"][
            "containers"
        ]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert config.health.address == f"0.0.0.0:{ports['health']}"
        assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "health"}
        assert container["livenessProbe"]["httpGet"] == {"path": "/live", "port": "health"}
        if not isinstance(config, ClientConfig):
            assert config.superlink.address == f"0.0.0.0:{ports['fleet']}"
            check_command([word.replace("$(POD)", "edge-0") for word in container["args"]])


def test_the_manifest_starts_as_many_as_the_run_waits_for() -> None:
    found = manifests()
    cloud = tomllib.loads(found["ConfigMap", "fedphd-config"]["data"]["cloud.toml"])
    replicas = {
        name: doc["spec"]["replicas"]
        for (kind, name), doc in found.items()
        if kind == "StatefulSet"
    }
    assert replicas == {
        "fedphd-cloud": 1,
        "fedphd-edge": cloud["schedule"]["num_edges"],
        "fedphd-client": cloud["schedule"]["min_clients"],
    }
