"""Codecs: few bytes a value, by hand, and what may come in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedphd.common.errors import ReplyError
from fedphd.common.unet.layout import TensorLayout
from fedphd.common.wire.codecs import BLOCK, Codec, CodecName

NAMES: tuple[CodecName, ...] = ("fp32", "bf16", "int8", "int4")


def layout(*shapes: tuple[int, ...]) -> TensorLayout:
    return TensorLayout(tuple(f"t{n}" for n in range(len(shapes))), shapes)


def there_and_back(name: CodecName, values: torch.Tensor, *shapes: tuple[int, ...]) -> torch.Tensor:
    codec = Codec(name, layout(*shapes))
    return codec.decode(codec.encode(values))


def test_fp32_is_exact() -> None:
    values = torch.randn(1000)
    assert torch.equal(there_and_back("fp32", values, (10, 100)), values)
    assert Codec("fp32", layout((10, 100))).is_exact


def test_bf16_keeps_the_upper_half() -> None:
    # 1 + 2**-8 lies between two values of 8 bits; it goes to the even one.
    values = torch.tensor([1.0, 1 + 2**-7, 1 + 2**-8, -3e38])
    expected = [1.0, 1 + 2**-7, 1.0, -3.0042e38]
    assert there_and_back("bf16", values, (4, 1)).tolist() == pytest.approx(expected, rel=1e-4)


def test_int8_by_hand() -> None:
    # The step is 2.54 / 127 = 0.02: 0.05 is two steps and a half, and goes to the even number.
    values = torch.tensor([2.54, -2.54, 0.03, 0.0, 1.0, 0.009])
    expected = [2.54, -2.54, 0.04, 0.0, 1.0, 0.0]
    assert there_and_back("int8", values, (2, 3)).tolist() == pytest.approx(expected, abs=0.011)
    encoded = Codec("int8", layout((2, 3))).encode(values)
    assert encoded[:4].view(torch.float32).item() == pytest.approx(0.02)
    assert encoded[4:].view(torch.int8).tolist()[:2] == [127, -127]
    assert len(encoded) == 4 + 6


def test_int4_by_hand() -> None:
    # A step of 0.5; pairs share a byte, the first in its lower half, 8 being zero.
    values = torch.tensor([3.5, -3.5, 1.0])
    encoded = Codec("int4", layout((3, 1))).encode(values)
    assert encoded[:4].view(torch.float32).item() == 0.5
    assert encoded[4:].tolist() == [(7 + 8) | (-7 + 8) << 4, (2 + 8) | 8 << 4]
    assert there_and_back("int4", values, (3, 1)).tolist() == [3.5, -3.5, 1.0]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_block_does_not_suffer_from_the_next_one_nor_a_tensor_from_another(
    name: CodecName,
) -> None:
    small = torch.linspace(-1e-3, 1e-3, BLOCK)
    large = torch.full((BLOCK,), 1000.0)
    bias = torch.tensor([1e-7, 5.0])
    got = there_and_back(name, torch.cat([small, large, small, bias]), (2, BLOCK), (1, BLOCK), (2,))
    half_a_step = 0.5e-3 / {"int8": 127, "int4": 7}[name]
    for begin in (0, 2 * BLOCK):
        assert (got[begin : begin + BLOCK] - small).abs().max() <= half_a_step * 1.001
    assert torch.equal(got[BLOCK : 2 * BLOCK], large)
    assert torch.equal(got[-2:], bias), "biases and norms stay as they are"


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_all_shapes_come_back_close(name: CodecName) -> None:
    shapes = [(3,), (7, 1), (64, 32, 3, 3), (1, 1), (300, 2000), (255, 1), (257, 1), (0, 4)]
    there = layout(*shapes)
    values = torch.randn(there.numel, generator=torch.Generator().manual_seed(0))
    codec = Codec(name, there)
    encoded = codec.encode(values)
    assert (encoded.dtype, len(encoded)) == (torch.uint8, codec.num_bytes)
    error = (codec.decode(encoded) - values).abs().max().item()
    # Half a step of the largest value of 5; of bf16 half of the last of 8 bits.
    assert error <= {"fp32": 0, "bf16": 2**-6, "int8": 2.6 / 127, "int4": 2.6 / 7}[name]
    assert torch.equal(codec.encode(values), encoded)


@pytest.mark.parametrize("name", NAMES)
def test_a_difference_is_written_and_added_again(name: CodecName) -> None:
    # The second tensor is larger than what is worked on at a time.
    there = layout((5,), (300, 2000), (257, 1))
    generator = torch.Generator().manual_seed(0)
    values, base = torch.randn(2, there.numel, generator=generator)
    codec, whole = Codec(name, there), base.clone()
    encoded = codec.encode(values, base)
    assert torch.equal(encoded, codec.encode(values - base))
    assert torch.equal(codec.decode(encoded, base), codec.decode(encoded) + base)
    assert torch.equal(base, whole)


@pytest.mark.parametrize(("name", "most"), [("bf16", 0.51), ("int8", 0.26), ("int4", 0.14)])
def test_bytes_per_value(name: CodecName, most: float) -> None:
    there = layout((128, 128, 3, 3), (128,), (512, 128), (512,))
    assert Codec(name, there).num_bytes <= most * 4 * there.numel


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3.4e38])
def test_extreme_values_stay_finite(name: CodecName, value: float) -> None:
    got = there_and_back(name, torch.full((BLOCK,), value), (1, BLOCK))
    assert got.tolist() == pytest.approx([value] * BLOCK, rel=1e-5, abs=1e-36)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_become_finite(name: CodecName, value: float) -> None:
    values = torch.zeros(2 * BLOCK)
    values[3] = value
    assert not torch.isfinite(there_and_back(name, values, (2, BLOCK)).sum())


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_bytes_is_refused(name: CodecName) -> None:
    codec = Codec(name, layout((2, 300), (5,)))
    encoded = codec.encode(torch.zeros(605))
    for wrong in (encoded[:-1], torch.cat([encoded, encoded[:1]]), encoded[:0]):
        with pytest.raises(ReplyError, match=rf"change: 605 values take \d+ bytes as {name}; got"):
            codec.decode(wrong, what="change")


@given(data=st.binary(min_size=92, max_size=92), name=st.sampled_from(["int8", "int4", "bf16"]))
def test_any_bytes_of_the_right_number_can_be_read(data: bytes, name: CodecName) -> None:
    sizes: dict[str, tuple[int, ...]] = {"int8": (1, 88), "int4": (1, 176), "bf16": (1, 46)}
    codec = Codec(name, layout(sizes[name]))
    decoded = codec.decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert decoded.shape == (codec.layout.numel,)
