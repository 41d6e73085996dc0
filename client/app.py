"""The client's ClientApp: what a client answers, whoever carries the messages.

``client/resident.py`` calls this app in its own process; Flower's stock ``flower-supernode``
and its simulation call it in theirs.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedphd.client.choice import choose_edge
from fedphd.client.flat_unet import UNetCache, received_layout
from fedphd.client.statistics import summed_features
from fedphd.client.trainer import ClientImages, Trainer, TrainResult
from fedphd.common.config.roles import ClientConfig
from fedphd.common.data.apart import Opening
from fedphd.common.data.images import LabelledImages
from fedphd.common.errors import FedPhDError, telling, within
from fedphd.common.events import Event
from fedphd.common.history.events import Trained
from fedphd.common.stores import StateStore
from fedphd.common.timing import Stopwatch
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.model import gpu_memory, resolve_device
from fedphd.common.unet.parts import PartSubset
from fedphd.common.wire import messages, records
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.offers import EVERY_EDGE, Choose, ChooseReply
from fedphd.common.wire.payload import shown

logger = logging.getLogger(__name__)

# What peers are told in place of a text that names files.
_IMAGES: Final = "its images cannot be used"
# So many classes are still named.
_MOST_NAMED: Final = 10


# What Flower puts around each answer.
Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


class ClientRuntime:
    """One client's data, model and optimiser, which stay loaded between messages.

    ``on_finish`` is told the run's exit code and message when its end is announced. ``networks``
    may be shared with other clients that this thread plays; None: a cache of its own. ``opening``
    may have begun to open the data. ``on_event`` is told what happens.

    Raises:
        ConfigError: the data cannot be read, or the device does not exist.
    """

    def __init__(
        self,
        config: ClientConfig,
        *,
        on_finish: Callable[[messages.Finish], None] = lambda finish: None,
        networks: UNetCache | None = None,
        opening: Opening | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.config = config
        with telling(_IMAGES), within("data"):
            self._data = LabelledImages(config.data, opening.wait() if opening else None)
        self._labels = torch.from_numpy(self._data.labels[self._data.train_indices])
        self._trainer = Trainer(client_id=config.client_id, device=config.device, networks=networks)
        self._on_finish, self._on_event = on_finish, on_event
        self._choices: dict[tuple[str, int, int, int], str] = {}
        self._training = threading.Lock()
        self._choosing = threading.Lock()

    def check_images(self) -> None:
        """Raise ConfigError if one of some of the images cannot be used, before a run waits for it.

        Where clients are simulated nobody asks for it: that would be most of what greeting them
        costs.
        """
        with within("data"):
            self._data.check_images()

    def describe_data(self) -> str:
        """How many images of which classes this client has."""
        held_out = len(self._data.validation_indices)
        classes = sorted(set(self._labels.tolist()))
        of = f"class{'' if len(classes) == 1 else 'es'} {', '.join(map(str, classes))}"
        if len(classes) > _MOST_NAMED:
            of = f"{len(classes)} classes"
        text = f"{len(self._labels)} images to train on, of {of}"
        return text + (f"; {held_out} held out" if held_out else "")

    def hello(self, asked: messages.Hello) -> messages.HelloReply:
        """Introduce this client."""
        if problem := asked.mismatch(asked.asking):
            logger.warning("%s", shown(problem))
        name, num_samples = self.config.client_id, len(self._labels)
        return messages.HelloReply(kind="client", name=name, num_samples=num_samples)

    def choose(self, asked: Choose) -> ChooseReply:
        """Draw this round's edge once; every edge that asks later gets the same answer."""
        counts = self._label_counts(len(asked.target))
        key = (asked.run_name, asked.attempt, asked.interval, asked.edge_round)
        with self._choosing:
            if key not in self._choices:
                # An edge may be late by the end of an interval, not by more.
                run_name, oldest = asked.run_name, asked.interval - 1
                self._choices = {
                    k: v for k, v in self._choices.items() if k[0] == run_name and k[2] >= oldest
                }
                name = self.config.client_id
                self._choices[key] = choose_edge(asked, client_id=name, label_counts=counts)
            chosen = self._choices[key]
        told = counts if asked.asking in (chosen, EVERY_EDGE) else ()
        return ChooseReply(client_id=self.config.client_id, edge_id=chosen, label_counts=told)

    def train(
        self, task: messages.TrainTask, message: Message, state: StateStore | None = None
    ) -> Message:
        """Train the weights that ``message`` carries on this client's data for one edge round.

        ``state`` is where the trainer's state lies between messages; None: in this process.
        """
        watch = Stopwatch()
        layout = received_layout(task)
        codec, variate = Codec(task.codec, layout), None
        received = records.read_coded(message, codec)
        weights = records.check_reply_weights(received, task.network, layout)
        if task.objective.method == "scaffold":
            variate = records.check_variate(records.read_variate(message, codec), layout)
        images = self._images(task.network)
        watch.lap("reading")
        # Several edges may hand out work at once; the data and the optimiser exist once.
        with self._training:
            watch.lap("waiting")
            if state is not None:
                state.restore(self._trainer, task)
                watch.lap("storing")
            try:
                result = self._trainer.train(task, weights, images, variate)
            except FedPhDError:
                # It has dropped what its next round must not start from.
                if state is not None:
                    state.store(self._trainer, task)
                raise
            except Exception:
                if state is not None:
                    state.forget()
                raise
            watch.lap("training")
            if state is not None:
                state.store(self._trainer, task)
                watch.lap("storing")
            # Here, since the weights are those of the network that the next round trains.
            content = self._reply(task, weights, layout, result)
            watch.lap("packing")
        self._tell(task, result, watch.phases)
        return Message(content, reply_to=message)

    def _reply(
        self,
        task: messages.TrainTask,
        received: torch.Tensor,
        layout: TensorLayout,
        result: TrainResult,
    ) -> RecordDict:
        """The answer to ``task``, which brought the ``received`` weights of ``layout``."""
        sent = PartSubset(result.layout, task.send)
        reply = messages.TrainReply(
            client_id=self.config.client_id,
            interval=task.interval,
            edge_round=task.edge_round,
            network=messages.UNetSpec(unet=task.network.unet, layout=sent.chosen.to_json()),
            num_examples=len(self._labels),
            metrics=result.metrics,
            steps=result.steps,
        )
        up = Codec(task.reply_codec, sent.chosen)
        base = None if up.is_exact else PartSubset(layout, task.send).take(received)
        packed = up.pack(sent.take(result.weights), base)
        return records.to_records(reply, packed, result.variate_change)

    def _tell(
        self, task: messages.TrainTask, result: TrainResult, phases: dict[str, float]
    ) -> None:
        trained = Trained(
            time=time.time(),
            role="client",
            node=self.config.client_id,
            **result.metrics.values(),
            interval=task.interval,
            edge_round=task.edge_round,
            images=len(self._labels),
            steps=result.steps,
            seconds=sum(phases.values()),
            phases=phases,
            gpu_memory=gpu_memory(self._trainer.device),
        )
        self._on_event(trained)

    def statistics(self, task: messages.StatisticsTask, message: Message) -> Message:
        """Sum up the features of the training images; ``message`` brings the extractor."""
        self._check_classes(task.num_classes)
        with self._training:
            with telling(_IMAGES):
                data, _ = self._data.split(image_size=task.image_size, channels=task.channels)
            device = resolve_device(self.config.device)
            summed = summed_features(task, records.read_weights(message), data, device=device)
        reply = messages.StatisticsReply(
            name=self.config.client_id, count=summed.count, label_counts=summed.label_counts
        )
        return Message(records.to_records(reply, summed.pack()), reply_to=message)

    def finish(self, asked: messages.Finish) -> messages.Ack:
        """Take note that the run is over."""
        self._on_finish(asked)
        return messages.Ack(name=self.config.client_id)

    def _images(self, network: messages.UNetSpec) -> ClientImages:
        size, channels = network.unet["image_size"], network.unet["channels"]
        with telling(_IMAGES):
            return ClientImages(*self._data.split(image_size=size, channels=channels))

    def _label_counts(self, num_classes: int) -> tuple[int, ...]:
        self._check_classes(num_classes)
        return tuple(torch.bincount(self._labels, minlength=num_classes).tolist())

    def _check_classes(self, num_classes: int) -> None:
        with telling(f"its labels go beyond the run's num_classes = {num_classes}"):
            self._data.check_classes(num_classes)


