"""Flower's pool of a simulation's actors on a real Ray, which loses some of them."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from flwr.app import Context, RecordDict
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from support.waiting import wait_until

from fedphd.common.wire.raypool import replace_lost_actors

ACTORS = 2


@ray.remote
class Player:
    """Plays clients; a file of the name ``fragile`` makes the next one die while it starts."""

    def __init__(self, fragile: str) -> None:
        if os.path.exists(fragile):
            os.remove(fragile)
            os._exit(1)

    def run(self, end: str, message: str, cid: str, context: Context) -> tuple[str, int, Context]:
        """What Flower's actor is called with, and answers, as far as the pool looks at it."""
        if end == "dies":
            os._exit(1)
        if end == "short":
            raise OutOfMemoryError("Memory on the node was 22.37GB / 23.54GB ... and so on")
        return cid, os.getpid(), context


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    # Ray leaves files open, and says what it will do differently one day.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=ACTORS, include_dashboard=False, log_to_driver=False)
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.shutdown()
        gc.collect()


def pool_of(fragile: Path) -> Any:
    pool: Any = BasicActorPool(Player, {"num_cpus": 1}, {"fragile": str(fragile)})
    pool.add_actors_to_pool(ACTORS)
    return pool


def submitted(pool: Any, end: str = "") -> Any:
    # Each message brings a context with a configuration of its own.
    context = Context(1, 2, {}, RecordDict(), {"preset": "digits"})
    return pool.submit(lambda actor, *job: actor.run.remote(*job), (end, "message", "0", context))


def played(pool: Any, end: str = "") -> tuple[int, Context]:
    """The actor's process and the context, by the calls that Flower's backend makes."""
    future = submitted(pool, end)
    try:
        pid, context = pool.fetch_result_and_return_actor_to_pool(future)
        return int(pid), context
    except RayError:
        pool.add_actor_back_to_pool(future)
        raise


def test_a_lost_actor_is_replaced_also_by_one_that_is_lost_as_it_starts(tmp_path: Path) -> None:
    replace_lost_actors()
    fragile = tmp_path / "fragile"
    pool = pool_of(fragile)
    futures = [submitted(pool) for _ in range(ACTORS)]
    before = {pool.fetch_result_and_return_actor_to_pool(future)[0] for future in futures}
    fragile.touch()
    with pytest.raises(RayActorError):
        played(pool, "dies")
    # Whoever is lost answers nothing more: the other one does, until there are two again.
    assert pool.num_actors == ACTORS - 1
    (pid, context), (_, again) = played(pool), played(pool)
    assert pid in before
    # A node's context is kept from message to message, so its configuration is held once.
    assert context is not again
    assert context.run_config == {"preset": "digits"}
    assert context.run_config is again.run_config
    wait_until(lambda: pool.num_actors == ACTORS)
    assert not fragile.exists()
    assert len(pool.pool) == ACTORS
    # The pool takes whoever answered last, so both are asked together.
    after = {pid for _, pid, _ in ray.get([submitted(pool) for _ in range(ACTORS)])}
    assert len(after) == ACTORS
    assert len(after & before) == 1


def test_an_actor_that_was_ended_for_lack_of_memory_is_replaced(tmp_path: Path) -> None:
    replace_lost_actors()
    pool = pool_of(tmp_path / "fragile")
    before = {played(pool)[0] for _ in range(2 * ACTORS)}
    with pytest.raises(OutOfMemoryError, match=r"^its process was ended by Ray, since the machine"):
        played(pool, "short")
    assert pool.num_actors == ACTORS - 1
    wait_until(lambda: pool.num_actors == ACTORS)
    after = {pid for _, pid, _ in ray.get([submitted(pool) for _ in range(ACTORS)])}
    assert len(after) == ACTORS
    assert after - before
