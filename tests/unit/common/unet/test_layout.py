"""The flat weight vector and its manifest."""

from __future__ import annotations

import pytest
import torch

from fedphd.common.errors import FedPhDError
from fedphd.common.unet.layout import TensorLayout

LAYOUT = TensorLayout(("a", "b"), ((2, 2), (3,)))


def state() -> dict[str, torch.Tensor]:
    return {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0, 6.0, 7.0])}


def test_layout_of_a_state() -> None:
    assert TensorLayout.of(state()) == LAYOUT
    assert LAYOUT.numel == 7


def test_a_state_of_another_dtype_is_refused() -> None:
    with pytest.raises(FedPhDError, match=r"tensor b is torch.float16; .*float32"):
        TensorLayout.of({**state(), "b": torch.zeros(3, dtype=torch.float16)})


def test_pack_joins_in_order_and_copies() -> None:
    tensors = state()
    flat = LAYOUT.pack(tensors)
    assert flat.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert flat.dtype == torch.float32
    assert flat.is_contiguous()
    tensors["a"].zero_()
    assert flat[0] == 1


def test_pack_reads_a_transposed_tensor_by_rows() -> None:
    flat = LAYOUT.pack({"a": torch.tensor([[1.0, 3.0], [2.0, 4.0]]).T, "b": torch.zeros(3)})
    assert flat[:4].tolist() == [1, 2, 3, 4]


def test_pack_refuses_another_state() -> None:
    with pytest.raises(FedPhDError, match="tensor b is missing"):
        LAYOUT.pack({"a": torch.zeros(2, 2)})


def test_unpack_gives_views() -> None:
    flat = torch.arange(1.0, 8.0)
    views = LAYOUT.unpack(flat)
    assert {name: view.tolist() for name, view in views.items()} == {
        "a": [[1, 2], [3, 4]],
        "b": [5, 6, 7],
    }
    views["b"][0] = 50
    assert flat[4] == 50


@pytest.mark.parametrize("shape", [(6,), (8,), (7, 1)])
def test_unpack_refuses_another_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(FedPhDError, match=r"expected \(7,\)"):
        LAYOUT.unpack(torch.zeros(shape))


@pytest.mark.parametrize(
    ("names", "shapes", "message"),
    [
        (("a",), ((2, 2),), r"tensor b is missing; expected shape \(3,\)"),
        (("a", "b"), ((2, 2), (4,)), r"tensor b has shape \(4,\); expected \(3,\)"),
        (("a", "b"), ((4,), (3,)), r"tensor a has shape \(4,\); expected \(2, 2\)"),
        (("a", "b", "c"), ((2, 2), (3,), ()), "tensor c is unexpected"),
        (("b", "a"), ((3,), (2, 2)), "another order"),
    ],
)
def test_mismatch_names_the_first_tensor(
    names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], message: str
) -> None:
    problem = LAYOUT.mismatch(TensorLayout(names, shapes))
    assert problem is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


def test_no_mismatch_with_itself() -> None:
    assert LAYOUT.mismatch(TensorLayout.of(state())) is None


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, float("nan"), "tensor a holds nan"),
        (3, float("inf"), "tensor a holds inf"),
        (4, float("-inf"), "tensor b holds -inf"),
        (6, float("nan"), "tensor b holds nan"),
    ],
)
def test_first_non_finite_value_is_named(position: int, value: float, message: str) -> None:
    flat = torch.ones(7)
    flat[position] = value
    assert LAYOUT.first_non_finite(flat) == message


def test_opposite_infinities_are_found_and_a_mere_overflow_of_the_sum_is_none() -> None:
    flat = torch.ones(7)
    flat[1], flat[5] = float("inf"), float("-inf")
    assert LAYOUT.first_non_finite(flat) == "tensor a holds inf"
    assert LAYOUT.first_non_finite(torch.full((7,), 3e38)) is None


def test_json_round_trip() -> None:
    assert LAYOUT.to_json() == '[["a",[2,2]],["b",[3]]]'
    assert TensorLayout.from_json(LAYOUT.to_json()) == LAYOUT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[["a"]]',
        '[["a", 2]]',
        "[[1, [2]]]",
        '[["a", [-1]]]',
        '[["a", [2.0]]]',
        '[["a", [true]]]',
        '[["a", [2]], ["a", [2]]]',
        "[" * 100_000,
    ],
)
def test_malformed_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        TensorLayout.from_json(text)
