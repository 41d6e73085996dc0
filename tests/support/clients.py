"""Clients as functions from message to answer, as Flower's own app answers for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from flwr.app import Context, Message, RecordDict
from support.federation import FIRST_CLIENT
from support.memory import Handler, MemoryGrid

from fedphd.client.app import ClientRuntime, build_app
from fedphd.common.config.roles import ClientConfig
from fedphd.common.stores import StateStore

NUM_CLIENTS, PARTS = 3, 40


def runtime(number: int, **data: Any) -> ClientRuntime:
    """A client with one of ``PARTS`` parts of the digits; ``data`` as in its configuration."""
    data["partition"] = {"num_partitions": PARTS, "partition_id": number}
    values = {"client_id": f"client-{number}", "device": "cpu", "data": data}
    return ClientRuntime(ClientConfig.model_validate(values))


StateOf = Callable[[Context], StateStore | None]


def node(number: int, state_of: StateOf, turn: threading.Lock, **data: Any) -> Handler:
    """A client as a function from message to answer; keeps its state where ``state_of`` says.

    Clients take turns: they draw from torch's global generator, which in a run is each its own.
    """
    made = runtime(number, **data)
    app = build_app(lambda context: made, state_of=state_of)
    context = Context(1, number, {}, RecordDict(), {})

    def answer(message: Message) -> Message:
        with turn:
            return app(message, context)

    return answer


def clients(state_of: StateOf = lambda context: None, **data: Any) -> MemoryGrid:
    """Clients that all virtual edges share; ``data`` as in their configuration."""
    turn = threading.Lock()
    nodes = {FIRST_CLIENT + n: node(n, state_of, turn, **data) for n in range(NUM_CLIENTS)}
    return MemoryGrid(nodes, threaded=True)
