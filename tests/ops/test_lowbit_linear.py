from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer import _native
from effinfer.ops import (
    LowBitWeight,
    linear,
    lowbit_linear,
    pack_linear,
    pack_lowbit,
)
from effinfer.ops.linear import EPILOGUES
from effinfer.ops.lowbit_linear import quantize_rows
from effinfer.ops.lowbit_weight import FORMATS, SCALE_DTYPES
from tests.conftest import CPU_ISAS, DTYPES, assert_close

ROWS = [1, 2, 3, 4, 5, 7, 8, 13, 16, 33, 97]
SHAPES = [(1, 1), (16, 48), (17, 100), (40, 257), (100, 300)]


def random_weight(format, n, k, group=None, *, zero=False, offset=False, dtype=torch.float32):
    layout = FORMATS[format]
    group = group or max(k, 1)
    shape = (n, -(-k // group))
    codes = torch.randint(0, layout.max_code + 1, (n, k), dtype=torch.uint8)
    zeros = torch.randint(0, layout.max_code + 1, shape, dtype=torch.uint8)
    return LowBitWeight(
        format, codes, (torch.randn(shape) * max(k, 1) ** -0.5).to(dtype), group,
        zeros if zero and layout.step == 1 else None,
        (torch.randn(shape) * max(k, 1) ** -0.5).to(dtype) if offset else None,
    )  # fmt: skip


def on(packed, device):
    parts = ("packed", "scale", "zero", "offset", "order")
    moved = {p: getattr(packed, p).to(device) for p in parts if getattr(packed, p) is not None}
    return replace(packed, **moved)


def flat(packed):
    return packed.packed, packed.scale, packed.zero, packed.offset, packed.order


def float64(x, packed, bias=None, *, activations="int8", epilogue="none", residual=None):
    """The reference in float64 on the same codes."""
    return lowbit_linear.reference(
        x.double(), *flat(packed), bias, None if residual is None else residual.double(), None,
        None, packed.format, packed.out_features, packed.in_features, packed.group_size,
        activations, epilogue, 0, 0,
    )  # fmt: skip


def by_scalar(x, packed, *args, **kwargs):
    """The same call by the scalar kernels."""
    cpu = _native.module("_C")
    before = cpu.isa()
    cpu.set_isa("scalar")
    try:
        return lowbit_linear(x.cpu(), on(packed, "cpu"), *args, **kwargs)
    finally:
        cpu.set_isa(before if before in CPU_ISAS else "")


def rounding_bound(x, weight):
    """How far float32 may be off: an ulp of the largest partial sum there can be for each term, a
    scaled sum or an offset, for its conversion and for the row's scale."""
    codes, x_scale = quantize_rows(x)
    columns = torch.arange(weight.in_features) // weight.group_size
    in_group = F.one_hot(columns, weight.scale.shape[1]).double()  # (K, G)
    sums = torch.einsum("rk,nk,kg->rng", codes.double(), weight.values().double(), in_group)
    terms = (weight.scale.double() * sums).abs().sum(-1)
    if weight.offset is not None:
        terms += (codes.double() @ in_group).abs() @ weight.offset.double().abs().t()
    roundings = 2 * weight.scale.shape[1] + 2
    return roundings * 2**-24 * terms * x_scale.double()[:, None]


def group_sizes(format, k):
    step = FORMATS[format].group_step
    return [g for g in (16, 32, 64, 128) if step and g % step == 0 and g < k] + [k]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_int8_activations_are_exact(device, format, shape):
    """Float64 but for rounding, and the bits of the scalar kernels, whatever the rows and groups."""
    for group in group_sizes(format, shape[1]):
        for zero, offset in [(False, False), (True, False), (True, True), (False, True)]:
            weight = random_weight(format, *shape, group, zero=zero, offset=offset)
            packed = pack_lowbit(weight)
            x = torch.randn(33, shape[1])
            got = lowbit_linear(x.to(device), on(packed, device))
            off = (got.cpu().double() - float64(x, packed)).abs()
            assert (off <= rounding_bound(x, weight)).all()
            assert torch.equal(got.cpu(), by_scalar(x, packed))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_and_threads_do_not_change_a_bit(device, format, rows):
    group = 64 if FORMATS[format].group_step else 416
    packed = on(pack_lowbit(random_weight(format, 150, 416, group, zero=True)), device)
    x = torch.randn(rows, 416, device=device)
    together = lowbit_linear(x, packed)
    assert torch.equal(together.cpu(), by_scalar(x, packed))
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(lowbit_linear(x, packed), together)
    finally:
        effinfer.set_num_threads(0)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(lowbit_linear(x[row : row + 1], packed)[0], together[row])


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_dtypes(device, format, dtype, scale_dtype):
    group = 32 if FORMATS[format].group_step else 160
    weight = random_weight(format, 40, 160, group, zero=True, offset=True, dtype=scale_dtype)
    packed = pack_lowbit(weight)
    x, residual = torch.randn(6, 160).to(dtype), torch.randn(6, 40).to(dtype)
    got = lowbit_linear(x.to(device), on(packed, device), residual=residual.to(device))
    assert got.dtype == dtype
    assert_close(got, float64(x, packed, residual=residual))
    assert torch.equal(got.cpu(), by_scalar(x, packed, residual=residual))


@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("format", FORMATS)
def test_epilogues(device, format, epilogue, activations):
    gated = epilogue.endswith("_mul")
    weights = [random_weight(format, 50, 96) for _ in range(1 + gated)]
    packed = pack_lowbit(weights[-1], gate_weight=weights[0] if gated else None)
    bias = torch.randn((2, 50) if gated else (50,))
    for rows in (1, 3, 9):
        x, residual = torch.randn(rows, 96), torch.randn(rows, 50)
        got = lowbit_linear(
            x.to(device), on(packed, device), bias.to(device), activations=activations,
            epilogue=epilogue, residual=residual.to(device),
        )  # fmt: skip
        kind = {"activations": activations, "epilogue": epilogue}
        assert_close(got, float64(x, packed, bias, residual=residual, **kind))


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 25, 100])
@pytest.mark.parametrize("format", FORMATS)
def test_float_activations_are_linear_on_the_dequantized_weight(device, format, rows):
    for n, k, group in [(40, 257, 257), (33, 640, 128 if FORMATS[format].group_step else 640)]:
        weight = random_weight(format, n, k, group, zero=True, offset=True, dtype=torch.float16)
        bias = torch.randn(n, device=device)
        plain = pack_linear(weight.dequantize().to(device))
        for dtype in DTYPES:
            x = torch.randn(rows, k, device=device).to(dtype)
            got = lowbit_linear(x, on(pack_lowbit(weight), device), bias, activations="f32")
            want = linear(x, plain, n, bias)
            on_gpu = _native.native(x) is not _native.module("_C")
            if on_gpu and dtype is not torch.float32:  # tensor cores: another order of summing
                assert_close(got, want.double())
            else:
                assert torch.equal(got, want)


