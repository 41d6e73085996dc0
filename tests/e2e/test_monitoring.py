"""A small federation that a real Prometheus watches, by the configuration that is shipped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import torch
import yaml
from support.grafana import MONITORING, queries
from support.processes import Processes, free_port
from support.scrape import kinds, scrape
from support.site import CLIENTS, EDGES, Site
from support.waiting import wait_until

from fedphd.deploy.launch.series import PREFIX, SERIES

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="prometheus is not installed (Debian: apt-get install prometheus)",
    ),
]

EVERYBODY = ("cloud", *EDGES, *CLIENTS)
SETTINGS: dict[str, Any] = {
    # It is watched while it runs.
    "schedule.intervals": 1000,
    "schedule.min_clients": len(CLIENTS),
    "evaluation.every_intervals": 1,
    "evaluation.num_samples": 32,
    "evaluation.raw_too": True,
}


def configuration(folder: Path, addresses: dict[str, str]) -> Path:
    """The shipped configuration for these addresses, by name; it asks every second."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    for group in config["scrape_configs"][0]["static_configs"]:
        tier = group["labels"]["tier"]
        group["targets"] = [a for name, a in addresses.items() if name.startswith(tier)]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def asked(address: str, what: str, **parameters: str) -> Any:
    """Prometheus' answer."""
    url = f"http://{address}/api/v1/{what}?{urlencode(parameters)}"
    with urlopen(url, timeout=60) as answer:
        return json.loads(answer.read())["data"]


def values(address: str, expression: str) -> list[dict[str, Any]]:
    """The values of an expression now."""
    found: list[dict[str, Any]] = asked(address, "query", query=expression)["result"]
    return found


@pytest.fixture
def site(processes: Processes) -> Site:
    """A federation whose processes all tell Prometheus, started."""
    site = Site(processes, SETTINGS)
    for name in (*EDGES, *CLIENTS, "cloud"):
        health = {"health.address": "127.0.0.1:0", "health.metrics": True}
        held_out = {"data.validation_fraction": 0.2} if name in CLIENTS else {}
        site.start(name, **health, **held_out)
    return site


def test_prometheus_sees_a_federation(site: Site, processes: Processes) -> None:
    site.programs["cloud"].wait_line("evaluated before training")
    addresses = {
        name: str(json.loads((site.folder_of(name) / "health.json").read_text("utf-8"))["address"])
        for name in EVERYBODY
    }
    prometheus = f"127.0.0.1:{free_port()}"
    processes.start_command(
        [
            "prometheus",
            f"--config.file={configuration(processes.folder, addresses)}",
            f"--storage.tsdb.path={processes.folder / 'tsdb'}",
            f"--web.listen-address={prometheus}",
        ]
    ).wait_line("Server is ready")
    # By then the network has been pruned.
    site.programs["cloud"].wait_line(r"evaluated after interval")
    wait_until(lambda: bool(values(prometheus, "fedphd_cloud_evaluated_interval >= 1")))

    # One that has not been scraped yet is "unknown" for up to an interval.
    wait_until(lambda: "unknown" not in {t["health"] for t in targets(prometheus)})
    assert [t["lastError"] for t in targets(prometheus) if t["health"] != "up"] == []
    assert len(targets(prometheus)) == len(EVERYBODY)
    wait_until(lambda: [rule["health"] for rule in rules(prometheus)] == ["ok"] * 6)

    # A rate has a value once two scrapes lie in its window.
    gpu = torch.cuda.is_available()
    without = [] if gpu else ["GPU memory"]
    wait_until(lambda: empty(prometheus) == without)

    for name, address in addresses.items():
        text, tier = scrape(address), name.partition("-")[0]
        own = {n for n, one in SERIES.items() if tier in one.of and not one.only}
        expected = {PREFIX + n for n in own - (set() if gpu else {"gpu_memory_bytes"})}
        assert kinds(text).keys() == expected, name
        assert "client-" not in text

    # Every client in both rounds of an interval.
    (trained,) = values(prometheus, "sum(fedphd_edge_client_rounds_total)")
    assert float(trained["value"][1]) >= 2 * len(CLIENTS)
    (connected,) = values(prometheus, 'fedphd_peers{tier="cloud", kind="edge", state="connected"}')
    assert float(connected["value"][1]) == len(EDGES)


def empty(prometheus: str) -> list[str]:
    """The panels of the dashboard that would show nothing now."""
    return [title for title, query in queries() if not values(prometheus, query)]


def targets(prometheus: str) -> list[dict[str, Any]]:
    """What is scraped, with how the last scrape went."""
    found: list[dict[str, Any]] = asked(prometheus, "targets")["activeTargets"]
    return found


def rules(prometheus: str) -> list[dict[str, Any]]:
    """The rules, with how their last evaluation went."""
    found: list[dict[str, Any]] = asked(prometheus, "rules")["groups"][0]["rules"]
    return found
