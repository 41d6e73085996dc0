"""Edges inside the cloud's process, and the identity that ties the method to flat FedAvg."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from support.clients import NUM_CLIENTS, StateOf, clients, runtime
from support.federation import FIRST_CLIENT, TINY, run_simulated
from support.memory import Handler, MemoryGrid
from support.training import train_task

from fedphd.client.flat_unet import FlatUNet
from fedphd.client.precision import Arithmetic
from fedphd.client.steps import validation_loss
from fedphd.client.stores import ContextStore
from fedphd.client.trainer import ClientImages, Trainer
from fedphd.common.config.roles import CloudConfig
from fedphd.common.data.images import LabelledImages
from fedphd.common.history.progress import Progress
from fedphd.common.rng import generator, sample_participants
from fedphd.common.stores import FileStore
from fedphd.common.unet.checkpoint import load_checkpoint
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import build_scheduler, build_unet, unet_config
from fedphd.common.unet.parts import PartSubset
from fedphd.common.wire.messages import TRAIN, TrainTask
from fedphd.common.wire.offers import CHOOSE, Choose
from fedphd.common.wire.records import read_payload, read_variate
from fedphd.server.app import stored_state

IDENTITY: dict[str, Any] = {
    "reproducible": True,
    "schedule.edge_rounds": 1,
    "schedule.intervals": 2,
    "schedule.min_clients": NUM_CLIENTS,
    "training.local_amount": 1,
    "selection.factor": 0.0,
    "aggregation.factor": 0.0,
    "pruning.mode": "none",
}


def in_files(folder: Path) -> StateOf:
    """A file for each client."""
    return lambda context: FileStore(folder / f"{context.node_id}.kept")


def kept(folder: Path) -> list[Path]:
    """The clients' files, without those of before the last interval."""
    return sorted(path for path in folder.glob("*.kept") if ".former" not in path.suffixes)


def run(grid: MemoryGrid, folder: Path, overrides: dict[str, Any]) -> CloudConfig:
    return run_simulated(grid, folder, {**TINY, **overrides})


def final_weights(folder: Path) -> torch.Tensor:
    state = load_checkpoint(folder / "checkpoint")[0].state_dict()
    return TensorLayout.of(state).pack(state)


def federated_averaging(config: CloudConfig) -> torch.Tensor:
    """FedAvg (arXiv:1602.05629) written out: train everybody, average by numbers of images."""
    runtimes = {f"client-{number}": runtime(number) for number in range(NUM_CLIENTS)}
    trainers = {name: Trainer(client_id=name, device="cpu") for name in runtimes}
    unet = build_unet(config.model, seed=config.seed)
    weights = TensorLayout.of(unet.state_dict()).pack(unet.state_dict())
    for interval in range(1, config.schedule.intervals + 1):
        order = sample_participants(
            runtimes, fraction=1.0, seed=config.seed, interval=interval, edge_round=1
        )
        total, count = torch.zeros_like(weights), 0
        for name in order:
            data = LabelledImages(runtimes[name].config.data)
            images = data.split(image_size=8, channels=1)[0]
            task = train_task(
                config.model, seed=config.seed, interval=interval,
                training=config.federation().local_training, diffusion=config.diffusion,
            )  # fmt: skip
            result = trainers[name].train(task, weights, ClientImages(images))
            total.add_(result.weights, alpha=float(len(images)))
            count += len(images)
        weights = total / count
    return weights


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_one_edge_with_one_round_is_flat_fedavg_to_the_bit(tmp_path: Path) -> None:
    hierarchical = {**IDENTITY, "schedule.num_edges": 1}
    config = run(clients(), tmp_path / "edge", hierarchical)
    run(clients(), tmp_path / "flat", {**IDENTITY, "topology": "flat"})
    expected = federated_averaging(config)
    assert torch.equal(final_weights(tmp_path / "edge"), expected)
    assert torch.equal(final_weights(tmp_path / "flat"), expected)


def test_client_state_survives_between_messages(tmp_path: Path) -> None:
    """Kept in the process, in Flower's context or in files, pruned or not: the same bits."""
    overrides = {
        **IDENTITY,
        "schedule.num_edges": 2,
        "schedule.intervals": 3,
        "pruning.mode": "scheduled",
        "pruning.sparse_rounds": 1,
    }
    places: dict[str, StateOf] = {
        "process": lambda context: None,
        "context": lambda context: ContextStore(context.state),
        "files": in_files(tmp_path),
    }
    for place, state_of in places.items():
        run(clients(state_of), tmp_path / place, overrides)
    weights = [final_weights(tmp_path / place) for place in places]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert len(kept(tmp_path)) == NUM_CLIENTS


