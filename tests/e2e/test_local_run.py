"""``fedphd local`` as a user sees it: real processes, what they talk to, and what they leave."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from support.browser import check_page
from support.processes import Processes, command_of, connections
from support.tiny import CLASSES_PER_CLIENT, PRUNED_WIDTHS, TINY, WIDTHS, events, flags

from fedphd.common.unet.model import PrunedUNet

EDGES = ("edge-0", "edge-1")
CLIENTS = ("client-0", "client-1", "client-2")
INTERVALS, EDGE_ROUNDS = 3, int(TINY["schedule.edge_rounds"])


@dataclass(frozen=True)
class Sight:
    """The run's processes at one moment, by the name of the role that they belong to."""

    leaders: dict[str, int]
    members: dict[str, set[int]]
    ports: dict[str, set[int]]


@dataclass(frozen=True)
class Run:
    """A finished run: what was seen meanwhile, and what it left."""

    folder: Path
    early: Sight
    late: Sight
    exit_code: int
    output: str
    left: dict[int, list[str]]

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text("utf-8"))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in events(self.folder / "metrics.jsonl") if e["event"] == kind]

    def rounds(self, edge: str) -> list[dict[str, Any]]:
        return [e for e in self.events("round") if e["node"] == edge]

    def port(self, name: str) -> int:
        """Where a role of this run listens."""
        config = tomllib.loads((self.folder / "state" / f"{name}.toml").read_text("utf-8"))
        return int(config["superlink"]["address"].rpartition(":")[2])


def look(processes: Processes) -> Sight:
    leaders, members, ports = {}, {}, {}
    for leader, pids in processes.groups().items():
        words = command_of(leader)
        files = [Path(words[i + 1]).stem for i, word in enumerate(words) if word == "--config"]
        name = files[0] if files else "local"
        leaders[name], members[name] = leader, pids
        ports[name] = set().union(*(connections(pid) for pid in pids))
    return Sight(leaders, members, ports)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("local")
    with Processes(folder) as processes:
        program = processes.start(
            "local", "--edges", "2", "--clients", "3",
            "--classes-per-client", str(CLASSES_PER_CLIENT), "--run-dir", "run",
            *flags({**TINY, "schedule.intervals": INTERVALS}),
        )  # fmt: skip
        program.wait_line(r"^edge-\d +interval +1 round 1")
        early = look(processes)
        program.wait_line(rf"^edge-\d +interval +{INTERVALS} round 1")
        late = look(processes)
        code = program.wait_exit()
        yield Run(folder / "run", early, late, code, program.text, processes.commands())


def test_it_succeeds_and_leaves_no_process(run: Run) -> None:
    assert run.exit_code == 0, run.output
    assert run.left == {}
    assert run.json("verdict.json")["exit_code"] == 0
    assert f"finished; everything is in {run.folder.name}" in run.output


def test_every_role_is_a_process_group_of_its_own(run: Run) -> None:
    assert set(run.early.leaders) == {"local", "cloud", *EDGES, *CLIENTS}
    assert len(set(run.early.leaders.values())) == 7


def test_each_client_is_one_process_from_start_to_end(run: Run) -> None:
    for client in CLIENTS:
        assert run.early.members[client] == {run.early.leaders[client]}
        assert run.late.members[client] == run.early.members[client]


def test_the_servers_stay_the_same_processes(run: Run) -> None:
    for name in ("cloud", *EDGES):
        # The launcher, Flower's SuperLink and executor, the ServerApp.
        assert len(run.early.members[name]) >= 3
        assert run.late.members[name] == run.early.members[name]


def test_clients_talk_to_edges_and_edges_to_the_cloud(run: Run) -> None:
    cloud, edges = run.port("cloud"), {run.port(edge) for edge in EDGES}
    assert len({cloud, *edges}) == 3
    for sight in (run.early, run.late):
        for client in CLIENTS:
            assert sight.ports[client] == edges
        for edge in EDGES:
            assert cloud in sight.ports[edge]


def test_every_edge_round_and_interval_is_recorded(run: Run) -> None:
    intervals = run.events("interval")
    assert [event["interval"] for event in intervals] == [1, 2, 3]
    expected = [(i, r) for i in range(1, INTERVALS + 1) for r in range(1, EDGE_ROUNDS + 1)]
    for edge in EDGES:
        assert [(e["interval"], e["edge_round"]) for e in run.rounds(edge)] == expected
    # In each round each client trains at exactly one edge.
    for first, second in zip(*map(run.rounds, EDGES), strict=True):
        assert sorted(first["clients"] + second["clients"]) == list(CLIENTS)
    for event in intervals:
        assert sum(event["edge_weights"].values()) == pytest.approx(1)
        assert event["clients"] == list(CLIENTS)
        assert event["failures"] == []


