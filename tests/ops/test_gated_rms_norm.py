from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import gated_rms_norm
from tests.conftest import DTYPES, assert_close

SHAPES = [((1, 1), 1), ((3, 7), 7), ((2, 5, 64), 16), ((4, 96), 24), ((3, 770), 385), ((0, 16), 4)]


def reference(x, weight, z=None, eps=1e-6, group_size=None, norm_before_gate=False):
    weight, z = (None if t is None else t.double() for t in (weight, z))
    return gated_rms_norm.reference(x.double(), weight, z, eps, group_size, norm_before_gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group"), SHAPES)
@pytest.mark.parametrize("before", [False, True])
def test_matches_float64(device, dtype, shape, group, before):
    x, z = torch.randn(2, *shape, device=device).to(dtype) * 3
    weight = torch.randn(shape[-1], device=device)
    for size in (None, group):
        options = {"group_size": size, "norm_before_gate": before}
        assert_close(
            gated_rms_norm(x, weight, z, 1e-5, **options), reference(x, weight, z, 1e-5, **options)
        )
        assert_close(gated_rms_norm(x, None, **options), reference(x, None, **options))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 4), st.booleans())
def test_a_row_ignores_its_neighbours_and_the_threads(rows, group, groups, before):
    x, z = torch.randn(2, rows, group * groups)
    options = {"group_size": group, "norm_before_gate": before}
    together = gated_rms_norm(x, None, z, **options)
    for row in range(rows):
        alone = gated_rms_norm(x[row : row + 1], None, z[row : row + 1], **options)
        assert torch.equal(alone, together[row : row + 1])
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(gated_rms_norm(x, None, z, **options), together)
    finally:
        effinfer.set_num_threads(0)


def test_strides_and_neighbouring_memory(device):
    """x and z are often slices of one projection."""
    projected = torch.full((2, 5, 100), float("nan"), device=device)
    projected[..., 3:43] = torch.randn(2, 5, 40, device=device)
    projected[..., 50:90] = torch.randn(2, 5, 40, device=device)
    x, z = projected[..., 3:43], projected[..., 50:90]
    for before in (False, True):
        got = gated_rms_norm(x, None, z, group_size=8, norm_before_gate=before)
        dense = gated_rms_norm(
            x.contiguous(), None, z.contiguous(), group_size=8, norm_before_gate=before
        )
        assert torch.equal(got, dense)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e17, -200.0, float("inf"), float("nan")])
def test_adversarial_values(device, value):
    x, z = torch.randn(2, 2, 33, device=device)
    x[1, 4] = value
    z[0, 7] = value
    for before in (False, True):
        got = gated_rms_norm(x, None, z, norm_before_gate=before)
        want = reference(x, None, z, norm_before_gate=before)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_errors_name_the_argument(device):
    x = torch.randn(2, 8, device=device)
    cases = [
        (ValueError, r"weight must have shape \(8,\)", (x, torch.randn(3, device=device)), {}),
        (ValueError, r"z must have shape \(2, 8\)", (x, None, x[:1]), {}),
        (TypeError, "z must be float32", (x, None, x.half()), {}),
        (ValueError, "group_size must divide", (x, None), {"group_size": 3}),
        (ValueError, "group_size must divide", (x, None), {"group_size": 0}),
        (TypeError, "x must be float32 or bfloat16 or float16", (x.double(), None), {}),
    ]
    for error, message, args, options in cases:
        with pytest.raises(error, match=f"gated_rms_norm: {message}"):
            gated_rms_norm(*args, **options)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        gated_rms_norm(x.clone().requires_grad_(), None)


def test_registration():
    x, z, weight = torch.randn(2, 8), torch.randn(2, 8), torch.randn(8)
    op = torch.ops.effinfer.gated_rms_norm.default
    torch.library.opcheck(op, (x, weight, z, 1e-6, 4, True))
    torch.library.opcheck(op, (x, None, None, 1e-6, None, False))
    compiled = torch.compile(
        lambda t: gated_rms_norm(t, weight, z) + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), gated_rms_norm(x, weight, z) + 1)
