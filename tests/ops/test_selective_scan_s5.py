from __future__ import annotations

import pytest
import torch

from effinfer.ops import discretize, selective_scan_s5
from tests.conftest import BOUNDS, DTYPES, assert_close


def make(batch=2, width=12, states=8, length=23, *, device="cpu", dtype=torch.float32):
    torch.manual_seed(length)
    decay = torch.complex(-torch.rand(states) - 0.01, torch.pi * torch.arange(states).float())
    a_bar, b_bar = discretize(
        decay, torch.randn(states, width, dtype=torch.complex64), torch.rand(states) * 0.2
    )
    args = {
        "u": torch.randn(batch, width, length).to(dtype),
        "Lambda_bar": a_bar,
        "B_bar": b_bar,
        "C": torch.randn(width, states, dtype=torch.complex64),
        "D": torch.randn(width),
    }
    return {k: v.to(device) for k, v in args.items()}


def recurrence(args, start, scale=2, reverse=False):
    """x_t = Lambda x_{t-1} + B u_t; y_t = scale Re(C x_t) + D u_t, in float64."""
    u, *matrices, skip = args.values()
    decay, b, c = (m.to(torch.complex128) for m in matrices)
    u, x = u.double(), start.to(torch.complex128)
    y = torch.zeros_like(u)
    for t in range(u.shape[-1] - 1, -1, -1) if reverse else range(u.shape[-1]):
        x = decay * x + u[..., t].to(torch.complex128) @ b.t()
        y[..., t] = scale * (x @ c.t()).real + skip.double() * u[..., t]
    return y, x


def assert_complex_close(got, want):
    assert_close(torch.view_as_real(got), torch.view_as_real(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_matches_float64(device, dtype, reverse, pairs):
    args = make(device=device, dtype=dtype)
    start = torch.randn(2, 8, dtype=torch.complex64).to(device)
    y, last = selective_scan_s5(**args, conjugate_pairs=pairs, initial_state=start, reverse=reverse)
    want, want_last = recurrence(args, start, 2 if pairs else 1, reverse)
    assert y.dtype is dtype
    assert_close(y, want, BOUNDS[dtype])
    assert_complex_close(last, want_last)


def test_mask_varlen_and_snapshots(device):
    args = make(1, device=device)
    mask = torch.rand(1, 23, device=device) > 0.3
    starts = [0, 9, 9, 23]
    poisoned = args | {"u": args["u"].masked_fill(~mask[:, None], float("nan"))}
    cu = torch.tensor(starts, dtype=torch.int32, device=device)
    y, last, saved = selective_scan_s5(**poisoned, cu_seqlens=cu, mask=mask, num_snapshots=2)
    assert torch.equal(saved[:, 0], last)
    assert not y[0][:, ~mask[0]].any()
    for s in range(3):
        keep = mask.clone()
        keep[:, : starts[s]] = keep[:, starts[s + 1] :] = False
        alone = args | {"u": args["u"][..., keep[0]]}
        zero = torch.zeros(1, 8, dtype=torch.complex64, device=device)
        want, want_last = recurrence(alone, zero)
        assert_close(y[..., keep[0]], want)
        assert_complex_close(last[s : s + 1], want_last)
        before = recurrence(alone | {"u": alone["u"][..., :-1]}, zero)[1]
        assert_complex_close(saved[s : s + 1, 1], before)


def test_split_is_one_shot(device):
    args = make(device=device)
    y, last = selective_scan_s5(**args)
    state, parts = None, []
    for u in args["u"].split([5, 18], -1):
        part, state = selective_scan_s5(**(args | {"u": u}), initial_state=state)
        parts.append(part)
    assert_close(torch.cat(parts, -1), y)
    assert_complex_close(state, last)


def test_errors():
    args = make()
    with pytest.raises(ValueError, match=r"selective_scan_s5: .* must have shapes \(B, H, L\)"):
        selective_scan_s5(**(args | {"B_bar": args["B_bar"].t()}))
    with pytest.raises(ValueError, match="num_snapshots must be 0 or more"):
        selective_scan_s5(**args, num_snapshots=-1)
