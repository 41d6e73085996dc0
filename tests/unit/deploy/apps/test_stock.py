"""The ClientApp that Flower runs."""

from collections.abc import Callable

from flwr.clientapp import ClientApp
from ray import cloudpickle

from fedphd.deploy.apps import stock
from fedphd.deploy.bundle.fedphd_client import client_app


def test_the_app_travels_by_its_name() -> None:
    def wrapped() -> Callable[[], ClientApp]:
        # As Flower's simulation sends it with every message.
        return lambda: client_app

    sent = cloudpickle.dumps(wrapped())
    assert cloudpickle.loads(sent)() is stock.client_app
    # By value it was 3,584 bytes, and took 50 times as long.
    assert len(sent) < 1000