def build_app(
    runtime_of: Callable[[Context], ClientRuntime],
    *,
    state_of: Callable[[Context], StateStore | None] = lambda context: None,
    kind: type[ClientApp] = ClientApp,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """The ClientApp, which answers by the runtime that a message's context belongs to.

    ``state_of`` gives the place for what the trainer must remember where the process may end
    after each message; None: it stays in the runtime. ``kind`` is the app's class,
    ``mods`` are Flower's, around each answer.
    """
    app = kind(mods=list(mods))

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        reply = runtime_of(context).hello(records.read_payload(message, messages.Hello))
        return Message(records.to_records(reply), reply_to=message)

    @app.query("choose")
    def choose(message: Message, context: Context) -> Message:
        reply = runtime_of(context).choose(records.read_payload(message, Choose))
        return Message(records.to_records(reply), reply_to=message)

    @app.query("statistics")
    def statistics(message: Message, context: Context) -> Message:
        task = records.read_payload(message, messages.StatisticsTask)
        return runtime_of(context).statistics(task, message)

    @app.query("finish")
    def finish(message: Message, context: Context) -> Message:
        reply = runtime_of(context).finish(records.read_payload(message, messages.Finish))
        return Message(records.to_records(reply), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = records.read_payload(message, messages.TrainTask)
        return runtime_of(context).train(task, message, state_of(context))

    return app
