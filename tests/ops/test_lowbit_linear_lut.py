"""Formats of under two bits with few int8 rows, whose sums kernels look up in tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effinfer.ops import LowBitWeight, lowbit_linear, pack_lowbit
from tests.ops.test_lowbit_linear import by_scalar, on, random_weight

FORMATS = ["binary", "ternary_dense"]
LARGEST_K = 65536  # of a group


def check(x, weight, *args, **kwargs):
    """The same bits as the definition's."""
    packed = pack_lowbit(weight)
    assert torch.equal(
        lowbit_linear(x, packed, *args, **kwargs), by_scalar(x, packed, *args, **kwargs)
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [1, 31, 47, 96, 241, 256, 300, 700])
def test_rows_and_tails_are_bit_identical_to_scalar(device, format, k):
    for n in (5, 16, 17, 70):  # panels by themselves, in pairs and fours
        for zero, offset in [(False, False), (True, True)]:
            weight = random_weight(format, n, k, zero=zero, offset=offset, dtype=torch.float16)
            packed = on(pack_lowbit(weight), device)
            for rows in (1, 2, 3, 4, 5, 8, 9):
                x = torch.randn(rows, k)
                got = lowbit_linear(x.to(device), packed)
                assert torch.equal(got.cpu(), by_scalar(x, packed))


@pytest.mark.parametrize("group", [32, 96, 288])
def test_groups_of_binary(device, group):
    weight = random_weight("binary", 70, 700, group, offset=True, dtype=torch.bfloat16)
    packed = on(pack_lowbit(weight), device)
    for rows in (1, 2, 4):
        x = torch.randn(rows, 700)
        assert torch.equal(lowbit_linear(x.to(device), packed).cpu(), by_scalar(x, packed))


def largest(format, signs):
    """Weights of +-1 as codes."""
    return torch.where(signs > 0, 1 if format == "binary" else 2, 0).to(torch.uint8)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [240, 256, 4096, LARGEST_K])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_sums_of_largest_values_do_not_wrap(device, format, k, rows):
    """Every product is 127 or -127: sums are as large as they get, and exact in float32."""
    x = torch.full((rows, k), 127.0)
    x[:, 1::2] *= -1 if rows == 2 else 1
    plus = torch.ones(k)
    either = torch.where(torch.rand(k) < 0.5, -1.0, 1.0)
    weights = torch.stack([plus, -plus, x[0].sign(), -x[0].sign(), either])
    weight = LowBitWeight(format, largest(format, weights), torch.ones(5, 1), k)
    got = lowbit_linear(x.to(device), on(pack_lowbit(weight), device))
    assert torch.equal(got.cpu().double(), x.double() @ weights.double().t())


@pytest.mark.parametrize("format", FORMATS)
def test_every_nibble_and_sign(device, format):
    """All triples of ternary values, all four binary ones, at each place of a unit."""
    digits = torch.arange(81)[:, None] // torch.tensor([27, 9, 3, 1]) % 3
    width = 3 if format == "ternary_dense" else 4
    nibbles = digits[:27, 1:] if width == 3 else torch.arange(16)[:, None] >> torch.arange(4) & 1
    codes = nibbles.repeat(1, 96 // width).to(torch.uint8)
    packed = on(pack_lowbit(LowBitWeight(format, codes, torch.ones(len(codes), 1), 96)), device)
    values = codes.double() - 1 if width == 3 else 2 * codes.double() - 1
    for i in range(96):
        x = torch.zeros(1, 96)
        x[0, i] = -127.0
        assert torch.equal(
            lowbit_linear(x.to(device), packed).cpu().double(), x.double() @ values.t()
        )


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FORMATS), st.integers(1, 9), st.integers(1, 200), st.integers(1, 900),
    st.integers(0, 9), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(format, rows, n, k, groups, offset, seed):
    torch.manual_seed(seed)
    group = 32 * groups or None if format == "binary" else None
    check(torch.randn(rows, k), random_weight(format, n, k, group, offset=offset))
