"""A client whose training is to add a little to every weight."""

from __future__ import annotations

# Flower makes tensors only where torch is imported already.
import torch  # noqa: F401
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with the weights that came, each a little larger.

    By how much depends on the node: equal replies, and an average that is equal to them, are
    objects that Flower sends only once.
    """
    state = message.content.array_records["arrays"].to_torch_state_dict()
    added = 1e-3 * (1 + context.node_id % 97)
    trained = ArrayRecord({name: tensor + added for name, tensor in state.items()})
    content = RecordDict({"arrays": trained, "metrics": MetricRecord({"num-examples": 2})})
    return Message(content, reply_to=message)
