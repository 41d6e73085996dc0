"""The choice of an edge, as edges and clients speak about it: offers, the question, its answer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Final, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from fedphd.common.config.run import SelectionPolicy
from fedphd.common.homogeneity import merge
from fedphd.common.wire.payload import Payload

CHOOSE: Final = "query.choose"
# Who asks when edges share one question: the answer is for whichever edge is chosen.
EVERY_EDGE: Final = "*"

_SUM_TOLERANCE: Final = 1e-6


def _checked(shares: tuple[float, ...]) -> tuple[float, ...]:
    if min(shares, default=-1.0) < 0:
        raise ValueError(f"{list(shares)} are not shares; expected at least one, all >= 0")
    if abs(sum(shares) - 1.0) > _SUM_TOLERANCE:
        raise ValueError(f"the shares sum to {sum(shares):g}; expected 1")
    return shares


# Label shares, shape (num_classes,): at least one, all >= 0, with a sum of 1.
Shares = Annotated[tuple[float, ...], AfterValidator(_checked)]


class Offer(Payload):
    """What an edge holds in an interval so far: shares and number of the samples trained there."""

    edge_id: str
    label_distribution: Shares
    num_samples: float = Field(ge=0)

    @classmethod
    def empty(cls, edge_id: str, target: Sequence[float]) -> Self:
        """An edge at an interval's start: it holds nothing, and counts as being on target."""
        return cls(edge_id=edge_id, label_distribution=tuple(target), num_samples=0.0)

    def with_client(self, label_counts: Sequence[int]) -> Self:
        """This edge with a client's images, of which there are ``label_counts`` per class."""
        counts = np.asarray(label_counts, dtype=np.float64)
        total = float(counts.sum())
        merged = merge(self.label_distribution, self.num_samples, counts / total, total)
        return type(self)(
            edge_id=self.edge_id,
            label_distribution=tuple(merged.tolist()),
            num_samples=self.num_samples + total,
        )


class Choose(Payload):
    """Edge to client: will you train with one of these edges in this round?

    ``run_name`` and ``attempt`` are as in ``IntervalTask``, and so is ``num_edges``: so many make
    an offer in this round.
    """

    most_bytes: ClassVar[int] = 32 << 20

    asking: str
    num_edges: int = Field(ge=1)
    run_name: str = Field("", max_length=64)
    attempt: int = Field(0, ge=0)
    interval: int = Field(ge=1)
    edge_round: int = Field(ge=1)
    offers: tuple[Offer, ...] = Field(min_length=1)
    target: Shares
    policy: SelectionPolicy
    factor: float = Field(ge=0)
    offset: float
    epsilon: float = Field(gt=0)
    seed: int = Field(ge=0)
    offer_wait_s: float = Field(ge=0)
    synchronised: bool

    @model_validator(mode="after")
    def _offers_fit(self) -> Self:
        seen: set[str] = set()
        for offer in self.offers:
            if offer.edge_id in seen:
                raise ValueError(f"edge {offer.edge_id} offers itself twice; one offer per edge")
            if len(offer.label_distribution) != len(self.target):
                raise ValueError(
                    f"edge {offer.edge_id} offers {len(offer.label_distribution)} label shares; "
                    f"expected {len(self.target)}, as many as the target has"
                )
            seen.add(offer.edge_id)
        return self


class ChooseReply(Payload):
    """Client to edge: the chosen edge, and the label counts if it is the asking one."""

    client_id: str
    edge_id: str
    label_counts: tuple[int, ...] = ()


class OfferBook:
    """The offers of several edges, of which each knows only its own, and which count in an answer.

    ``past_intervals`` are remembered before the one that is asked about. How long to wait for
    offers is up to the owner, who also guards the book against other threads.
    """

    def __init__(self, *, past_intervals: int) -> None:
        self._past_intervals = past_intervals
        # By run, attempt (a resumed run has intervals again), interval and round; then by edge.
        self._rounds: dict[tuple[str, int, int, int], dict[str, Offer]] = {}

    def note(self, asked: Choose) -> None:
        """Remember the asking edge's own offer, and forget what nobody will ask for again."""
        for offer in asked.offers:
            if offer.edge_id == asked.asking:
                oldest = asked.interval - self._past_intervals
                self._rounds = {
                    (run_name, attempt, interval, edge_round): made
                    for (run_name, attempt, interval, edge_round), made in self._rounds.items()
                    # An edge may still be busy with the attempt before.
                    if run_name == asked.run_name
                    and interval >= oldest
                    and attempt >= asked.attempt - 1
                }
                self._rounds.setdefault(_round_of(asked), {})[offer.edge_id] = offer

    def forget(self, edge_id: str) -> None:
        """Forget all that an edge has offered."""
        for made in self._rounds.values():
            made.pop(edge_id, None)

    def of_round(self, asked: Choose) -> Mapping[str, Offer]:
        """The offers that were made in the question's edge round, by edge."""
        return self._rounds.get(_round_of(asked), {})

    def merged(self, asked: Choose, of_round: Iterable[Offer]) -> Choose:
        """The question of one edge with the offers of all, in the order of their names.

        They are those ``of_round``, its edge round, and unless the question is synchronised the
        latest that the other edges made in this interval.
        """
        latest: dict[str, Offer] = {}
        if not asked.synchronised:
            for key, made in sorted(self._rounds.items()):
                latest.update(made if key[:3] == _round_of(asked)[:3] else {})
        latest.update({offer.edge_id: offer for offer in of_round})
        offers = tuple(latest[edge_id] for edge_id in sorted(latest))
        return asked.model_copy(update={"offers": offers})


def _round_of(asked: Choose) -> tuple[str, int, int, int]:
    return asked.run_name, asked.attempt, asked.interval, asked.edge_round
