"""Seeds that mean the same everywhere, and the round's participants."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fedphd.common.rng import derive_seed, generator, numpy_generator, sample_participants

SEED = 8386639004560864619
IDS = [f"client-{i}" for i in range(200)]


def sample(ids: list[str], fraction: float, edge_round: int = 1) -> list[str]:
    return sample_participants(ids, fraction=fraction, seed=3, interval=2, edge_round=edge_round)


def test_seed_is_stable() -> None:
    # int(sha256(b'["train", 7]').hexdigest()[:16], 16) >> 1
    assert derive_seed("train", 7) == SEED
    code = "from fedphd.common.rng import derive_seed; print(derive_seed('train', 7))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == SEED


def test_parts_are_not_confused() -> None:
    parts: list[tuple[int | str, ...]] = [
        (), (1,), ("1",), (1, 2), (12,), ("1", "2"), ("12",), ("1,2",), ('1", "2',), (-1,),
        ("a", "b"), ("b", "a"), ("ab", ""), ("", "ab"), ("é",), (2**80,),
    ]  # fmt: skip
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(np.int64(5)) == derive_seed(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        derive_seed(1.5)  # type: ignore[arg-type]


def test_generators_repeat_and_leave_the_global_ones_alone() -> None:
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1]
    first = torch.rand(4, generator=generator("a", 1))
    assert torch.equal(first, torch.rand(4, generator=generator("a", 1)))
    assert not torch.equal(first, torch.rand(4, generator=generator("a", 2)))
    assert numpy_generator("a", 1).random() == numpy_generator("a", 1).random()
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])


@pytest.mark.parametrize(
    ("num", "fraction", "size"),
    [(10, 1.0, 10), (10, 0.35, 4), (10, 0.34, 3), (50, 0.29, 15), (3, 0.01, 1), (1, 0.5, 1)],
)
def test_sample_size_rounds_halves_up(num: int, fraction: float, size: int) -> None:
    chosen = sample(IDS[:num], fraction)
    assert len(chosen) == len(set(chosen)) == size
    assert set(chosen) <= set(IDS[:num])


def test_sample_does_not_depend_on_order_or_repeats() -> None:
    assert sample(IDS[:20], 0.5) == sample([*reversed(IDS[:20]), *IDS[:5]], 0.5)
    assert sample([], 0.5) == []
    with pytest.raises(ValueError, match=r"fraction = 0 is not in \(0, 1\]"):
        sample(IDS, 0)


def test_samples_of_rounds_differ_and_are_fair() -> None:
    rounds = [sample(IDS[:40], 0.25, edge_round) for edge_round in range(1, 201)]
    assert rounds[0] != rounds[1]
    times = [sum(name in chosen for chosen in rounds) for name in IDS[:40]]
    # Expected 50 of 200, standard deviation 6.1.
    assert 25 < min(times) <= max(times) < 75


def test_edges_that_know_different_clients_nearly_agree() -> None:
    all_of_them, without_two = sample(IDS, 0.5), sample(IDS[2:], 0.5)
    assert len(set(all_of_them) ^ set(without_two)) <= 4
    common = set(all_of_them) & set(without_two)
    assert [n for n in all_of_them if n in common] == [n for n in without_two if n in common]