def test_events_are_in_the_order_of_time(run: Run) -> None:
    times = [event["time"] for event in events(run.folder / "metrics.jsonl")]
    assert times == sorted(times)
    kinds = [(e["role"], e["event"]) for e in events(run.folder / "metrics.jsonl")]
    assert kinds.index(("edge", "round")) < kinds.index(("cloud", "interval"))


def test_it_learns(run: Run) -> None:
    losses = [event["loss"] for event in run.events("interval")]
    assert losses[-1] < 0.9 * losses[0]


def test_it_is_pruned_once_after_the_sparse_phase(run: Run) -> None:
    (pruned,) = run.events("pruned")
    assert pruned["interval"] == 1
    assert pruned["widths_before"] == WIDTHS
    assert pruned["widths_after"] == PRUNED_WIDTHS
    # Everybody ships the smaller network from then on.
    sizes = [e["edge_cloud_bytes"] for e in run.events("interval")]
    assert sizes[2] - sizes[1] < 0.4 * sizes[0]


@pytest.mark.parametrize("part", ["unet", "unet_ema"])
def test_the_checkpoint_holds_the_pruned_network(run: Run, part: str) -> None:
    folder = run.folder / "checkpoint"
    unet = PrunedUNet.from_pretrained(folder, subfolder=part)
    assert list(unet.config["block_out_channels"]) == PRUNED_WIDTHS
    assert unet.num_parameters() == run.json("summary.json")["parameters"]["after"]
    stored = load_file(folder / part / "diffusion_pytorch_model.safetensors")
    assert stored["conv_in.weight"].shape == (PRUNED_WIDTHS[0], 1, 3, 3)
    assert stored["conv_out.weight"].shape == (1, PRUNED_WIDTHS[0], 3, 3)
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


def test_diffusers_samples_from_the_checkpoint(run: Run) -> None:
    folder = run.folder / "checkpoint"
    unet = PrunedUNet.from_pretrained(folder, subfolder="unet_ema")
    pipeline = DDIMPipeline.from_pretrained(folder, unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=2, generator=noise, output_type="np").images
    assert images.shape == (2, 8, 8, 1)


def test_the_summary_says_what_it_cost_and_gave(run: Run) -> None:
    summary = run.json("summary.json")
    assert summary["frechet_distance"] > 0
    assert summary["evaluation"]["features"] == "classifier(digits)"
    for cost in ("parameters", "macs"):
        assert 0 < summary[cost]["after"] < 0.35 * summary[cost]["before"]
    assert summary["client_rounds"] == len(CLIENTS) * INTERVALS * EDGE_ROUNDS
    dense_bytes = 4 * summary["parameters"]["before"]
    moved = summary["bytes"]
    assert moved["flat_fedavg_client_cloud"] == 2 * summary["client_rounds"] * dense_bytes
    assert moved["client_edge"] > moved["edge_cloud"] > 0
    assert moved["cloud_saving"] == pytest.approx(
        1 - moved["edge_cloud"] / moved["flat_fedavg_client_cloud"]
    )
    phases = summary["seconds"]
    assert {"waiting_for_participants", "sparse_training", "training"} < set(phases)
    assert "waiting_for_evaluation" in phases
    assert sum(phases.values()) - phases["total"] <= phases["total"]


def test_our_bytes_are_those_that_flower_counted(run: Run) -> None:
    moved = run.json("summary.json")["bytes"]
    cloud = run.json("flower_traffic.json")
    edges = [run.json(f"state/{edge}/flower_traffic.json") for edge in EDGES]
    counted = sum(cloud.values()), sum(sum(edge.values()) for edge in edges)
    # Flower counts the envelopes, the greetings and the farewells as well.
    assert moved["edge_cloud"] == pytest.approx(counted[0], rel=0.02)
    assert moved["client_edge"] == pytest.approx(counted[1], rel=0.02)


def test_it_leaves_a_page(driver: Chrome, run: Run) -> None:
    check_page(driver, run.folder / "report.html")
    assert "Finished" in driver.find_element(By.TAG_NAME, "h1").text
    # Three clients at two edges, three intervals of two edge rounds.
    heat = driver.find_element(By.CSS_SELECTOR, "#places figure svg").get_attribute("aria-label")
    assert "3 clients trained in edge rounds 1 to 6" in str(heat)
    # Before training, the first grid, and the evaluation at the end.
    assert len(driver.find_elements(By.CSS_SELECTOR, "#samples .strip li")) == 3
    assert "conv_in" in str(driver.find_element(By.ID, "pruning").get_attribute("textContent"))
