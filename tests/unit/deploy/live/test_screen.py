"""What a terminal shows of a federation, in whatever size it has."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from support.happened import INTERVALS, began, half_a_run, interval, over, peer, started

from fedphd.common.events import Event
from fedphd.common.history.events import Evaluated, Working
from fedphd.deploy.live.model import Federation
from fedphd.deploy.live.screen import draw, share_out, spark

NOW = 1013.0


def drawn(
    events: list[Event],
    *,
    width: int = 80,
    height: int = 24,
    clients: int = 6,
    messages: tuple[str, ...] = (),
    now: float = NOW,
) -> list[str]:
    run = Federation()
    run.expect(2, clients, 3)
    for event in events:
        run.fold(event)
    console = Console(file=io.StringIO(), width=width, height=height, highlight=False)
    picture = draw(run, "runs/x", messages, width=width, height=height, now=now, foot="leave")
    console.print(picture)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def names(lines: list[str]) -> list[str]:
    """The first words of the tree's rows."""
    return [line.lstrip("│├└─ ").split()[0] for line in lines if "─ " in line]


def test_after_the_last_interval_it_says_what_is_waited_for() -> None:
    head = drawn([*half_a_run(), interval(12, INTERVALS)])[0]
    assert head == "interval 3 of 3 | 13 s | trained, the last evaluation is under way | runs/x"


def test_a_pause_of_a_run_that_was_resumed_is_no_time_that_it_took() -> None:
    """8 s until the cloud was last there, an hour of nothing, and 13 s since it is there again."""
    first = [*started(0, "edge-0", "cloud"), interval(8, 1)]
    second = [*started(3600, "edge-0"), *started(3605, "cloud")]
    lines = drawn([*first, *second], now=1000.0 + 3618)
    assert lines[0].startswith("interval 2 of 3 | 21 s | ")
    assert drawn([*first, over(9), *second, over(3615)])[0].startswith(
        "interval 1 of 3 done | 19 s | "
    )


def test_a_tree_of_cloud_edges_and_clients_with_their_figures() -> None:
    assert [" ".join(line.split()) for line in drawn(half_a_run())] == [
        "interval 1 of 3 | 13 s | about 54 s left | runs/x",
        "━━━━ 7%",
        "",
        "loss took moved per second",
        "cloud interval 0/3 done",
        "├─ edge-0 round 2/15, 1/3 back 0.2500 2 s 1.0 MB 500.0 kB",
        "│ ├─ client-0 answered in 4 s 0.1250 4.0 s",
        "│ ├─ client-2 trains for 5 s 0.5000 4.0 s",
        "│ └─ client-4 trains for 5 s 0.5000 4.0 s",
        "└─ edge-1 round 2/15, 0/3 back 0.2500 2 s 1.0 MB 500.0 kB",
        "├─ client-1 trains for 5 s 0.5000 4.0 s",
        "├─ client-3 trains for 5 s 0.5000 4.0 s",
        "└─ client-5 trains for 5 s 0.5000 4.0 s",
        "leave",
    ]


def test_before_anybody_came_it_says_who_is_missing() -> None:
    lines = drawn([])
    assert lines[0] == "interval 1 of 3 | starting | runs/x"
    assert lines[2] == "waiting for 6 of 6 clients"
    assert names(lines) == ["edge-0", "edge-1", *(f"client-{n}" for n in range(6))]


def test_losses_and_distances_run_from_first_to_last() -> None:
    working = Working(what="sampling", done=3, total=10, role="cloud", node="cloud")
    events = [interval(20, 1, loss=0.5), interval(30, 2, loss=0.125), working]
    assert drawn(events)[2] == "loss 0.5000 -> 0.1250 █▁ | 0.70 M parameters | sampling 30%"


def test_a_distance_says_of_when_it_is() -> None:
    def measured(at: int, distance: float) -> Evaluated:
        return Evaluated(
            what="", weights="ema", interval=at, frechet_distance=distance, features="inception",
            num_samples=64, sampling_steps=20, seed=0, sampler="DDIM", seconds=1.0,
            role="cloud", node="cloud",
        )  # fmt: skip

    assert drawn([measured(0, 350.0)])[2].startswith("Frechet distance 350.0 before training")
    later = drawn([measured(0, 350.0), interval(20, 1, loss=0.5), measured(1, 60.0)])[2]
    assert "Frechet distance 350.0 -> 60.0" in later
    assert "after interval 1" in later


