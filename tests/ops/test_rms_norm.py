from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import rms_norm
from tests.conftest import BOUNDS, DTYPES, assert_close

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (4, 97), (1, 768), (0, 16), (2, 0, 16), (5, 4099)]


def reference(x, weight, eps=1e-6, unit_offset=False):
    weight = None if weight is None else weight.double()
    return rms_norm.reference(x.double(), weight, eps, unit_offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device, dtype, shape):
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[-1], device=device)
    assert_close(rms_norm(x, weight), reference(x, weight))
    assert_close(rms_norm(x, weight, unit_offset=True), reference(x, weight, unit_offset=True))
    assert_close(rms_norm(x, eps=1e-2), reference(x, None, 1e-2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_residual(device, dtype, residual_dtype):
    x = torch.randn(3, 5, 70, device=device).to(dtype)
    residual = torch.randn(3, 5, 70, device=device).to(residual_dtype)
    weight = torch.randn(70, device=device)
    total = x.double() + residual.double()
    y, r = rms_norm(x, weight, residual=residual)
    assert r.dtype == torch.promote_types(dtype, residual_dtype)
    assert_close(y, reference(total, weight))
    assert_close(r, total)
    y, r = rms_norm(x, weight, residual=residual, residual_in_fp32=True)
    assert r.dtype == torch.float32
    assert_close(r, total, BOUNDS[torch.float32])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31))
def test_a_row_ignores_its_neighbours_and_the_threads(rows, dim, seed):
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    together = rms_norm(x)
    for row in range(rows):
        assert torch.equal(rms_norm(x[row : row + 1]), together[row : row + 1])
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(rms_norm(x), together)
    finally:
        effinfer.set_num_threads(0)


def test_strides(device):
    wide = torch.randn(6, 100, device=device)
    x = wide[:, 10:75]
    assert torch.equal(rms_norm(x), rms_norm(x.contiguous()))
    across = torch.randn(40, 6, device=device).t()
    assert torch.equal(rms_norm(across), rms_norm(across.contiguous()))
    aligned = torch.randn(6 * 65 + 1, device=device)
    assert torch.equal(rms_norm(aligned[1:].view(6, 65)), rms_norm(aligned[1:].clone().view(6, 65)))


def test_neighbouring_memory_is_untouched(device):
    padded = torch.full((4, 50), float("nan"), device=device)
    padded[:, 8:41] = torch.randn(4, 33, device=device)
    assert torch.isfinite(rms_norm(padded[:, 8:41])).all()


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e18, float("inf"), float("nan")])
def test_adversarial_values(device, value):
    x = torch.randn(2, 33, device=device)
    x[1] = value
    got, want = rms_norm(x), reference(x, None)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_errors_name_the_argument(device):
    x = torch.randn(2, 8, device=device)
    with pytest.raises(ValueError, match=r"rms_norm: weight must have shape \(8,\), got \(3,\)"):
        rms_norm(x, torch.randn(3, device=device))
    with pytest.raises(TypeError, match="rms_norm: x must be float32 or bfloat16 or float16"):
        rms_norm(x.double())
    with pytest.raises(ValueError, match="residual must have 2 rows of 8 elements"):
        rms_norm(x, residual=torch.randn(3, 8, device=device))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        rms_norm(x.clone().requires_grad_())


def test_registration():
    x, weight = torch.randn(2, 8), torch.randn(8)
    torch.library.opcheck(torch.ops.effinfer.rms_norm.default, (x, weight, 1e-6, False))
    torch.library.opcheck(
        torch.ops.effinfer.rms_norm_residual.default, (x, weight, 1e-6, False, x, True)
    )
    compiled = torch.compile(lambda t: rms_norm(t, weight) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), rms_norm(x, weight) + 1)


def test_reference_mode_and_isa():
    x = torch.randn(2, 8)
    with effinfer.use_reference():
        assert torch.equal(rms_norm(x), rms_norm.reference(x, None, 1e-6, False))
    assert rms_norm.isa() in ("scalar", "avx2", "avx512", "neon")
