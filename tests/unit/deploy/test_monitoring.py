"""Prometheus' configuration, the alerts and the dashboard fit together, and to what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.compose import composed
from support.grafana import MONITORING, panels, queries

from fedphd.deploy.launch.series import PREFIX, SERIES

ALERTS = MONITORING / "alerts.yml"
NOT_THERE = "promtool is not installed (Debian: apt-get install prometheus)"


def load(path: str) -> Any:
    return yaml.safe_load((MONITORING / path).read_text("utf-8"))


@pytest.mark.skipif(shutil.which("promtool") is None, reason=NOT_THERE)
@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", str(MONITORING / "prometheus.yml")),
        ("test", "rules", str(Path(__file__).with_name("alerts_test.yml"))),
    ],
    ids=" ".join,
)
def test_promtool_is_content(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> Iterator[tuple[str, str]]:
    """All that is asked of Prometheus, with who asks."""
    yield from queries()
    for rule in load("alerts.yml")["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


@pytest.mark.parametrize(("who", "asked"), [*expressions()], ids=lambda value: str(value)[:60])
def test_only_series_and_labels_that_there_are_are_asked_for(who: str, asked: str) -> None:
    found = re.findall(rf"{PREFIX}(\w+)(?:\{{(.*?)\}})?", asked)
    # Two are Prometheus' own.
    assert found or "ALERTS" in asked or asked.startswith("up{"), who
    for name, matchers in found:
        base = name if name in SERIES else re.sub("_(sum|count|bucket)$", "", name)
        assert base in SERIES, f"{who}: there is no series {PREFIX}{name}"
        for label, values in re.findall(r'(\w+)=~?"(.*?)"', matchers):
            if label in ("tier", "job"):
                continue
            assert set(values.split("|")) <= set(SERIES[base].labels[label]), f"{who}: {label}"


def test_the_series_that_alerts_name_in_words_are_there() -> None:
    for name in re.findall(rf"{PREFIX}(\w+)", ALERTS.read_text("utf-8")):
        assert name in SERIES or re.sub("_(sum|count)$", "", name) in SERIES, name


def test_the_dashboard_asks_the_source_that_is_provisioned() -> None:
    (source,) = load("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels()} == {source["uid"]}
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids) >= 25
    services = composed()
    (provider,) = load("grafana/provisioning/dashboards/fedphd.yml")["providers"]
    folder = provider["options"]["path"]
    assert f"./monitoring/grafana/dashboards:{folder}:ro" in services["grafana"]["volumes"]
    (alias,) = services["prometheus"]["networks"]["monitor"]["aliases"]
    assert source["url"] == f"http://{alias}:9090"
    # Nobody in the networks of the federation reaches what Prometheus has gathered.
    assert f"--web.listen-address={alias}:9090" in services["prometheus"]["command"]


def test_prometheus_asks_every_process_of_the_cluster() -> None:
    (job,) = load("prometheus.yml")["scrape_configs"]
    asked = {
        target: group["labels"]["tier"]
        for group in job["static_configs"]
        for target in group["targets"]
    }
    tiers = {"cloud", "edge", "client"}
    there = {name: name.partition("-")[0] for name in composed()}
    assert asked == {f"{name}:8080": tier for name, tier in there.items() if tier in tiers}


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_what_monitors_has_no_rights_and_a_version(name: str) -> None:
    service = composed()[name]
    assert service["profiles"] == ["monitoring"]
    assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].partition(":")[0] != "0"
    assert not service.get("privileged")
    writable = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
    assert [volume.partition(":")[0] for volume in writable] == [name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
