"""Events as numbers for Prometheus: hand-worked values, bounded labels, no names by default."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.manuals import ROOT
from support.scrape import kinds, parse, scrape

from fedphd.common.config.links import HealthConfig
from fedphd.common.config.roles import ClientConfig, EdgeConfig, load_config
from fedphd.common.errors import ConfigError
from fedphd.common.events import Event
from fedphd.common.history.evaluation import Quality
from fedphd.common.history.events import (
    SERVES,
    Evaluated,
    IntervalEnded,
    PeerChanged,
    Pruned,
    RoundEnded,
    Started,
    Trained,
)
from fedphd.common.history.status import StatusBoard
from fedphd.common.unet.costs import Costs
from fedphd.common.wire.metrics import MetricValues
from fedphd.common.wire.traffic import Traffic
from fedphd.deploy.launch.health import serving
from fedphd.deploy.launch.metrics import Metrics
from fedphd.deploy.launch.series import ALL, MOST_NAMES, PREFIX, SERIES, table

ON = HealthConfig(metrics=True)


class Process:
    """A process of a role, and what it tells Prometheus."""

    def __init__(self, role: str, node: str, config: HealthConfig = ON) -> None:
        self.board = StatusBoard(role, node)
        self.metrics = Metrics(config, self.board, {"state": Path("/")})

    def tell(self, *events: Event, role: str = "") -> None:
        role = role or self.board.snapshot().role
        for event in events:
            self.board.event(event.model_copy(update={"role": role}))

    @property
    def text(self) -> str:
        return self.metrics.text().decode()

    def value(self, name: str, **labels: str) -> float:
        return parse(self.text)[f"{PREFIX}{name}", frozenset(labels.items())]

    def names(self) -> set[str]:
        return {name.removeprefix(PREFIX) for name in kinds(self.text)}


def edge_round(**changes: Any) -> RoundEnded:
    values: dict[str, Any] = {
        "interval": 1, "edge_round": 1, "round": 1, "rounds": 10, "loss": 0.5, "time": 100.0,
        "clients": ["client-0", "client-7"], "num_samples": 40, "label_distribution": [0.75, 0.25],
        "target_distribution": [0.5, 0.5], "homogeneity": 1.75, "failures": ["client-3: x"],
        "failed": {"straggler": 1}, "phases": {"asking": 1.0, "training": 3.0},
        "update_norm": 0.1, "largest_update_norm": 0.4, "sent_bytes": 1000, "received_bytes": 600,
        "seconds": 4.0, "left_s": 36.0,
    }  # fmt: skip
    return RoundEnded(**{**values, **changes})


def interval(**changes: Any) -> IntervalEnded:
    values: dict[str, Any] = {
        "interval": 1, "intervals": 5, "sparse": True, "parameters": 100, "macs": 200, "time": 50.0,
        "client_edge_bytes": 1600, "edge_cloud_bytes": 30, "training_flops": 7.0, "left_s": 9.0,
        "loss": 0.25, "edge_weights": {"edge-0": 0.5, "edge-1": 0.0},
        "edge_homogeneity": {"edge-0": 1.5}, "clients": ["client-0"], "client_rounds": 2,
        "failures": ["client-3: x", "edge-1: y"], "failed": {"late": 1}, "images": 64,
        "client_edge": Traffic(sent_bytes=1000, received_bytes=600), "seconds": 8.0,
        "edge_cloud": Traffic(sent_bytes=20, received_bytes=10), "update_norm": 2.0,
        "phases": {"edges": 6.0, "averaging": 2.0},
    }  # fmt: skip
    return IntervalEnded(**{**values, **changes})


def evaluated(distance: float | None, **changes: Any) -> Evaluated:
    return Evaluated(
        what="", weights="ema", interval=1, frechet_distance=distance, seconds=2.0, features="c",
        num_samples=4, sampler="DDIM", sampling_steps=2, seed=0, **changes,
    )  # fmt: skip


PRUNED = Pruned(
    interval=1, requested_ratio=0.5, achieved_ratio=0.4, achieved_ratios=(0.4,),
    widths_before=(10,), widths_after=(6,), before=Costs(parameters=1, macs=1),
    after=Costs(parameters=1, macs=1),
)  # fmt: skip

TRAINED = Trained(
    time=30.0, interval=2, edge_round=3, images=90, steps=12, seconds=5.0, loss=0.75,
    phases={"reading": 1.0, "training": 4.0}, gpu_memory={"peak": 5, "reserved": 6, "total": 7},
)  # fmt: skip


def test_an_edges_rounds_by_hand() -> None:
    edge = Process("edge", "edge-0")
    edge.tell(edge_round(), edge_round(
        round=2, time=110.0, failed={"straggler": 1, "late": 2}, clients=["client-0"], loss=None,
        sent_bytes=1500, received_bytes=700, phases={"asking": 0.5, "training": 1.5}, seconds=2.0,
    ))  # fmt: skip
    assert (edge.value("edge_round"), edge.value("edge_rounds")) == (2, 10)
    assert edge.value("edge_round_seconds_sum") == 6
    assert edge.value("edge_round_seconds_bucket", le="2.0") == 1
    assert edge.value("edge_round_cycle_seconds_sum") == 10
    assert edge.value("edge_round_cycle_seconds_count") == 1
    assert edge.value("edge_last_round_timestamp_seconds") == 110
    assert edge.value("edge_round_phase_seconds_total", phase="training") == 4.5
    assert edge.value("edge_round_clients", outcome="trained") == 1
    assert edge.value("edge_round_clients", outcome="failed") == 3
    assert edge.value("edge_client_rounds_total") == 3
    assert edge.value("edge_client_failures_total", reason="straggler") == 2
    assert edge.value("edge_client_failures_total", reason="malformed") == 0
    assert edge.value("edge_homogeneity_score") == 1.75
    assert edge.value("edge_update_norm", statistic="largest") == 0.4
    # Nobody measured it in the last round: neither 0 nor what was before.
    assert math.isnan(edge.value("edge_loss"))
    assert "edge_validation_loss" not in edge.names()
    # The event's bytes count from the start, and so does a counter.
    assert edge.value("link_bytes_total", hop="client_edge", direction="down") == 1500
    assert edge.value("link_bytes_total", hop="client_edge", direction="up") == 700
    assert 'hop="edge_cloud"' not in edge.text


def test_a_clouds_intervals_by_hand() -> None:
    cloud = Process("cloud", "cloud")
    serves = PeerChanged(peer="edge-0", change=SERVES, detail="client-0,client-3")
    cloud.tell(serves, interval(), interval(time=58.0), PRUNED)
    assert (cloud.value("cloud_interval"), cloud.value("cloud_intervals")) == (1, 5)
    assert cloud.value("cloud_interval_seconds_sum") == 16
    assert cloud.value("cloud_interval_cycle_seconds_sum") == 8
    assert cloud.value("cloud_interval_phase_seconds_total", phase="edges") == 12
    assert cloud.value("cloud_edge_weight_ratio", edge="edge-1") == 0
    assert cloud.value("cloud_edge_homogeneity_score", edge="edge-0") == 1.5
    assert cloud.value("cloud_edge_clients", edge="edge-0") == 2
    assert cloud.value("cloud_client_rounds_total") == 4
    # Of two failures in each, one is an edge's own.
    assert cloud.value("cloud_client_failures_total") == 2
    assert cloud.value("cloud_edge_failures_total", reason="late") == 2
    assert cloud.value("cloud_edges_link_bytes_total", direction="up") == 1200
    assert cloud.value("link_bytes_total", hop="edge_cloud", direction="down") == 40
    assert cloud.value("cloud_images_total") == 128
    assert (cloud.value("cloud_loss"), cloud.value("cloud_update_norm")) == (0.25, 2)
    assert (cloud.value("cloud_sparse"), cloud.value("cloud_pruned_ratio")) == (1, 0.4)


def test_distances_and_the_lowest_of_them() -> None:
    cloud = Process("cloud", "cloud")
    assert "cloud_frechet_distance" not in cloud.names()
    raw = Quality(frechet_distance=70.0)
    for event in (evaluated(50.0), evaluated(20.0), evaluated(30.0, raw=raw, precision=0.5)):
        cloud.tell(event)
    assert cloud.value("cloud_frechet_distance", weights="ema") == 30
    assert cloud.value("cloud_lowest_frechet_distance", weights="ema") == 20
    assert cloud.value("cloud_frechet_distance", weights="raw") == 70
    assert cloud.value("cloud_precision_ratio", weights="ema") == 0.5
    assert cloud.value("cloud_evaluation_seconds_sum") == 6


def test_a_clients_rounds_by_hand() -> None:
    client = Process("client", "client-0")
    client.board.linked("a:1", "connected")
    client.board.linked("b:1", "lost")
    client.tell(TRAINED, TRAINED.model_copy(update={"gpu_memory": {}, "time": 40.0}))
    assert client.value("client_round_seconds_count") == 2
    assert client.value("client_round_phase_seconds_total", phase="training") == 8
    assert client.value("client_steps_total") == 24
    assert (client.value("client_images"), client.value("client_loss")) == (90, 0.75)
    assert client.value("client_last_round_timestamp_seconds") == 40
    assert client.value("gpu_memory_bytes", kind="reserved") == 6
    assert client.value("upstream_connections") == 1
    assert client.value("live") == client.value("ready") == 1
    memory = client.value("process_resident_memory_bytes", process="client")
    # This test's own process.
    assert 1e7 < memory < 1e10
    assert client.value("disk_size_bytes", folder="state") > client.value(
        "disk_free_bytes", folder="state"
    )


def test_a_flat_cloud_is_its_own_edge() -> None:
    cloud = Process("cloud", "cloud")
    cloud.tell(PeerChanged(peer="cloud", change="joined", detail=""))
    cloud.tell(PeerChanged(peer="client-0", change="joined", detail=""), role="edge")
    cloud.tell(edge_round(), role="edge")
    cloud.tell(interval(edge_weights={"cloud": 1.0}, edge_cloud=Traffic(sent_bytes=1000)))
    assert cloud.value("peers", kind="client", state="connected") == 1
    assert cloud.value("peers", kind="edge", state="connected") == 1
    assert cloud.value("peer_changes_total", kind="client", change="joined") == 1
    # Once, though both events say it.
    assert cloud.value("link_bytes_total", hop="client_cloud", direction="down") == 1000
    assert 'hop="edge_cloud"' not in cloud.text


def test_a_peer_that_leaves_is_counted_where_it_is() -> None:
    edge = Process("edge", "edge-0")
    for name, change in (("client-0", "joined"), ("client-1", "joined"), ("client-1", "left")):
        edge.tell(PeerChanged(peer=name, change=change, detail=""))
    assert edge.value("peers", kind="client", state="connected") == 1
    assert edge.value("peers", kind="client", state="left") == 1
    assert edge.value("peer_changes_total", kind="client", change="joined") == 2


def everything(role: str, config: HealthConfig) -> Process:
    """A process that has seen all that can happen, names of clients in it."""
    process = Process(role, f"{role}-0", config)
    joined = PeerChanged(peer="client-0", change="joined", detail="client-9 took its place")
    full = dict.fromkeys(MetricValues.model_fields, 1.0)
    if role == "client":
        process.tell(TRAINED.model_copy(update=full))
        return process
    process.tell(Started(pid=1), joined, role="edge")
    process.tell(edge_round(**full), role="edge")
    if role == "cloud":
        process.tell(PeerChanged(peer="edge-0", change=SERVES, detail="client-0"))
        process.tell(interval(**full), PRUNED)
        process.tell(evaluated(
            5.0, kernel_distance=1.0, precision=1.0, recall=1.0, least_class_ratio=1.0,
            gpu_memory={"peak": 1},
        ))  # fmt: skip
    return process


@pytest.mark.parametrize("role", ALL)
def test_no_client_is_named_unless_a_setting_says_so(role: str) -> None:
    assert "client-" not in everything(role, ON).text
    named = everything(role, HealthConfig(metrics=True, client_names=True))
    if role == "client":
        assert named.value("info", role="client", node="client-0", version="0.1.0") == 1
    else:
        assert named.value("client_connected", client="client-0") == 1


def test_shares_of_classes_are_there_where_a_setting_says_so() -> None:
    assert "class_share" not in everything("edge", ON).text
    edge = everything("edge", HealthConfig(metrics=True, class_shares=True))
    assert edge.value("edge_class_share_ratio", of="clients", **{"class": "0"}) == 0.75
    assert edge.value("edge_class_share_ratio", of="target", **{"class": "1"}) == 0.5


def test_an_edge_that_is_left_out_has_no_weight() -> None:
    cloud = Process("cloud", "cloud")
    both = {"edge-0": 0.25, "edge-1": 0.75}
    scores = {"edge-0": 1.5, "edge-1": 1.75}
    cloud.tell(interval(edge_weights=both, edge_homogeneity=scores))
    cloud.tell(interval(edge_weights={"edge-1": 1.0}, edge_homogeneity={"edge-1": 1.75}))
    assert cloud.value("cloud_edge_weight_ratio", edge="edge-0") == 0
    assert cloud.value("cloud_edge_weight_ratio", edge="edge-1") == 1
    assert math.isnan(cloud.value("cloud_edge_homogeneity_score", edge="edge-0"))


def test_names_do_not_grow_without_end() -> None:
    config = HealthConfig(metrics=True, client_names=True)
    cloud = Process("cloud", "cloud", config)
    for number in range(2 * MOST_NAMES):
        edge = f"edge-{number}"
        cloud.tell(interval(edge_weights={edge: 1.0}, edge_homogeneity={edge: 1.5}))
        cloud.tell(PeerChanged(peer=edge, change=SERVES, detail="client-0"))
        joined = PeerChanged(peer=f"client-{number}", change="joined", detail="")
        cloud.tell(joined, role="edge")
    found = [labels for name, labels in parse(cloud.text) if name.endswith("edge_weight_ratio")]
    assert len(found) == MOST_NAMES + 1
    assert frozenset({("edge", "other")}) in found
    for name in ("client_connected", "cloud_edge_clients", "cloud_edge_homogeneity_score"):
        assert cloud.text.count(f"fedphd_{name}{{") == MOST_NAMES


def test_what_has_no_name_of_its_own_is_added_up_and_scores_are_not() -> None:
    many = MOST_NAMES + 50
    edge = Process("edge", "edge-0", HealthConfig(metrics=True, class_shares=True))
    target = [2 * number / many / (many - 1) for number in range(many)]
    edge.tell(edge_round(label_distribution=[1 / many] * many, target_distribution=target))
    assert edge.value("edge_class_share_ratio", of="clients", **{"class": "99"}) == 1 / many
    others = {"clients": 50 / many, "target": sum(target[MOST_NAMES:])}
    for of, share in others.items():
        found = edge.value("edge_class_share_ratio", of=of, **{"class": "other"})
        assert found == pytest.approx(share)
    cloud, names = Process("cloud", "cloud"), [f"edge-{number}" for number in range(many)]
    both = {"edge_weights": dict.fromkeys(names, 1 / many)}
    cloud.tell(interval(**both, edge_homogeneity=dict.fromkeys(names, 1.5)))
    assert cloud.value("cloud_edge_weight_ratio", edge="other") == pytest.approx(50 / many)
    for edges in (names[:120], names[:80]):
        weights = dict.fromkeys(edges, 1 / len(edges))
        cloud.tell(interval(edge_weights=weights, edge_homogeneity={}))
        share = max(0, len(edges) - MOST_NAMES) / len(edges)
        assert cloud.value("cloud_edge_weight_ratio", edge="other") == pytest.approx(share)
    scored = [of for name, of in parse(cloud.text) if name.endswith("edge_homogeneity_score")]
    assert len(scored) == MOST_NAMES
    assert frozenset({("edge", "other")}) not in scored


def test_every_series_has_a_value_and_every_value_its_series() -> None:
    config = HealthConfig(metrics=True, client_names=True, class_shares=True)
    seen: set[str] = set()
    for role in ALL:
        process = everything(role, config)
        names = process.names()
        own = {role, "flat cloud"} if role == "cloud" else {role}
        assert names <= {n for n, one in SERIES.items() if own & set(one.of)}, role
        assert all(kinds(process.text)[PREFIX + n] == SERIES[n].kind for n in names)
        for name, labels in parse(process.text):
            series = next(n for n in (name, name.rpartition("_")[0]) if n[7:] in SERIES)[7:]
            for label, value in labels - {pair for pair in labels if pair[0] == "le"}:
                allowed = SERIES[series].labels[label]
                assert not allowed or value in allowed, (name, label, value)
        seen |= names
    assert seen == SERIES.keys()


def test_the_manual_has_every_series_as_the_code_does() -> None:
    assert len(SERIES) >= 25
    manual = (ROOT / "docs/monitoring.md").read_text("utf-8")
    assert manual.endswith(f"\n\n{table()}"), f"the table must be:\n{table()}"


def test_names_are_as_prometheus_wants_them() -> None:
    for name, one in SERIES.items():
        assert (one.kind == "counter") == name.endswith("_total"), name
        if one.kind in ("histogram", "summary"):
            assert name.endswith("_seconds"), name
        assert "bytes" not in name or name.removesuffix("_total").endswith("_bytes"), name
        assert not any(f"_{unit}" in name for unit in ("ms", "mb", "percent", "minutes")), name


def test_who_asks_and_says_nothing_holds_up_nobody(tmp_path: Path) -> None:
    board = StatusBoard("client", "client-0")
    with serving(ON, board, tmp_path) as address:
        assert address is not None
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), timeout=10):
            for _ in range(100):
                board.event(TRAINED)
            assert "fedphd_client_steps_total 1200.0" in scrape(address)


def test_off_means_that_nothing_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from urllib.error import HTTPError\n"
        "from urllib.request import urlopen\n"
        "import fedphd.deploy.cli.main\n"
        "from fedphd.common.config.links import HealthConfig\n"
        "from fedphd.common.history.status import StatusBoard\n"
        "from fedphd.deploy.launch.health import serving\n"
        "for on in (False, True):\n"
        "    config = HealthConfig(metrics=on)\n"
        "    board = StatusBoard('edge', 'e')\n"
        "    with serving(config, board, pathlib.Path(sys.argv[1])) as address:\n"
        "        try:\n"
        "            code = urlopen(f'http://{address}/metrics').status\n"
        "        except HTTPError as error:\n"
        "            code = error.code\n"
        "    print(code, 'prometheus_client' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["404 False", "200 True"], done.stderr


def test_a_library_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fedphd.deploy.launch.metrics")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with (
        pytest.raises(ConfigError, match=r'health.metrics = true: .*fedphd\[monitoring\]"'),
        serving(ON, StatusBoard("edge", "e"), tmp_path),
    ):
        pass


def test_settings_that_need_another_say_so() -> None:
    with pytest.raises(ConfigError, match=r"health.metrics = true needs health.address"):
        load_config(EdgeConfig, overrides={"health.metrics": True, "health.address": None})
    with pytest.raises(ConfigError, match=r"client_names = true .* needs health.metrics = true"):
        load_config(ClientConfig, overrides={"health.client_names": True})
