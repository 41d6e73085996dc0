"""Whole runs in one process: they learn, shrink, survive a lost edge, and repeat to the bit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from flwr.app import Message
from support.federation import FIRST_EDGE, Federation
from support.memory import MemoryGrid

from fedphd.common.errors import ConfigError, ParticipantsError
from fedphd.common.events import Verdict
from fedphd.common.quality.evaluation import Evaluation, Evaluator
from fedphd.common.unet.model import PrunedUNet
from fedphd.common.wire.messages import FINISH, TRAIN, IntervalReply, IntervalTask
from fedphd.common.wire.records import read_payload
from fedphd.common.wire.traffic import Traffic
from fedphd.deploy.launch.runs import Resumed
from fedphd.server.report import Report

STORED = Path(__file__).with_name("losses.json")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Four intervals of two edge rounds, pruned after the second interval."""
    federation = Federation(
        tmp_path_factory.mktemp("learned"),
        {
            "schedule.intervals": 4,
            "schedule.edge_rounds": 2,
            "pruning.mode": "scheduled",
            "pruning.sparse_rounds": 4,
            "evaluation.reference": {"source": "digits"},
            "evaluation.classifier_epochs": 1,
            "evaluation.every_intervals": 2,
        },
    )
    assert federation.run().exit_code == 0
    return federation


def test_loss_falls(learned: Federation) -> None:
    losses = [event["loss"] for event in learned.events("interval")]
    assert len(losses) == 4
    assert losses[1] < 0.9 * losses[0]
    assert losses[3] < losses[2], "goes on after pruning"


def test_every_client_trains_in_every_round_at_one_edge(learned: Federation) -> None:
    assert len(learned.client_tasks()) == 4 * 2 * 4
    for event in learned.events("interval"):
        assert event["clients"] == ["client-0", "client-1", "client-2", "client-3"]
        assert event["client_rounds"] == 8
        assert event["failures"] == []
        for edge_round in range(2):
            at = [edge["trained"][edge_round] for edge in event["edges"].values()]
            assert sorted(name for trained in at for name in trained) == event["clients"]
        assert [edge["left_out"] for edge in event["edges"].values()] == [[[], []]] * 2
        for edge in event["edges"].values():
            assert sum(edge["label_distribution"]) == pytest.approx(1.0, abs=1e-3)
        assert sum(event["edge_weights"].values()) == pytest.approx(1.0)


def test_network_shrinks_everywhere(learned: Federation) -> None:
    [pruned] = learned.events("pruned")
    assert pruned["interval"] == 2
    for task in (*learned.edge_tasks(), *learned.client_tasks()):
        widths = [8, 16] if task.interval <= 2 else [4, 8]
        assert task.network.unet["block_out_channels"] == widths
        assert task.network.unet["time_feature_width"] == 8
    sparse = {(task.interval, task.sparsity_lambda > 0) for task in learned.client_tasks()}
    assert sparse == {(1, True), (2, True), (3, False), (4, False)}
    parameters = [event["parameters"] for event in learned.events("interval")]
    assert parameters[0] == parameters[1] > 2 * parameters[2] == 2 * parameters[3]


def test_moments_are_cut_along_with_the_network(learned: Federation) -> None:
    cuts = {(task.interval, task.cut is not None) for task in learned.client_tasks()}
    assert cuts == {(1, False), (2, False), (3, True), (4, True)}


def test_checkpoint_opens_as_a_pruned_network_and_as_a_pipeline(learned: Federation) -> None:
    folder = learned.run_dir / "checkpoint"
    raw = PrunedUNet.from_pretrained(folder, subfolder="unet")
    averaged = PrunedUNet.from_pretrained(folder, subfolder="unet_ema")
    for unet in (raw, averaged):
        assert list(unet.config["block_out_channels"]) == [4, 8]
    assert any(
        not torch.equal(a, b) for a, b in zip(raw.parameters(), averaged.parameters(), strict=True)
    )
    pipeline = DDIMPipeline.from_pretrained(folder, unet=averaged)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images  # fmt: skip
    assert images.shape == (2, 8, 8, 1)
    state = json.loads((folder / "state.json").read_text())
    assert (state["interval"], state["config"]["num_classes"]) == (4, 10)


