"""The clients of all edges, as the cloud knows them: how many there are, and how large."""

from collections.abc import Iterable
from statistics import median_low
from typing import Final

from fedphd.common.robust import MOST_IMAGES
from fedphd.common.wire.roster import Roster

# More names than a federation has: an edge that invents them does not fill the memory.
MOST_NAMES: Final = 100_000


class Census:
    """What the edges say of their clients, in so far as one of them cannot say anything.

    Args:
        roster: of the edges.
        most_samples: ``schedule.max_client_samples``.
        trained: names of the clients that trained before this process.
    """

    def __init__(self, roster: Roster, *, most_samples: int, trained: Iterable[str] = ()) -> None:
        self._roster = roster
        self._most_samples = most_samples
        self._trained = set(trained)

    def note_trained(self, names: Iterable[str]) -> None:
        """Remember who has trained, also after it is gone."""
        remember(self._trained, names)

    @property
    def num_clients(self) -> int:
        """Clients that an edge sees or that have trained."""
        return len(self._trained | self._known().keys())

    @property
    def most_images(self) -> float:
        """Images of a client beyond which an edge's claims count no more.

        So many times those of a usual one, which is a median over the edges of each one's own: an
        edge that lists countless clients is one among them.
        """
        edges = self._roster.everyone.values()
        own = [median_low(edge.clients.values()) for edge in edges if edge.clients]
        usual = median_low(own) if own else self._most_samples
        return float(min(MOST_IMAGES * usual, self._most_samples))

    @property
    def mean_images(self) -> float:
        """Images per client, of which each counts ``most_images`` at most; 0 without clients."""
        most = self.most_images
        counted = [min(images, most) for images in self._known().values()]
        return sum(counted) / len(counted) if counted else 0.0

    def _known(self) -> dict[str, int]:
        """Images of each client that an edge sees."""
        edges = self._roster.everyone.values()
        return {name: images for edge in edges for name, images in edge.clients.items()}


def remember(names: set[str], more: Iterable[str]) -> None:
    """Add names, as long as there are not more than any federation has."""
    for name in more:
        if len(names) >= MOST_NAMES:
            return
        names.add(name)