@pytest.mark.parametrize("topology", ["flat", "hierarchical"])
def test_clients_validate_the_clouds_weights(topology: str, tmp_path: Path) -> None:
    """What an interval tells is the loss of the weights that the one before came to."""
    overrides = {**IDENTITY, "topology": topology, "schedule.num_edges": 2}
    fractions = {"validation_fraction": 0.25}
    before = {**overrides, "schedule.intervals": 1}
    config = run(clients(**fractions), tmp_path / "one", before)
    run(clients(**fractions), tmp_path / "two", overrides)
    _, second = events(tmp_path / "two", "interval")
    total, count = 0.0, 0
    for number in range(NUM_CLIENTS):
        data = LabelledImages(runtime(number, **fractions).config.data)
        images, held_out = data.split(image_size=8, channels=1)
        assert held_out is not None
        network = FlatUNet(unet_config(build_unet(config.model, seed=0)), torch.device("cpu"))
        network.load(final_weights(tmp_path / "one"))
        rng = generator("validate", config.seed, f"client-{number}")
        scheduler = build_scheduler(config.diffusion)
        plain = Arithmetic(torch.device("cpu"), bf16=False)
        loss = validation_loss(network, held_out, scheduler, rng, plain, batch_size=32)
        total, count = total + loss * len(images), count + len(images)
    assert second["validation_loss"] == pytest.approx(total / count, rel=1e-6)


def test_virtual_edges_ask_a_client_once_with_all_offers(tmp_path: Path) -> None:
    grid = clients()
    run(grid, tmp_path, {**IDENTITY, "schedule.num_edges": 2})
    asked = [read_payload(m, Choose) for m in grid.pushed if m.metadata.message_type == CHOOSE]
    assert len(asked) == 2 * NUM_CLIENTS
    assert all([o.edge_id for o in choose.offers] == ["edge-0", "edge-1"] for choose in asked)
    trained: list[Message] = [m for m in grid.pushed if m.metadata.message_type == TRAIN]
    assert len(trained) == 2 * NUM_CLIENTS


def test_flat_topology_counts_the_clients_on_the_clouds_links(tmp_path: Path) -> None:
    run(clients(), tmp_path, {**IDENTITY, "topology": "flat"})
    moved = json.loads((tmp_path / "summary.json").read_text())["bytes"]
    assert moved["client_edge"] == 0
    # Weights both ways per client and round; greetings, questions and manifests on top.
    assert 1.0 < moved["edge_cloud"] / moved["flat_fedavg_client_cloud"] < 1.3


class HoldingBack(MemoryGrid):
    """Hands out one client's trained weights only after a look that could find all the others'."""

    def __init__(self, nodes: dict[int, Handler], held_back: int) -> None:
        super().__init__(nodes, threaded=True)
        self._held_back = held_back
        self._held: list[tuple[Message, Message]] = []
        self._num_others = 0

    def deliver(self, message: Message, reply: Message) -> None:
        """Keep the held back client's, count the others'."""
        if message.metadata.message_type != TRAIN:
            super().deliver(message, reply)
        elif message.metadata.dst_node_id == self._held_back:
            self._held.append((message, reply))
        else:
            super().deliver(message, reply)
            self._num_others += 1

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Look, then let go of what is held if this look could find all the others'."""
        others_there = self._num_others == len(self.nodes) - 1
        found = super().pull_messages(message_ids)
        while others_there and self._held:
            super().deliver(*self._held.pop())
        return found


def test_replies_in_another_order_change_only_the_rounding(tmp_path: Path) -> None:
    overrides = {
        **IDENTITY, "topology": "flat", "schedule.intervals": 1, "training.precision": "fp32",
    }  # fmt: skip
    first = sample_participants(
        [f"client-{n}" for n in range(NUM_CLIENTS)],
        fraction=1.0, seed=0, interval=1, edge_round=1,
    )[0]  # fmt: skip
    found = {}
    for reproducible in (True, False):
        held_back = FIRST_CLIENT + int(first.removeprefix("client-"))
        grid = HoldingBack(clients().nodes, held_back)
        folder = tmp_path / str(reproducible)
        run(grid, folder, {**overrides, "reproducible": reproducible})
        found[reproducible] = final_weights(folder)
        said = [event["text"] for event in events(folder, "message")]
        assert [text.partition(":")[0] for text in said] == [
            f"reproducible = {str(reproducible).lower()}"
        ]
    difference = found[True] - found[False]
    assert 0 < float(difference.norm()) < 1e-5 * float(found[True].norm())


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


TOPOLOGIES: dict[str, dict[str, Any]] = {
    "flat": {"topology": "flat"},
    "hierarchical": {"schedule.num_edges": 2, "schedule.edge_rounds": 2},
}
METHODS: dict[str, dict[str, Any]] = {
    "fedprox": {"objective.method": "fedprox", "objective.proximal_mu": 0.1},
    "moon": {"objective.method": "moon"},
    "scaffold": {"objective.method": "scaffold"},
    "usplit": {"exchange.parts": "usplit"},
    "ulatdec": {"exchange.parts": "ulatdec"},
    "udec": {"exchange.parts": "udec"},
}
KEPT = {"moon": "own weights", "scaffold": "control variate"}
KEPT |= dict.fromkeys(("ulatdec", "udec"), "own weights")