def test_stragglers_and_failures_are_marked() -> None:
    events = [*half_a_run(), peer(12, "edge-1", "client-3", "failed", "no heartbeat from it")]
    lines = drawn(events, now=1020.0, width=100)
    assert any("client-2 slow: 12 s, usually 4 s " in line for line in lines)
    assert any("client-3 failed: no heartbeat from it" in line for line in lines)


@pytest.mark.parametrize(
    ("width", "height"), [(80, 24), (200, 50), (40, 12), (80, 8), (80, 7), (40, 6)]
)
@pytest.mark.parametrize("clients", [1, 6, 100])
def test_it_never_leaves_the_screen(width: int, height: int, clients: int) -> None:
    messages = tuple(f"message {n} " * 30 for n in range(40))
    for said in ((), messages):
        lines = drawn(
            half_a_run(clients), width=width, height=height, clients=clients, messages=said
        )
        assert len(lines) <= height
        assert max(map(len, lines)) <= width


def test_a_large_federation_shows_first_who_is_in_trouble() -> None:
    events = [*half_a_run(100), peer(12, "edge-1", "client-99", "failed", "gone")]
    lines = drawn(events, clients=100)
    assert len(lines) == 24
    text = "\n".join(lines)
    assert "client-99 failed: gone" in text
    # 24 lines less 3 of the head, a heading, cloud, 2 edges and the foot leave 8 for each edge:
    # 7 of its 50 clients, and how many more there are.
    assert text.count("+ 43 more 43 training") == 1
    assert text.count("+ 43 more 1 answered, 42 training") == 1


def test_with_more_edges_than_lines_the_rest_is_counted() -> None:
    run = Federation()
    run.expect(30, 0, 3)
    console = Console(file=io.StringIO(), width=80, height=24)
    console.print(draw(run, "x", (), width=80, height=24, now=NOW))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 24
    assert "edge-17" in lines[-2]
    assert lines[-1].startswith("└─ + 12 more")


def test_where_no_edge_fits_all_are_counted() -> None:
    assert drawn(half_a_run(), height=7)[-2].startswith("└─ + 2 more")
    assert drawn(half_a_run(), height=6)[-2].startswith("cloud")


def test_messages_stand_above_and_old_ones_are_counted() -> None:
    lines = drawn(half_a_run(), messages=tuple(f"trouble {n}" for n in range(9)))
    assert lines[:3] == ["+ 4 earlier messages", "! trouble 4", "! trouble 5"]
    assert lines[6].endswith("runs/x")
    assert "[bold]x[/bold]" in drawn([], messages=("[bold]x[/bold]",))[0]


def test_how_a_run_ended_is_said() -> None:
    assert drawn([began(3, "edge-0", 1), over(60)])[0] == (
        "interval 0 of 3 done | 57 s | finished | runs/x"
    )
    known = peer(1, "cloud", "edge-0"), peer(1, "cloud", "edge-0", "serves", "client-0")
    lines = drawn([*known, over(60)])
    assert "edge-0 ended" in " ".join(" ".join(lines).split())
    assert "client-0 was there at the end" in " ".join(" ".join(lines).split())
    assert drawn([over(60, 4, "too few edges")])[0].endswith("| too few edges | runs/x")


@pytest.mark.parametrize(
    ("wanted", "room", "given"),
    [
        ([3, 3], 10, [3, 3]),
        ([9, 1, 9], 7, [3, 1, 3]),
        ([9, 9], 3, [2, 1]),
        ([], 5, []),
        ([4], 0, [0]),
    ],
)
def test_lines_are_shared_out_evenly(wanted: list[int], room: int, given: list[int]) -> None:
    assert share_out(wanted, room) == given


def test_a_sparkline_goes_from_the_smallest_to_the_largest() -> None:
    assert spark([0.0, 7.0, 3.0], 8) == "▁█▄"
    assert spark([1.0, 1.0], 8) == "▁▁"
    assert spark([9.0, 0.0, 1.0], 2) == "▁█"
