"""What edges send back after an interval, checked before anything of it counts."""

from dataclasses import dataclass
from typing import Final

import torch
from flwr.app import Message

from fedphd.common.config.roles import check_id
from fedphd.common.config.run import FederationConfig
from fedphd.common.errors import ReplyError
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.unet.parts import Part, PartSubset, joined, part_sets
from fedphd.common.wire import records
from fedphd.common.wire.codecs import Codec
from fedphd.common.wire.messages import IntervalReply
from fedphd.common.wire.payload import MOST_OF_CLIENT

_SHARES_TOLERANCE: Final = 1e-6


@dataclass(frozen=True)
class EdgeUpdate:
    """An edge's reply.

    Attributes:
        sent: the parts that it sends, of the cloud's U-Net.
        weights: of these, (sent.chosen.numel,), float32.
        change: of SCAFFOLD's variate, (numel,), float32; None for other methods.
    """

    answer: IntervalReply
    sent: PartSubset
    weights: torch.Tensor
    change: torch.Tensor | None = None

    def has(self, parts: tuple[Part, ...]) -> bool:
        """Whether it sends all of these ``parts``."""
        return set(parts) <= set(self.sent.parts)

    def part(self, parts: tuple[Part, ...]) -> torch.Tensor:
        """The weights of some of its parts, flat, float32."""
        return PartSubset(self.sent.chosen, parts).take(self.weights)


def read_update(
    reply: Message,
    name: str,
    interval: int,
    *,
    config: FederationConfig,
    layout: TensorLayout,
    weights: torch.Tensor,
) -> EdgeUpdate:
    """Read the reply of the edge ``name`` to the order for ``interval``.

    Args:
        layout: of the cloud's U-Net, whose ``weights`` are (numel,), float32: the edge's changes
            are added to them.

    Raises:
        ReplyError: it is malformed, claims what cannot be, or its weights do not fit.
    """
    answer = records.read_payload(reply, IntervalReply)
    if answer.edge_id != name or answer.interval != interval:
        raise ReplyError(
            f"answers as {answer.edge_id} for interval {answer.interval}; expected {name} "
            f"for interval {interval}"
        )
    _check_shares(answer, config.num_classes)
    _check_counts(answer, config)
    _check_costs(answer, config)
    sent = _parts_sent(answer.parts, config, layout)
    codec = Codec(config.codecs.cloud_up, sent.chosen)
    # A copy where it is not the whole network, which an exact codec does not need.
    base = None if codec.is_exact else sent.take(weights)
    trained = records.read_coded(reply, codec, base)
    records.check_reply_weights(trained, answer.network, sent.chosen)
    if config.objective.method != "scaffold":
        return EdgeUpdate(answer, sent, trained)
    change = records.read_variate(reply, Codec(codec.name, layout))
    return EdgeUpdate(answer, sent, trained, records.check_variate(change, layout))


def _parts_sent(
    parts: tuple[Part, ...], config: FederationConfig, layout: TensorLayout
) -> PartSubset:
    """What an edge that sends ``parts`` must send; ReplyError unless they are part sets."""
    sets = part_sets(config.exchange.parts)
    came = joined(sent for sent in sets if set(sent) <= set(parts))
    if not parts or came != parts:
        raise ReplyError(
            f"sends the parts {list(parts)}; expected whole part sets of "
            f"{[list(part_set) for part_set in sets]} (exchange.parts = {config.exchange.parts!r})"
        )
    return PartSubset(layout, parts)


def _check_shares(answer: IntervalReply, num_classes: int) -> None:
    shares = answer.label_distribution
    fits = len(shares) == num_classes and min(shares) >= 0
    if not fits or abs(sum(shares) - 1) > _SHARES_TOLERANCE:
        raise ReplyError(
            f"label distribution {list(shares)}: expected {num_classes} shares >= 0, one for "
            "each class, that sum to 1"
        )


def _check_counts(answer: IntervalReply, config: FederationConfig) -> None:
    schedule, names = config.schedule, len(set(answer.clients))
    if answer.client_rounds > names * schedule.edge_rounds:
        raise ReplyError(
            f"claims {answer.client_rounds} client rounds; at most {schedule.edge_rounds} "
            f"fit for each of its {names} clients"
        )
    if len(answer.rounds) > schedule.edge_rounds:
        raise ReplyError(
            f"claims {len(answer.rounds)} edge rounds; an interval has {schedule.edge_rounds}"
        )
    if strangers := {n for one in answer.rounds for n in one.clients} - set(answer.clients):
        raise ReplyError(f"names {sorted(strangers)[0]!r} in a round, but not among its clients")
    most = schedule.max_client_samples * names
    if answer.samples_per_round > most:
        raise ReplyError(f"claims {answer.samples_per_round:g} samples; at most {most} fit")
    for name, mean in answer.metrics.means().items():
        if mean.weight > most:
            raise ReplyError(f"claims a {name} of {mean.weight:g} samples; at most {most} fit")
        # No client may send more, and sums of several edges stay far from overflow.
        if abs(mean.value or 0.0) > MOST_OF_CLIENT:
            raise ReplyError(f"claims a {name} of {mean.value:g}; at most {MOST_OF_CLIENT:g}")
    if answer.client_rounds and not answer.samples_per_round:
        raise ReplyError(f"claims {answer.client_rounds} client rounds without a sample")


def _check_costs(answer: IntervalReply, config: FederationConfig) -> None:
    """Figures that move the EMA and enter the report; and names, which people read."""
    try:
        for name in (*answer.clients, *(n for one in answer.rounds for n in one.left_out)):
            check_id(name)
    except ValueError as error:
        raise ReplyError(f"names a client {error}") from error
    if answer.traffic.is_absurd:
        raise ReplyError(f"claims {answer.traffic.total_bytes:.3g} bytes over its links")
    schedule, training = config.schedule, config.training
    a_round = training.most_steps(schedule.max_client_samples)
    if answer.mean_steps > (most_steps := a_round * schedule.edge_rounds):
        raise ReplyError(f"claims {answer.mean_steps:g} client steps; at most {most_steps} fit")
    if answer.images > (most := answer.client_rounds * a_round * training.batch_size):
        raise ReplyError(f"claims {answer.images} images of steps; at most {most} fit")
