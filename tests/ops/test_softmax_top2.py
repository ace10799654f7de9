from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import softmax_top2
from tests.conftest import DTYPES

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (4, 97), (0, 16), (5, 4099), (8,), (2, 32000)]


def assert_right(got: torch.Tensor, logits: torch.Tensor) -> None:
    want = softmax_top2.reference(logits.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device, dtype, shape):
    logits = (4 * torch.randn(*shape, device=device)).to(dtype)
    assert_right(softmax_top2(logits), logits)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31))
def test_a_row_ignores_the_others_and_the_threads(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, generator=generator)
    together = softmax_top2(logits)
    for i in range(rows):
        assert torch.equal(softmax_top2(logits[i]), together[i])
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(softmax_top2(logits), together)
    finally:
        effinfer.set_num_threads(0)


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 100])
def test_the_largest_may_stand_anywhere(device, columns):
    logits = torch.randn(columns, columns, device=device).clamp(-2, 2)
    logits += 9 * torch.eye(columns, device=device) + 6 * torch.eye(columns, device=device).roll(
        1, 1
    )
    assert_right(softmax_top2(logits), logits)


def test_equals(device):
    got = softmax_top2(torch.full((2, 40), 7.0, device=device))
    torch.testing.assert_close(got, torch.full((2, 2), 1 / 40, device=device))


def test_strides(device):
    wide = torch.randn(6, 130, device=device)
    assert torch.equal(softmax_top2(wide[:, 3:90]), softmax_top2(wide[:, 3:90].contiguous()))
    across = torch.randn(40, 6, device=device).t()
    assert torch.equal(softmax_top2(across), softmax_top2(across.contiguous()))


@pytest.mark.parametrize("at", [0, 8, 32, 39])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-42])
def test_adversarial_values(device, value, at):
    logits = torch.randn(2, 40, device=device)
    logits[0, at] = value
    assert_right(softmax_top2(logits), logits)
    logits[:] = value
    assert_right(softmax_top2(logits), logits)


def test_errors_name_the_argument(device):
    with pytest.raises(ValueError, match="softmax_top2: logits must have at least one column"):
        softmax_top2(torch.randn(2, 0, device=device))
    with pytest.raises(TypeError, match="softmax_top2: logits must"):
        softmax_top2(torch.zeros(2, 8, dtype=torch.long, device=device))


def test_refuses_gradients():
    x = torch.randn(2, 8, requires_grad=True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"softmax_top2.*requires grad"):
        softmax_top2(x)


def test_registration():
    torch.library.opcheck(torch.ops.effinfer.softmax_top2.default, (torch.randn(3, 8),))


def test_reference_mode_and_isa():
    logits = torch.randn(3, 8)
    with effinfer.use_reference():
        assert torch.equal(softmax_top2(logits), softmax_top2.reference(logits))
    assert softmax_top2.isa() in ("scalar", "avx2", "avx512", "neon")
