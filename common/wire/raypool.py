"""Flower's simulation where one of Ray's actors is lost, with its machine or for lack of memory.

Flower hands a lost actor the next message, and the next: it fails at once, is idle again, and so
takes nearly every message of the run. Here it leaves the pool, and another takes its place as soon
as the cluster has started one. Until then there are more threads than actors, so that one may find
none although it has looked: it waits.
"""

import threading
import time
from typing import Any, Final

# Then the message that nobody has taken fails.
_WAIT_S: Final = 60.0
# Between two tries to start an actor.
_PAUSE_S: Final = 1.0
_SHORT_OF_MEMORY: Final = "its process was ended by Ray, since the machine is short of memory"


def replace_lost_actors() -> None:
    """Mend the pool of the simulation in this process, once, before or while it works."""
    # Only a simulation has Ray, which takes a second to import.
    import ray
    from flwr.simulation.ray_transport.ray_actor import BasicActorPool
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    # Where memory runs short, Ray ends actors before the system does.
    is_lost = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError)
    if hasattr(BasicActorPool, "replaces_lost_actors"):
        return
    fetch = BasicActorPool.fetch_result_and_return_actor_to_pool
    give_back = BasicActorPool.add_actor_back_to_pool
    submit = BasicActorPool.submit
    changed, lost = threading.Condition(), set[Any]()
    same: dict[str, Any] = {}

    def submitted(pool: BasicActorPool, actor_fn: Any, job: Any) -> Any:
        with changed:
            changed.wait_for(lambda: pool.pool, _WAIT_S)
            return submit(pool, actor_fn, job)

    def fetched(pool: BasicActorPool, future: Any) -> Any:
        try:
            message, context = fetch(pool, future)
            # Flower keeps a node's context from message to message. Each brings a copy of the
            # run's configuration with it, which is some 10 kB.
            context.run_config = same.setdefault(str(context.run_config), context.run_config)
            return message, context
        except is_lost as error:
            with changed:
                lost.add(future)
            raise _shortened(error) from None

    def given_back(pool: BasicActorPool, future: Any) -> None:
        with changed:
            if future not in lost:
                give_back(pool, future)
                changed.notify()
                return
            lost.remove(future)
            pool._future_to_actor.pop(future)
            pool.num_actors -= 1
        threading.Thread(target=started, args=(pool,), daemon=True).start()

    def started(pool: BasicActorPool) -> None:
        create: Any = pool.create_actor_fn
        while True:
            actor = create()
            try:
                # Without room for it, this takes until there is a new machine, or for ever. A
                # message to the actor would wait as long.
                ray.get(actor.__ray_ready__.remote())
                break
            except is_lost:
                # Lost again, before it was there.
                time.sleep(_PAUSE_S)
        with changed:
            pool.pool.append(actor)
            pool.num_actors += 1
            changed.notify()

    mended: Any = BasicActorPool
    mended.submit = submitted
    mended.fetch_result_and_return_actor_to_pool = fetched
    mended.add_actor_back_to_pool = given_back
    mended.replaces_lost_actors = True


def _shortened(error: Exception) -> Exception:
    """The error, without the page that Ray writes on a lack of memory for each client."""
    from ray.exceptions import OutOfMemoryError

    if not isinstance(error, OutOfMemoryError):
        return error
    short: Exception = OutOfMemoryError(_SHORT_OF_MEMORY)  # type: ignore[no-untyped-call]
    return short