def pruned_in_the_middle(topology: str, **more: Any) -> dict[str, Any]:
    """Three intervals, of which the first is sparse."""
    chosen = {**IDENTITY, **TOPOLOGIES[topology], "schedule.intervals": 3}
    sparse = chosen["schedule.edge_rounds"]
    return {
        **chosen,
        "pruning.mode": "scheduled",
        "pruning.sparse_rounds": sparse,
        "pruning.sparsity_lambda": 0.0,
        "training.local_unit": "steps",
        "training.local_amount": 2,
        **more,
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_survives_pruning(
    method: str, topology: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    overrides = pruned_in_the_middle(topology, **METHODS[method])
    run(clients(in_files(tmp_path)), tmp_path / "run", overrides)
    assert [event["failures"] for event in events(tmp_path / "run", "interval")] == [[]] * 3
    assert [event["interval"] for event in events(tmp_path / "run", "pruned")] == [1]
    for kind in filter(None, ("optimiser moments", KEPT.get(method))):
        assert caplog.text.count(f"weights; {kind} cut") == NUM_CLIENTS
    assert " reset (" not in caplog.text
    if topology == "hierarchical" and method in KEPT:
        # The same bits where the state stays in the process.
        run(clients(), tmp_path / "process", overrides)
        assert torch.equal(final_weights(tmp_path / "process"), final_weights(tmp_path / "run"))


def test_server_variate_is_the_mean_of_the_clients(tmp_path: Path) -> None:
    """Each client's change reaches the cloud once, whichever edge it came through."""
    overrides = pruned_in_the_middle("hierarchical", **METHODS["scaffold"])
    run(clients(in_files(tmp_path)), tmp_path / "two", {**overrides, "schedule.intervals": 2})
    progress = Progress.read(tmp_path / "two" / "checkpoint")
    stored = stored_state(tmp_path / "two" / "checkpoint", progress)
    assert stored.num_clients == NUM_CLIENTS, "whoever goes on knows of how many it is the mean"
    own = [load_file(path)["variate"] for path in kept(tmp_path)]
    assert len(own) == NUM_CLIENTS
    grid = clients()
    run(grid, tmp_path / "three", overrides)
    trainings = [message for message in grid.pushed if message.metadata.message_type == TRAIN]
    third = [m for m in trainings if read_payload(m, TrainTask).interval == 3]
    server = read_variate(third[0])
    assert float(server.abs().max()) > 1e-3
    torch.testing.assert_close(server, sum(own, torch.zeros(len(server))) / NUM_CLIENTS)


def moved_bytes(folder: Path, overrides: dict[str, Any]) -> dict[str, int]:
    """Bytes over each link in one round of everybody through two edges."""
    one = {**IDENTITY, "schedule.num_edges": 2, "schedule.intervals": 1}
    run(clients(), folder, {**one, **overrides})
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["client_rounds"] == NUM_CLIENTS
    return {link: summary["bytes"][link] for link in ("client_edge", "edge_cloud")}


def test_scaffold_moves_twice_the_weights_and_udec_only_the_decoder(tmp_path: Path) -> None:
    plain = moved_bytes(tmp_path / "plain", {})
    double = moved_bytes(tmp_path / "scaffold", METHODS["scaffold"])
    less = moved_bytes(tmp_path / "udec", METHODS["udec"])
    unet = load_checkpoint(tmp_path / "plain" / "checkpoint")[0]
    layout = TensorLayout.of(unet.state_dict())
    rest = layout.numel - PartSubset(layout, ("decoder",)).chosen.numel
    assert 0.3 < rest / layout.numel < 0.7
    for link, models in (("client_edge", 2 * NUM_CLIENTS), ("edge_cloud", 2 * 2)):
        assert 0 < double[link] - plain[link] - models * 4 * layout.numel < models * 1000
        # The manifest of names and shapes, some 10 kB, gets shorter too.
        assert 0 < plain[link] - less[link] - models * 4 * rest < models * 10_000


def test_a_simulated_client_may_take_long_for_its_first_answer(tmp_path: Path) -> None:
    def waking_up(handler: Handler) -> Handler:
        slept: list[bool] = []

        def handle(message: Message) -> Message:
            if not slept:
                slept.append(True)
                # Ray imports everything before a client's first answer.
                time.sleep(1.0)
            return handler(message)

        return handle

    grid = clients()
    nodes = {node_id: waking_up(answer) for node_id, answer in grid.nodes.items()}
    short = {**IDENTITY, "waits.query_s": 0.5, "waits.offer_s": 0.4, "schedule.intervals": 1}
    run(MemoryGrid(nodes, threaded=True), tmp_path, short)
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    changes = [(e["peer"], e["change"]) for e in events if e["event"] == "peer"]
    assert "refused" not in [change for _, change in changes]
    assert ("client-0", "joined") in changes