def test_run_folder_is_complete(learned: Federation) -> None:
    summary = learned.summary()
    assert summary["parameters"]["after"] < summary["parameters"]["before"] / 2
    assert summary["macs"]["after"] < summary["macs"]["before"]
    assert summary["pruning"]["widths_after"] == [4, 8]
    assert summary["client_rounds"] == 32
    assert summary["seconds"].keys() == {
        "waiting_for_participants", "sparse_training", "training", "waiting_for_evaluation",
        "total",
    }  # fmt: skip
    evaluations = summary["evaluations"]
    assert [e["interval"] for e in evaluations] == [0, 2, 4]
    assert {e["features"] for e in evaluations} == {"classifier(digits)"}
    assert summary["frechet_distance"] == evaluations[-1]["frechet_distance"] > 0
    assert [e["interval"] for e in learned.events("evaluated")] == [0, 2, 4]
    joined = [e["peer"] for e in learned.events("peer") if e["change"] == "joined"]
    assert sorted(joined) == ["edge-0", "edge-1"], "whoever answers first joins first"
    for name in ("samples.png", *(f"grids/interval-{n:04d}.png" for n in (0, 1, 2, 4))):
        assert (learned.run_dir / name).stat().st_size > 0
    # Evaluated are intervals 2 and 4; somebody who looks on sees samples before.
    (first,) = learned.events("drawn")
    assert (first["interval"], first["path"]) == (1, str(learned.run_dir / "samples.png"))
    images = [learned.run_dir / "grids" / f"interval-{n:04d}.png" for n in (0, 1, 2)]
    assert len({image.read_bytes() for image in images}) == 3


def test_bytes_on_the_links(learned: Federation) -> None:
    last, bytes_ = learned.events("interval")[-1], learned.summary()["bytes"]
    counted = sum((edge.grid.traffic for edge in learned.edges), Traffic()).total_bytes
    assert bytes_["client_edge"] == last["client_edge_bytes"]
    # What clients and edges say outside of intervals (hello, finish) is a few kB.
    assert bytes_["client_edge"] < counted < bytes_["client_edge"] + 50_000
    sizes = {t.interval: t.network.tensor_layout().numel for t in learned.edge_tasks()}
    # Two edges, there and back; beside its weights a message has some 10 kB.
    weights = sum(4 * numel * 2 * 2 for numel in sizes.values())
    assert weights < bytes_["edge_cloud"] < weights + 4 * 2 * 2 * 20_000
    client_weights = sum(2 * 4 * sizes[task.interval] for task in learned.client_tasks())
    assert client_weights < bytes_["client_edge"] < client_weights + 32 * 40_000
    flat = 2 * 32 * 4 * learned.summary()["parameters"]["before"]
    assert bytes_["flat_fedavg_client_cloud"] == flat
    assert bytes_["cloud_saving"] == pytest.approx(1 - bytes_["edge_cloud"] / flat)


def test_edges_and_clients_hear_the_end(learned: Federation) -> None:
    assert [edge.verdict.exit_code for edge in learned.edges] == [0, 0]
    for client in learned.clients:
        assert client.verdict is not None
        assert client.verdict.message.startswith("finished after 4 intervals, Frechet distance")
    told = [m for m in learned.cloud_grid.pushed if m.metadata.message_type == FINISH]
    assert len(told) == 2


