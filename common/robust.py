"""Averages that a few senders cannot ruin: a bound on updates, and a trimmed mean.

An edge uses both on its clients' replies, the cloud on its edges'.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor

# With two norms the median lies between them, and cannot tell which of the two is wrong.
FEWEST_NORMS: Final = 3
# Who claims more than so many times the usual images gets no longer update for it.
MOST_IMAGES: Final = 10
# Values that are worked on at a time, so that a pass over a model needs no second model.
_CHUNK: Final = 1 << 20
# Below it squares of float32 begin to lose their last bits.
_LEAST_NORM: Final = 1e-15

ItemT = TypeVar("ItemT")
# Of a reply's changes, in the order of ``_KINDS``; the second only under SCAFFOLD.
Norms = tuple[float, ...]
_KINDS: Final = (
    ("weights, per optimiser step,", "the median {:.4g} of its round"),
    ("control variate", "{:.4g}, the largest median of a round so far"),
)


def update_norm(reply: Tensor, sent: Tensor) -> float:
    """The 2-norm of ``reply - sent``, both (numel,), float32."""
    parts = zip(torch.split(reply, _CHUNK), torch.split(sent, _CHUNK), strict=True)
    return math.hypot(*(_norm(came - went) for came, went in parts))


def norm_of(change: Tensor) -> float:
    """The 2-norm of ``change``, (numel,), float32."""
    return math.hypot(*(_norm(part) for part in torch.split(change, _CHUNK)))


def _norm(values: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(values))
    if _LEAST_NORM < norm < math.inf:
        return norm
    # Squares that float32 cannot hold; it takes ten times as long.
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def medians(norms: Sequence[Norms]) -> Norms:
    """The median of each kind of norm over at least one reply: for an even number the lower."""
    return tuple(sorted(kind)[(len(norms) - 1) // 2] for kind in zip(*norms, strict=True))


def excess(norms: Norms, usual: Norms, ratio: float) -> str | None:
    """Why a reply's ``norms`` are too large beside the ``usual`` ones; None if they are not.

    A usual norm of 0 says nothing: then most replies are what was sent.
    """
    for (kind, what), norm, middle in zip(_KINDS, norms, usual, strict=False):
        if middle > 0 and norm > ratio * middle:
            return (
                f"its change of the {kind} has the norm {norm:.4g}, {norm / middle:.4g} times "
                f"{what.format(middle)}; at most {ratio:g} times is allowed "
                "(aggregation.max_update_ratio)"
            )
    return None


class UsualNorms:
    """What the norms of a round's replies are measured by.

    Of the weights that is the median of the round. SCAFFOLD's variates are mean gradients, and who
    trains for the first time sends all of its own, the others only by how much theirs changed since
    their last time: 10 to 20 times less after a few rounds. A median of those would drop every
    newcomer. So changes of variates are measured by the largest median so far: in a run's first
    round all are new. Whoever comes to a run later begins with the norm of the server's variate,
    the mean of the clients'.
    """

    def __init__(self) -> None:
        self._variate = 0.0
        self._has_seen_a_round = False

    def start(self, variate: float) -> None:
        """Begin a round to which a server variate of this norm was sent; 0: there is none."""
        if not self._has_seen_a_round:
            self._variate = variate

    def of(self, norms: Sequence[Norms]) -> Norms:
        """What a round is measured by that has sent the ``norms`` so far, one reply or more."""
        weights, *variates = medians(norms)
        return weights, *(max(norm, self._variate) for norm in variates)

    def finish(self, norms: Sequence[Norms]) -> Norms:
        """The same at the end of a round; the next ones remember it."""
        usual = self.of(norms)
        self._variate, self._has_seen_a_round = max(usual[1:], default=0.0), True
        return usual


@dataclass(frozen=True, eq=False)
class _Held(Generic[ItemT]):
    """A reply that waits for the end of its round."""

    norms: Norms
    item: ItemT


class UpdateBound(Generic[ItemT]):
    """Finds the replies of a round whose updates are far longer than the others', as they come.

    A reply may be dropped where the norm of its update exceeds ``ratio`` times the median of its
    round, which is known only at the end; but a streaming sum cannot give back what it has taken,
    and keeping every reply until then takes the memory of as many models. So a reply is measured
    at once by the median of the *last* round that had enough replies: norms change little from
    one round to the next. What is within ``ratio`` of it is used at once; only what exceeds it is
    held back, and judged by the median of its own round at the end. An honest round holds back
    nothing, and is averaged in the order in which its replies came, to the bit as without a bound.

    The very first round has no last one. It holds back its first two replies, and from the third
    on it measures by the median of those that have come; if the first two of three came from
    attackers, they pass.

    Norms are per optimiser step, by a client's registered number of images, since a client with
    many images takes many steps: after one local epoch of Adam 38 steps moved a U-Net 7 times as
    far as one step, with a learning rate that warms up 200 times; per step both stay within 6.

    What it costs: a float per reply, two models at most in the first round, and one for each reply
    that is held back. Whoever owns more than half of a round's replies owns the median. Norms of
    replies that are dropped count in it, as those of any reply.

    Args:
        ratio: at most this many times the median; 0: everything is used at once.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._usual = UsualNorms()
        self._last: Norms | None = None
        self._norms: list[Norms] = []
        self._held: list[_Held[ItemT]] = []

    @property
    def num_held(self) -> int:
        """Replies that are kept in memory now."""
        return len(self._held)

    def start(self, variate: float = 0.0) -> None:
        """Begin a round; what an interrupted one left is forgotten.

        ``variate`` is the norm of SCAFFOLD's server variate that was sent, 0 for other methods.
        """
        self._usual.start(variate)
        self._norms, self._held = [], []

    def offer(self, norms: Norms, item: ItemT) -> list[ItemT]:
        """Take a reply; returns what may be used now, in the order in which it came.

        ``norms`` are those of a reply's updates, of the weights and perhaps of a control variate;
        each kind is measured by its own (``UsualNorms``), and a reply must be within both.
        """
        if not self._ratio:
            return [item]
        self._norms.append(norms)
        self._held.append(_Held(norms, item))
        if self._last is not None:
            return self._release(self._last, only_newest=True)
        if len(self._norms) < FEWEST_NORMS:
            return []
        usual = self._usual.of(self._norms)
        return self._release(usual, only_newest=len(self._norms) > FEWEST_NORMS)

    def _release(self, usual: Norms, *, only_newest: bool) -> list[ItemT]:
        first = len(self._held) - 1 if only_newest else 0
        kept, asked = self._held[:first], self._held[first:]
        used = [held for held in asked if excess(held.norms, usual, self._ratio) is None]
        self._held = kept + [held for held in asked if held not in used]
        return [held.item for held in used]

    def finish(self) -> tuple[list[ItemT], list[tuple[ItemT, str]]]:
        """End the round: of what was held back, what may be used, and what is dropped, and why.

        With fewer than three replies nothing is dropped, and the next round is measured by the
        round before this one.
        """
        norms, held = self._norms, self._held
        self._norms, self._held = [], []
        if not self._ratio or len(norms) < FEWEST_NORMS:
            return [one.item for one in held], []
        self._last = self._usual.finish(norms)
        used: list[ItemT] = []
        dropped: list[tuple[ItemT, str]] = []
        for one in held:
            why = excess(one.norms, self._last, self._ratio)
            if why is None:
                used.append(one.item)
            else:
                dropped.append((one.item, why))
        return used, dropped


