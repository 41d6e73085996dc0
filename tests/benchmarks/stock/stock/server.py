"""FedAvg over all clients; the moments at which rounds end go into a file."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for some rounds."""
    config = context.run_config
    shapes = json.loads(Path(str(config["shapes"])).read_text("utf-8"))
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    if config["flat"]:
        state = {"weights": torch.cat([tensor.reshape(-1) for tensor in state.values()])}
    clients, times = int(config["clients"]), Path(str(config["times"]))

    seen: set[float] = set()

    def note(done: int, arrays: ArrayRecord) -> MetricRecord | None:
        # Where all clients fail, Flower goes on with the weights that it had.
        seen.add(float(next(iter(arrays.values())).numpy().flat[0]))
        if len(seen) != done + 1:
            raise RuntimeError(f"round {done} changed nothing: look at the SuperNodes' logs")
        with times.open("a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")
        return None

    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_available_nodes=clients,
        min_train_nodes=clients,
    )
    strategy.start(grid, ArrayRecord(state), num_rounds=int(config["rounds"]), evaluate_fn=note)
