"""Float activations: bit for bit what linear() gives on the dequantized weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import linear, lowbit_linear, pack_linear, pack_lowbit
from effinfer.ops.linear import EPILOGUES
from effinfer.ops.lowbit_weight import FORMATS, SCALE_DTYPES
from tests.conftest import CPU_ISAS, DTYPES
from tests.ops.test_lowbit_linear import random_weight

# Around the blocks of 256 terms, the units of 4 to 48, and one panel or many.
SHAPES = [(1, 1), (16, 47), (17, 256), (70, 530)]
ROWS = [1, 2, 3, 6, 7, 13]


@pytest.fixture
def cpu(device, request):
    """Backends that promise linear()'s bits: the CPU's instruction sets."""
    if request.node.callspec.params["device"] not in CPU_ISAS:
        pytest.skip("a GPU sums in another order")
    return device


def group_for(format, k):
    return max(k, 1) if format == "ternary_dense" else 32 if format in ("int3", "binary") else 48


def check(x, weight, bias=None, *, gate=None, epilogue="none", residual=None):
    packed = pack_lowbit(weight, gate_weight=gate)
    dense = pack_linear(
        weight.dequantize(), gate_weight=None if gate is None else gate.dequantize()
    )
    got = lowbit_linear(x, packed, bias, activations="f32", epilogue=epilogue, residual=residual)
    want = linear(x, dense, weight.out_features, bias, epilogue=epilogue, residual=residual)
    assert got.dtype == x.dtype
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("grouped", [False, True])
def test_equals_linear(cpu, format, dtype, grouped):
    for n, k in SHAPES:
        group = group_for(format, k) if grouped else None
        for zero, offset in [(False, False), (True, False), (False, True), (True, True)]:
            weight = random_weight(format, n, k, group, zero=zero, offset=offset, dtype=dtype)
            for rows in (1, 4, 9):
                check(torch.randn(rows, k), weight)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [*ROWS, 40, 97])
def test_any_number_of_rows(cpu, format, rows):
    weight = random_weight(format, 35, 530, dtype=torch.float16)
    check(torch.randn(rows, 530), weight)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_and_activation_dtypes(cpu, format, dtype, epilogue):
    n, k = 40, 300
    weight, gate = (random_weight(format, n, k, dtype=torch.float16) for _ in range(2))
    two = epilogue.endswith("_mul")
    bias = torch.randn((2, n) if two else (n,))
    for rows in (1, 2, 9):
        x, residual = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
        gated = gate if two else None
        check(x, weight, bias, gate=gated, epilogue=epilogue, residual=residual)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(FORMATS)), st.integers(1, 20), st.integers(1, 150), st.integers(1, 900),
    st.integers(0, 8), st.booleans(), st.booleans(), st.sampled_from(SCALE_DTYPES),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_grouping(format, rows, n, k, groups, zero, offset, dtype, seed):
    torch.manual_seed(seed)
    group = FORMATS[format].group_step * groups or None
    weight = random_weight(format, n, k, group, zero=zero, offset=offset, dtype=dtype)
    check(torch.randn(rows, k), weight)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_scales_of_any_size(cpu, format, dtype):
    """Subnormal, tiny, huge and non-finite scales: products that round, underflow and overflow."""
    n, k = 64, 96
    info = torch.finfo(dtype)
    sizes = [info.tiny * info.eps * 3, info.tiny, 2.0**-110, 1.0, info.max, float("inf")]
    for special in [*(s for s in sizes if s <= info.max or s == float("inf")), float("nan")]:
        for zero in (False, True):
            weight = random_weight(format, n, k, group_for(format, k), zero=zero, dtype=dtype)
            weight.scale[1::3] = torch.tensor(special, dtype=torch.float64).to(dtype)
            for rows in (1, 8):
                check(torch.randn(rows, k), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_values_past_k_are_never_multiplied(cpu, format):
    weight = random_weight(format, 33, 70, dtype=torch.float16)
    for rows in (1, 2, 8):
        padded = torch.full((rows + 2, 90), float("nan"))
        padded[1:-1, 8:78] = torch.randn(rows, 70)
        packed = pack_lowbit(weight)
        assert torch.isfinite(lowbit_linear(padded[1:-1, 8:78], packed, activations="f32")).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_threads_do_not_change_a_bit(cpu, format, rows):
    weight = pack_lowbit(random_weight(format, 300, 260, dtype=torch.bfloat16))
    x = torch.randn(rows, 260)
    several = lowbit_linear(x, weight, activations="f32")
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(lowbit_linear(x, weight, activations="f32"), several)
    finally:
        effinfer.set_num_threads(0)
    alone = lowbit_linear(x[-1:], weight, activations="f32")
    assert torch.equal(alone, several[-1:])
