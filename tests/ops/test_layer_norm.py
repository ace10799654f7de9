from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import layer_norm
from tests.conftest import BOUNDS, DTYPES, assert_close

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (4, 97), (1, 768), (0, 16), (2, 0, 16), (5, 4099)]


def reference(x, weight=None, bias=None, eps=1e-5):
    weight, bias = (None if t is None else t.double() for t in (weight, bias))
    return layer_norm.reference(x.double(), weight, bias, eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device, dtype, shape):
    x = torch.randn(shape, device=device).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=device)
    assert_close(layer_norm(x, weight, bias), reference(x, weight, bias))
    assert_close(layer_norm(x, weight), reference(x, weight))
    assert_close(layer_norm(x, eps=1e-2), reference(x, eps=1e-2))


def test_large_mean(device):
    """Neither the mean's rounding nor the variance's cancellation is seen."""
    x = torch.randn(4, 300, device=device) + 4096
    assert_close(layer_norm(x), reference(x))
    exact = torch.arange(256.0, device=device).expand(2, 256) + 2**20
    assert_close(layer_norm(exact), reference(exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_residual(device, dtype, residual_dtype):
    x = torch.randn(3, 5, 70, device=device).to(dtype)
    residual = torch.randn(3, 5, 70, device=device).to(residual_dtype)
    weight, bias = torch.randn(2, 70, device=device)
    total = x.double() + residual.double()
    y, r = layer_norm(x, weight, bias, residual=residual)
    assert r.dtype == torch.promote_types(dtype, residual_dtype)
    assert_close(y, reference(total, weight, bias))
    assert_close(r, total)
    y, r = layer_norm(x, weight, bias, residual=residual, residual_in_fp32=True)
    assert r.dtype == torch.float32
    assert_close(r, total, BOUNDS[torch.float32])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31))
def test_a_row_ignores_its_neighbours_and_the_threads(rows, dim, seed):
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    together = layer_norm(x)
    for row in range(rows):
        assert torch.equal(layer_norm(x[row : row + 1]), together[row : row + 1])
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(layer_norm(x), together)
    finally:
        effinfer.set_num_threads(0)


def test_strides_and_neighbouring_memory(device):
    padded = torch.full((4, 3, 50), float("nan"), device=device)
    padded[..., 8:41] = torch.randn(4, 3, 33, device=device)
    inside = padded[..., 8:41]
    assert torch.equal(layer_norm(inside), layer_norm(inside.contiguous()))
    across = torch.randn(40, 6, device=device).t()
    assert torch.equal(layer_norm(across), layer_norm(across.contiguous()))


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e17, float("inf"), float("nan")])
def test_adversarial_values(device, value):
    x = torch.randn(2, 33, device=device)
    x[1] = value
    x[1, 5] = -value
    got, want = layer_norm(x), reference(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_errors_name_the_argument(device):
    x = torch.randn(2, 8, device=device)
    three = torch.randn(3, device=device)
    with pytest.raises(ValueError, match=r"layer_norm: weight must have shape \(8,\), got \(3,\)"):
        layer_norm(x, three)
    with pytest.raises(ValueError, match=r"layer_norm: bias must have shape \(8,\), got \(3,\)"):
        layer_norm(x, None, three)
    with pytest.raises(TypeError, match="layer_norm: x must be float32 or bfloat16 or float16"):
        layer_norm(x.double())
    with pytest.raises(ValueError, match="layer_norm: residual must have 2 rows of 8 elements"):
        layer_norm(x, residual=torch.randn(3, 8, device=device))
    with pytest.raises(TypeError, match="layer_norm: residual must be"):
        layer_norm(x, residual=x.double())
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        layer_norm(x.clone().requires_grad_())


def test_registration():
    x, weight, bias = torch.randn(2, 8), torch.randn(8), torch.randn(8)
    torch.library.opcheck(torch.ops.effinfer.layer_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(
        torch.ops.effinfer.layer_norm_residual.default, (x, weight, None, 1e-5, x, True)
    )
    compiled = torch.compile(lambda t: layer_norm(t, weight) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer_norm(x, weight) + 1)