def num_trimmed(num_replies: int, trim: float) -> int:
    """How many values are cut off at each end: ``trim`` of them, rounded up."""
    # 0.1 * 30 is a little more than 3 in floating point.
    return math.ceil(trim * num_replies - 1e-9)


def can_trim(num_replies: int, trim: float) -> bool:
    """Whether a value is left when ``num_trimmed`` are cut off at each end."""
    return num_replies > 2 * num_trimmed(num_replies, trim)


def trimmed_mean(replies: Sequence[Tensor], trim: float) -> Tensor:
    """Coordinate-wise trimmed mean (Definition 2 of arXiv:1803.01498).

    In each coordinate the largest and the smallest values are left out, ``num_trimmed`` of each,
    and the others are averaged, all alike: a sender that claims many images gets no more weight.

    Args:
        replies: n vectors, (numel,), float32; all of them stay in memory.
        trim: share to cut off at each end, in [0, 0.5); the paper's beta.

    Returns:
        (numel,), float32.

    Raises:
        ValueError: nothing would be left (``can_trim``).
    """
    num, cut = len(replies), num_trimmed(len(replies), trim)
    if not can_trim(num, trim):
        raise ValueError(f"{num} replies without {cut} at each end leave nothing to average")
    result = torch.empty_like(replies[0])
    parts = zip(*(torch.split(vector, _CHUNK) for vector in (result, *replies)), strict=True)
    for place, *values in parts:
        # mean_j of x_(cut+1), ..., x_(n-cut), the values in their order
        ordered = torch.stack(values).sort(dim=0).values
        place.copy_(ordered[cut : num - cut].mean(dim=0))
    return result
