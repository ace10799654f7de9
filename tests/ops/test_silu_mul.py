from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import silu_mul
from tests.conftest import DTYPES, assert_close

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (4, 97), (0, 16), (2, 0), (5, 4099)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device, dtype, shape):
    gate, up = (4 * torch.randn(2, *shape, device=device)).to(dtype)
    assert_close(silu_mul(gate, up), silu_mul.reference(gate.double(), up.double()))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31))
def test_an_element_ignores_its_place_and_the_threads(rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, rows, dim, generator=generator)
    together = silu_mul(gate, up)
    order = torch.randperm(dim, generator=generator)
    assert torch.equal(silu_mul(gate[:, order], up[:, order]), together[:, order])
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(silu_mul(gate, up), together)
    finally:
        effinfer.set_num_threads(0)


def test_strides(device):
    gate, up = torch.randn(6, 130, device=device).chunk(2, 1)
    assert torch.equal(silu_mul(gate, up), silu_mul(gate.contiguous(), up.contiguous()))
    across = torch.randn(40, 6, device=device).t()
    assert torch.equal(silu_mul(across, across), silu_mul(across.contiguous(), across.contiguous()))


def test_in_place(device):
    gate, up = torch.randn(2, 6, 65, device=device)
    want = silu_mul(gate, up)
    native = effinfer._native.native(gate)
    native.silu_mul(gate, up, gate)
    assert torch.equal(gate, want)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, 88.0, -88.0, 1e30, float("inf"), float("nan")])
def test_adversarial_values(device, value):
    gate = torch.full((2, 33), value, device=device)
    up = torch.full((2, 33), 1.5, device=device)
    want = silu_mul.reference(gate.double(), up.double()).float()
    torch.testing.assert_close(silu_mul(gate, up), want, equal_nan=True)


def test_errors_name_the_argument(device):
    x = torch.randn(2, 8, device=device)
    with pytest.raises(ValueError, match="silu_mul: up must have shape"):
        silu_mul(x, x[:, :7])
    with pytest.raises(TypeError, match="silu_mul: up must"):
        silu_mul(x, x.bfloat16())
    with pytest.raises(TypeError, match="silu_mul: gate must"):
        silu_mul(x.long(), x.long())


def test_refuses_gradients():
    x = torch.randn(2, 8, requires_grad=True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"silu_mul.*requires grad"):
        silu_mul(x, x)


def test_registration():
    gate, up = torch.randn(2, 3, 8)
    torch.library.opcheck(torch.ops.effinfer.silu_mul.default, (gate, up))


def test_reference_mode_and_isa():
    gate, up = torch.randn(2, 3, 8)
    with effinfer.use_reference():
        assert torch.equal(silu_mul(gate, up), silu_mul.reference(gate, up))
    assert silu_mul.isa() in ("scalar", "avx2", "avx512", "neon")