class Forgetful:
    """An edge that takes the second interval's task and is never heard of again in it.

    ``clock`` then jumps beyond any wait, but not before the other edge's reply was taken.
    """

    def __init__(self, grid: MemoryGrid, node_id: int) -> None:
        self._handler = grid.nodes[node_id]
        self._pull = grid.pull_messages
        self._ahead_s = 0.0
        grid.nodes[node_id] = self
        grid.pull_messages = self.pull_messages  # type: ignore[method-assign]

    def __call__(self, message: Message) -> Message | None:
        if message.metadata.message_type == TRAIN:
            task = read_payload(message, IntervalTask)
            if task.interval == 2:
                return None
        return self._handler(message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there."""
        found = list(self._pull(message_ids))
        trained = [reply for reply in found if reply.metadata.message_type == TRAIN]
        if any(read_payload(reply, IntervalReply).interval == 2 for reply in trained):
            self._ahead_s = 10_000.0
        return found

    def clock(self) -> float:
        """Monotonic seconds."""
        return time.monotonic() + self._ahead_s


def test_edge_that_stops_answering_is_left_out_of_its_interval(tmp_path: Path) -> None:
    settings = {"schedule.intervals": 3, "waits.offer_s": 0.1, "waits.retry_s": 1e-3}
    federation = Federation(tmp_path, settings)
    forgetful = Forgetful(federation.cloud_grid, FIRST_EDGE + 1)
    assert federation.run(clock=forgetful.clock).exit_code == 0
    first, second, third = federation.events("interval")
    assert first["failures"] == third["failures"] == []
    assert set(first["edge_weights"]) == set(third["edge_weights"]) == {"edge-0", "edge-1"}
    late = "no reply within 7200 s"
    assert second["failures"] == [f"edge-1: {late}"]
    assert second["edge_weights"] == {"edge-0": 1.0}
    assert second["clients"] == [f"client-{n}" for n in range(4)]
    failed = [e for e in federation.events("peer") if e["change"] == "failed"]
    assert [(e["peer"], e["detail"]) for e in failed] == [("edge-1", late)]


def test_client_that_fails_is_left_out(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"schedule.intervals": 1})
    for grid in federation.edge_grids:
        node_id = max(grid.nodes)
        answer = grid.nodes[node_id]

        def fails(message: Message, answer: Any = answer) -> Message | None:
            if message.metadata.message_type == TRAIN:
                raise MemoryError("no memory left")
            return answer(message)

        grid.nodes[node_id] = fails
    federation.run()
    [interval] = federation.events("interval")
    assert interval["clients"] == ["client-0", "client-1", "client-2"]
    [failure] = interval["failures"]
    assert failure.startswith("client-3: ")
    assert failure.endswith("MemoryError: no memory left")


def test_one_shot_trains_the_small_network_from_the_start(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"pruning.mode": "one_shot"})
    federation.run()
    assert [event["interval"] for event in federation.events("pruned")] == [0]
    for task in federation.client_tasks():
        assert task.network.unet["block_out_channels"] == [4, 8]
        assert task.sparsity_lambda == 0
    assert federation.summary()["pruning"]["widths_before"] == [8, 16]


def test_without_pruning_the_network_stays(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"pruning.mode": "none"})
    federation.run()
    assert federation.events("pruned") == []
    assert {t.interval for t in federation.client_tasks()} == {1, 2}
    for task in federation.client_tasks():
        assert task.network.unet["block_out_channels"] == [8, 16]
        assert (task.sparsity_lambda, task.cut) == (0, None)
    summary = federation.summary()
    assert summary["pruning"] is None
    assert summary["parameters"]["after"] == summary["parameters"]["before"]
    assert summary["frechet_distance"] is None


def test_nobody_waits_for_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one goes on only once the interval after it is under way; figures name their own."""
    federation = Federation(
        tmp_path,
        {
            "schedule.intervals": 2, "schedule.edge_rounds": 1, "pruning.mode": "none",
            "evaluation.every_intervals": 1,
        },
    )  # fmt: skip
    evaluate, waited = Evaluator.evaluate, []

    def held_up(*arguments: Any) -> Evaluation:
        done = len(waited)
        deadline_s = time.monotonic() + 60
        while done < 2 and done + 1 not in {task.interval for task in federation.edge_tasks()}:
            assert time.monotonic() < deadline_s, "the next interval has not begun"
            time.sleep(0.01)
        waited.append(done)
        return evaluate(*arguments)

    monkeypatch.setattr(Evaluator, "evaluate", held_up)
    assert federation.run().exit_code == 0
    assert [e["interval"] for e in federation.events("evaluated")] == [0, 1, 2]
    # What is opened later gives what was measured then.
    state = json.loads((federation.run_dir / "checkpoint" / "state.json").read_text())
    assert [e["interval"] for e in state["reported"]["evaluations"]] == [0, 1, 2]


def test_too_few_participants_end_the_run_and_everybody_hears_why(tmp_path: Path) -> None:
    settings = {"schedule.min_clients": 5, "waits.start_s": 0.1, "waits.retry_s": 0.1}
    federation = Federation(tmp_path, settings, num_clients=2)
    with pytest.raises(
        ParticipantsError,
        match=r"2 of 2 edges \(edge-0, edge-1\) and 2 of 5 clients \(client-0, client-1\)",
    ):
        federation.run()
    for participant in (*federation.edges, *federation.clients):
        assert participant.verdict is not None
        assert participant.verdict.exit_code == ParticipantsError.exit_code


def test_whatever_ends_the_cloud_everybody_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise MemoryError("/secret/place")

    federation = Federation(tmp_path, {})
    monkeypatch.setattr(Report, "interval", fail)
    with pytest.raises(MemoryError, match="/secret/place"):
        federation.run()
    for participant in (*federation.edges, *federation.clients):
        assert participant.verdict == Verdict(
            1, "the cloud ended the run: MemoryError: its own log says more"
        )


def repeatable(folder: Path) -> dict[str, Any]:
    """The figures of a tiny run that must not depend on timing."""
    federation = Federation(
        folder,
        {
            "reproducible": True,
            "schedule.intervals": 3,
            "schedule.edge_rounds": 2,
            "pruning.mode": "scheduled",
            "pruning.sparse_rounds": 2,
            "waits.offer_s": 60.0,
            "waits.query_s": 120.0,
        },
    )
    federation.run()
    names = ("loss", "mean_steps", "num_samples", "edge_weights", "edge_homogeneity")
    state = PrunedUNet.from_pretrained(federation.run_dir / "checkpoint", subfolder="unet_ema")
    total = sum(parameter.double().abs().sum().item() for parameter in state.parameters())
    return {
        "intervals": [{name: e[name] for name in names} for e in federation.events("interval")],
        "ema_1_norm": total,
    }


def close(got: Any, wanted: Any) -> Iterator[str]:
    """Where two runs' figures differ by more than 1e-4 of themselves."""
    if isinstance(wanted, dict):
        for key in wanted.keys() | got.keys():
            yield from (f"{key}: {text}" for text in close(got.get(key), wanted.get(key)))
    elif isinstance(wanted, list):
        for number, pair in enumerate(zip(got, wanted, strict=True)):
            yield from (f"{number}: {text}" for text in close(*pair))
    elif got != pytest.approx(wanted, rel=1e-4):
        yield f"{got}, stored {wanted}"


def test_run_repeats_to_the_bit_and_equals_the_stored_one(tmp_path: Path) -> None:
    first, second = repeatable(tmp_path / "first"), repeatable(tmp_path / "second")
    assert first == second
    # Sums round differently with a processor's widest vector instructions, so other machines
    # agree with the stored figures only this far.
    assert list(close(first, json.loads(STORED.read_text()))) == []


def test_a_cloud_that_goes_on_waits_as_long_as_an_interval_may_take(tmp_path: Path) -> None:
    """Edges that were at work when it ended are back only when they are done."""
    first = Federation(tmp_path, {"schedule.intervals": 1})
    assert first.run().exit_code == 0
    # However long its interval was, it counts as half a second.
    state = first.run_dir / "checkpoint" / "state.json"
    content = json.loads(state.read_text())
    content["reported"]["intervals_s"] = 0.5
    state.write_text(json.dumps(content))
    waits = {"waits.start_s": 0.1, "waits.retry_s": 0.1, "waits.interval_s": 60.0}
    alone = Federation(tmp_path, {**waits, "schedule.intervals": 2}, num_edges=1)
    before = time.monotonic()
    with pytest.raises(
        ParticipantsError, match=r"after 1.5 s \(3 intervals as they were so far\) there are 1 of 2"
    ):
        alone.run(resumed=Resumed(interval=1))
    assert time.monotonic() - before > 1.5


def test_who_is_refused_at_first_is_asked_again_before_the_start_is_given_up(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, {"waits.start_s": 6.0, "schedule.intervals": 1})
    nodes = federation.cloud_grid.nodes
    works, refused = nodes[FIRST_EDGE], []

    def refuses_once(message: Message) -> Message | None:
        if not refused:
            refused.append(message)
            raise ConfigError("not yet")
        return works(message)

    nodes[FIRST_EDGE] = refuses_once
    assert federation.config.waits.retry_s > 6.0
    assert federation.run().exit_code == 0
    changes = [(e["peer"], e["change"]) for e in federation.events("peer")]
    assert (str(FIRST_EDGE), "refused") in changes
    assert ("edge-0", "joined") in changes