@pytest.mark.parametrize("k", [4096, 65536])
@pytest.mark.parametrize("format", FORMATS)
def test_largest_sums_do_not_wrap(device, format, k):
    """Codes, zero points and activations at their extremes, of either sign."""
    layout = FORMATS[format]
    for code, zero in [(layout.max_code, 0), (0, layout.max_code), (layout.max_code, None)]:
        weight = LowBitWeight(
            format,
            torch.full((17, k), code, dtype=torch.uint8),
            torch.ones(17, 1),
            k,
            None
            if zero is None or layout.step != 1
            else torch.full((17, 1), zero, dtype=torch.uint8),
        )
        value = int(weight.values()[0, 0])
        packed = on(pack_lowbit(weight), device)
        for rows in (1, 5):
            codes = torch.full((rows, k), 127, dtype=torch.int8, device=device)
            codes[1:] = -127
            got = lowbit_linear(codes, packed, x_scale=torch.ones(rows, device=device))
            want = torch.full((rows, 17), float(value * 127 * k))
            want[1:] *= -1
            assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("value", [0.0, 1e-42, 3e-37, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("rows", [1, 6])
def test_rows_of_any_value(device, value, rows):
    """NaN and infinity give NaN, rows too small to scale give 0; other rows are untouched."""
    packed = pack_lowbit(random_weight("int4", 40, 320, 64))
    x = torch.randn(rows, 320)
    clean = lowbit_linear(x.to(device), on(packed, device))
    x[-1] = value if math.isfinite(value) else x[-1]
    x[-1, 7] = value
    got = lowbit_linear(x.to(device), on(packed, device))
    assert torch.equal(got[:-1], clean[:-1])
    if not math.isfinite(value):
        assert got[-1].isnan().all()
    elif value < 1e-37:
        assert (got[-1] == 0).all()
    assert torch.equal(got.cpu().nan_to_num(7), by_scalar(x, packed).nan_to_num(7))
    assert_close(got[:, :].cpu().nan_to_num(0), float64(x, packed).nan_to_num(0))


def test_codes_never_reach_minus_128():
    x = torch.randn(64, 1000) * torch.logspace(-30, 30, 64)[:, None]
    codes, scale = quantize_rows(x)
    assert codes.min() == -127 or codes.max() == 127
    assert codes.min() >= -127
    assert ((codes.double() * scale.double()[:, None] - x).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_prefixes_are_views(device, format, activations):
    group = 96 if FORMATS[format].group_step else 480
    weight = random_weight(format, 100, 480, group, zero=True, offset=True)
    packed = on(pack_lowbit(weight), device)
    for n, k in [(48, 480), (100, 288), (16, 96)]:
        if k < 480 and group == 480:
            smaller = random_weight(format, 100, k)
            smaller = replace(
                smaller, codes=weight.codes[:, :k], scale=weight.scale, group_size=480,
                zero=weight.zero, offset=weight.offset,
            )  # fmt: skip
        else:
            kept = slice(None, -(-k // group))
            smaller = replace(
                weight, codes=weight.codes[:, :k], scale=weight.scale[:, kept],
                zero=None if weight.zero is None else weight.zero[:, kept],
                offset=weight.offset[:, kept],
            )  # fmt: skip
        part = packed.prefix(n, k)
        assert part.packed.data_ptr() == packed.packed.data_ptr()
        for rows in (1, 6):
            x = torch.randn(rows, k, device=device)
            whole = lowbit_linear(x, on(pack_lowbit(smaller), device), activations=activations)
            assert torch.equal(lowbit_linear(x, part, activations=activations), whole[:, :n])


@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_act_order_gathers_x(device, activations):
    weight = random_weight("int4", 20, 64, 16)
    order = torch.randperm(64)
    ordered = replace(weight, order=order)
    x = torch.randn(3, 64)
    got = lowbit_linear(x.to(device), on(pack_lowbit(ordered), device), activations=activations)
    want = lowbit_linear(
        x[:, order].to(device), on(pack_lowbit(weight), device), activations=activations
    )
    assert torch.equal(got, want)
    assert_close(got, float64(x, pack_lowbit(ordered), activations=activations))


@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_strides(device, activations):
    packed = on(pack_lowbit(random_weight("int3", 50, 96, 32)), device)
    wide = torch.full((6, 140), math.nan, device=device)
    wide[:, 10:106] = torch.randn(6, 96, device=device)
    residual = torch.randn(6, 80, device=device)[:, 3:53]
    x = wide[:, 10:106]
    got = lowbit_linear(x, packed, activations=activations, residual=residual)
    want = lowbit_linear(x.contiguous(), packed, activations=activations, residual=residual.clone())
    assert torch.equal(got, want)
    across = torch.randn(96, 6, device=device).t()
    assert torch.equal(
        lowbit_linear(across, packed, activations=activations),
        lowbit_linear(across.contiguous(), packed, activations=activations),
    )
    batched = torch.randn(2, 3, 96, device=device)
    flat_rows = lowbit_linear(batched.view(6, 96), packed, activations=activations)
    got = lowbit_linear(batched, packed, activations=activations)
    assert torch.equal(got, flat_rows.view(2, 3, 50))
    assert lowbit_linear(x[0], packed, activations=activations).shape == (50,)


@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_empty(device, activations):
    packed = on(pack_lowbit(random_weight("int2", 20, 16)), device)
    empty = lowbit_linear(torch.randn(0, 16, device=device), packed, activations=activations)
    assert empty.shape == (0, 20)
    none = on(pack_lowbit(random_weight("int2", 0, 16)), device)
    assert lowbit_linear(torch.randn(3, 16, device=device), none).shape == (3, 0)
    bias = torch.randn(20, device=device)
    no_k = on(pack_lowbit(random_weight("int2", 20, 0)), device)
    for rows in (1, 8):
        x = torch.randn(rows, 0, device=device)
        got = lowbit_linear(x, no_k, bias, activations=activations)
        assert torch.equal(got, bias.expand(rows, 20))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(FORMATS)), st.integers(1, 40), st.integers(1, 120), st.integers(1, 700),
    st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_any_problem(format, rows, n, k, group, zero, offset, seed):
    torch.manual_seed(seed)
    sizes = group_sizes(format, k)
    weight = random_weight(format, n, k, sizes[group % len(sizes)], zero=zero, offset=offset)
    packed = pack_lowbit(weight)
    x = torch.randn(rows, k)
    got = lowbit_linear(x, packed)
    off = (got.double() - float64(x, packed)).abs()
    assert (off <= rounding_bound(x, weight)).all()
    assert torch.equal(got, by_scalar(x, packed))
    order = torch.randperm(rows)
    assert torch.equal(lowbit_linear(x[order], packed), got[order])
    assert torch.equal(lowbit_linear(x[:1], packed), got[:1])


def test_errors_name_the_argument(device):
    x = torch.randn(2, 64, device=device)
    packed = on(pack_lowbit(random_weight("int4", 20, 64, 16)), device)
    with pytest.raises(ValueError, match=r"lowbit_linear: packed must have shape \(3, 8, 64\)"):
        lowbit_linear(x, replace(packed, out_features=40))
    with pytest.raises(ValueError, match=r"lowbit_linear: x must have any number of rows of 64"):
        lowbit_linear(x[:, :63], packed)
    with pytest.raises(ValueError, match=r"lowbit_linear: scale must have shape \(2, 2, 16\)"):
        lowbit_linear(x, replace(packed, group_size=32))
    with pytest.raises(ValueError, match="lowbit_linear: group_size must be a multiple of 16 or"):
        lowbit_linear(x, replace(packed, group_size=20))
    with pytest.raises(TypeError, match="lowbit_linear: packed must be uint8"):
        lowbit_linear(x, replace(packed, packed=packed.packed.view(torch.int8)))
    with pytest.raises(TypeError, match="lowbit_linear: scale must be float32"):
        lowbit_linear(x, replace(packed, scale=packed.scale.double()))
    spread = packed.packed.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="lowbit_linear: packed must have contiguous panels"):
        lowbit_linear(x, replace(packed, packed=spread))
    with pytest.raises(ValueError, match="lowbit_linear: format must be one of int8, int4"):
        lowbit_linear(x, replace(packed, format="int5"))
    with pytest.raises(ValueError, match="lowbit_linear: activations must be one of int8, f32"):
        lowbit_linear(x, packed, activations="int4")
    with pytest.raises(ValueError, match="lowbit_linear: epilogue must be one of none, silu"):
        lowbit_linear(x, packed, epilogue="relu")
    with pytest.raises(ValueError, match=r"lowbit_linear: bias must have shape \(20,\)"):
        lowbit_linear(x, packed, torch.randn(3, device=device))
    with pytest.raises(ValueError, match=r"lowbit_linear: residual must have shape \(2, 20\)"):
        lowbit_linear(x, packed, residual=torch.randn(2, 8, device=device))
    with pytest.raises(TypeError, match="lowbit_linear: x must be float32"):
        lowbit_linear(x.double(), packed)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        lowbit_linear(x.clone().requires_grad_(), packed)
    weight = random_weight("int4", 20, 64, 16)
    with pytest.raises(ValueError, match="pack_lowbit: gate_weight must match weight"):
        pack_lowbit(weight, gate_weight=random_weight("int2", 20, 64, 16))


def test_registration():
    packed = pack_lowbit(random_weight("int4", 20, 64, 16, zero=True, offset=True))
    x, bias = torch.randn(3, 64), torch.randn(20)
    args = (
        x, packed.packed, packed.scale, packed.zero, packed.offset, torch.randperm(64), bias,
        torch.randn(3, 20), None, None, "int4", 20, 64, 16, "int8", "silu", 0, 0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.effinfer.lowbit_linear.default, args)
    compiled = torch.compile(
        lambda t: lowbit_linear(t, packed, bias, epilogue="gelu") + 1,
        fullgraph=True,
        backend="eager",
    )
    assert torch.equal(compiled(x), lowbit_linear(x, packed, bias, epilogue="gelu") + 1)


def test_reference_mode_and_isa():
    packed = pack_lowbit(random_weight("int2", 20, 64, 32))
    x = torch.randn(3, 64)
    with effinfer.use_reference():
        assert_close(lowbit_linear(x, packed), float64(x, packed))
    assert lowbit_linear.isa() in (
        "scalar", "avx2", "avx512", "avx512vnni", "neon", "dotprod", "i8mm"
    )  # fmt: skip
