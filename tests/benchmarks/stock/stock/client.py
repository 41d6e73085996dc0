"""A client whose training is to add a little to every weight."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with the weights that came, each a little larger."""
    state = message.content.array_records["arrays"].to_torch_state_dict()
    trained = ArrayRecord({name: tensor + 1e-3 for name, tensor in state.items()})
    content = RecordDict({"arrays": trained, "metrics": MetricRecord({"num-examples": 2})})
    return Message(content, reply_to=message)
