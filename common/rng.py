"""Randomness that can be repeated: every generator is built from what it is for.

The parts of a seed name the use, such as ``("train", run_seed, client_id, interval, round)``, so
no order of events changes a draw, and two uses have seeds of their own. They may share a stream of
torch by chance, about one pair in 80,000 uses: its generator on the CPU takes 32 bits of a seed.
The seeds are the same in every process and on every machine (unlike ``hash()``).
"""

import hashlib
import json
import math
import operator
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from SHA-256 of the parts' JSON text.

    JSON keeps lists apart that a plain join would mix up: ``(1,)`` and ``("1",)``, ``("a", "b")``
    and ``("ab",)``. Raises TypeError for a part that is neither an integer nor a string.
    """
    plain = [part if isinstance(part, str) else operator.index(part) for part in parts]
    digest = hashlib.sha256(json.dumps(plain).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> "torch.Generator":
    """A torch generator on the CPU, seeded by ``derive_seed(*parts)``."""
    # Some commands draw without it, and importing it takes seconds.
    import torch

    return torch.Generator().manual_seed(derive_seed(*parts))


def permutation(num: int, *parts: int | str) -> NDArray[np.int64]:
    """The numbers from 0 to ``num`` - 1 in a random order, (num,), by ``generator(*parts)``."""
    import torch

    order: NDArray[np.int64] = torch.randperm(num, generator=generator(*parts)).numpy()
    return order


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator, seeded by ``derive_seed(*parts)``."""
    return np.random.default_rng(derive_seed(*parts))


def sample_participants(
    client_ids: Iterable[str],
    *,
    fraction: float,
    seed: int,
    interval: int,
    edge_round: int,
    tries: int = 0,
) -> list[str]:
    """The clients that take part in an edge round, in the round's order.

    Every id is ranked by its own seed. So all edges get the same list, and where edges know
    slightly different sets of clients, their lists differ only slightly too. An interval that comes
    again after ``tries`` in vain draws others, where not all take part.

    Returns:
        ``fraction`` of the ids (repeats count once), halves rounded up, at least one; empty if
        there are none.

    Raises:
        ValueError: ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction} is not in (0, 1]")
    tries = tries if fraction < 1 else 0
    ranked = _ranked(frozenset(client_ids), seed, interval, edge_round, tries)
    # 0.29 * 50 is 14.499999999999998 in floating point, but stands for 14.5.
    return list(ranked[: max(1, math.floor(fraction * len(ranked) + 0.5 + 1e-9))])


# The virtual edges of a process ask for the same.
@lru_cache(maxsize=2)
def _ranked(
    names: frozenset[str], seed: int, interval: int, edge_round: int, tries: int
) -> tuple[str, ...]:
    again = (tries,) if tries else ()
    use: tuple[int | str, ...] = ("participants", seed, interval, edge_round, *again)
    return tuple(sorted(names, key=lambda name: (derive_seed(*use, name), name)))
