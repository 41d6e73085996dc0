"""A federation as its events show it."""

from __future__ import annotations

import pytest
from support.happened import (
    INTERVALS,
    began,
    ended,
    half_a_run,
    interval,
    over,
    peer,
    replied,
    started,
)

from fedphd.common.events import Event
from fedphd.common.history.events import LinkChanged, Working
from fedphd.deploy.live.model import ANSWERED, STARTS, THERE, TRAINS, Federation


def folded(events: list[Event]) -> Federation:
    run = Federation()
    run.expect(2, 6, 3)
    for event in events:
        run.fold(event)
    return run


def states(run: Federation) -> dict[str, str]:
    return {client.name: client.state for client in run.clients.values()}


def test_whom_a_launcher_starts_is_there_from_the_beginning() -> None:
    run = folded([])
    assert list(run.edges) == ["edge-0", "edge-1"]
    assert set(states(run).values()) == {STARTS}
    run.is_there("client-1")
    assert states(run)["client-1"] == THERE
    assert (run.share_done(), run.left_s(0.0)) == (0.0, None)


def test_clients_train_at_the_edge_that_they_chose_and_answer() -> None:
    run = folded(half_a_run())
    assert states(run) == {f"client-{n}": TRAINS for n in range(1, 6)} | {"client-0": ANSWERED}
    assert {c.name: c.edge for c in run.clients.values()} == {
        f"client-{n}": f"edge-{n % 2}" for n in range(6)
    }
    client = run.clients["client-0"]
    assert (client.loss, client.seconds, client.rounds) == (0.125, 4.0, 2)
    assert run.edges["edge-0"].answered == ["client-0"]


def test_what_is_done_counts_rounds_and_the_answers_of_the_one_under_way() -> None:
    run = folded(half_a_run())
    # 15 rounds: edge-0 has done one and a third, edge-1 one; the slower one counts.
    assert run.edges["edge-0"].share_done() == pytest.approx((1 + 1 / 3) / 15)
    assert run.share_done() == pytest.approx(1 / 15)
    assert folded([*half_a_run(), interval(20, 3)]).share_done() == 1.0


def test_bytes_per_second_are_those_of_the_last_round() -> None:
    events = [ended(2, "edge-0", 1, 3_000_000), ended(4, "edge-0", 2, 4_000_000, seconds=4.0)]
    assert folded(events[:1]).edges["edge-0"].rate == 1_500_000
    edge = folded(events).edges["edge-0"]
    assert (edge.rate, edge.moved) == (250_000, 4_000_000)
    assert folded([interval(9, 1)]).cloud.rate == 500_000


def test_time_left_is_that_of_the_slowest_edge_and_runs() -> None:
    run = folded([ended(0, "edge-0", 1, left_s=60.0), ended(5, "edge-1", 1, left_s=70.0)])
    assert run.left_s(1010.0) == 65.0
    assert run.left_s(2000.0) is None, "it takes longer than was guessed"
    run.fold(over(20))
    assert run.left_s(1021.0) is None
    assert run.verdict == (0, "finished")


def test_where_no_edge_is_seen_the_cloud_guesses() -> None:
    assert folded([interval(0, 1)]).left_s(1010.0) == 30.0


def test_after_the_last_interval_no_time_is_guessed() -> None:
    last = [ended(0, "edge-0", 1, left_s=5.0), interval(1, INTERVALS)]
    run = folded(last)
    assert run.is_trained
    assert run.left_s(1002.0) is None
    assert not folded([interval(1, INTERVALS - 1)]).is_trained
    assert not folded([]).is_trained


def test_a_straggler_takes_twice_as_long_as_clients_usually_do() -> None:
    run = folded(half_a_run())
    slow = run.clients["client-2"]
    assert run.usual_s() == 4.0
    assert not run.is_slow(slow, slow.since + 7.9)
    assert run.is_slow(slow, slow.since + 8.1)
    assert not run.is_slow(run.clients["client-0"], slow.since + 60.0)


def test_who_failed_or_left_is_seen_until_it_trains_again() -> None:
    events = [*half_a_run(), peer(13, "edge-1", "client-1", "failed", "no heartbeat")]
    client = folded(events).clients["client-1"]
    assert (client.state, client.detail, client.is_broken) == ("failed", "no heartbeat", True)
    again = folded([*events, began(60, "edge-0", 3, "client-1")]).clients["client-1"]
    assert (again.state, again.edge, again.detail) == (TRAINS, "edge-0", "")


def test_somebody_who_uses_a_clients_name_does_not_change_it() -> None:
    events = [*half_a_run(), peer(13, "edge-1", "client-1", "refused", "node 9 uses this name")]
    assert folded(events).clients["client-1"].state == TRAINS


def test_an_edge_that_left_its_cloud_is_broken() -> None:
    edge = folded([*half_a_run(), peer(13, "cloud", "edge-1", "left")]).edges["edge-1"]
    assert edge.state == "left"


def test_beside_an_edge_alone_the_cloud_runs_once_it_is_reached() -> None:
    waits, reached = (
        LinkChanged(server="c:1", change=change, role="edge", node="edge-0", time=1.0)
        for change in ("no answer, trying again", "connected")
    )
    assert folded([waits]).cloud.state == STARTS
    assert folded([waits, reached]).cloud.state == "running"
    assert folded([over(1), reached]).cloud.state == "ended"


def test_a_cloud_alone_knows_which_clients_its_edges_have() -> None:
    run = Federation()
    for event in (
        *started(0, "cloud"),
        peer(1, "cloud", "site-a"),
        peer(1, "cloud", "site-a", "serves", "x,y"),
    ):
        run.fold(event)
    assert {c.name: c.edge for c in run.clients.values()} == {"x": "site-a", "y": "site-a"}
    assert run.edges["site-a"].state == "running"


@pytest.mark.parametrize(("code", "state"), [(0, "ended"), (4, "ended"), (130, "running")])
def test_edges_that_a_cloud_alone_has_told_have_ended_too(code: int, state: str) -> None:
    run = Federation()
    for event in (*started(0, "cloud"), peer(1, "cloud", "site-a"), over(2, code)):
        run.fold(event)
    assert run.edges["site-a"].state == state


def test_in_a_flat_federation_the_cloud_has_the_clients() -> None:
    run = Federation()
    for event in (peer(1, "cloud", "cloud"), began(2, "cloud", 1, "client-0")):
        run.fold(event)
    run.fold(replied(3, "cloud", "client-0", 1.0).model_copy(update={"role": "edge"}))
    assert list(run.clients) == ["client-0"]
    assert run.edges == {}
    assert run.cloud.answered == ["client-0"]


def test_what_the_cloud_does_beside_is_known_until_it_is_done() -> None:
    working = Working(what="sampling", done=3, total=10, role="cloud", node="cloud")
    assert folded([working]).working == ("sampling", 3, 10)
    assert folded([working, over(1)]).working is None
    assert folded([working, working.model_copy(update={"done": 10})]).working is None


def test_an_interrupted_process_has_stopped_and_one_with_an_error_failed() -> None:
    assert folded([over(1, 130, "stopped")]).cloud.state == "stopped"
    cloud = folded([over(1, 4, "too few edges")]).cloud
    assert (cloud.state, cloud.detail) == ("failed", "too few edges")
