from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import lmu_matrices, selective_scan_lmu
from tests.conftest import DTYPES, assert_close


def make(batch=2, dim=5, state=12, length=37, *, device="cpu", dtype=torch.float32):
    torch.manual_seed(1000 * dim + length)
    a_bar, b_bar = lmu_matrices(state, 20.0)
    return {
        "u": torch.randn(batch, length, dim, device=device).to(dtype).movedim(1, -1),
        "A_bar": a_bar.float().to(device),
        "B_bar": b_bar.float().to(device),
    }


def reference(args, initial_state=None, last_only=False, num_snapshots=0):
    """The float64 reference on the same arguments."""
    u, a, b, start = (None if x is None else x.double() for x in (*args.values(), initial_state))
    return selective_scan_lmu.reference(u, a, b, start, last_only, num_snapshots)


def check(args, **extra):
    got, want = selective_scan_lmu(**args, **extra), reference(args, **extra)
    for g, w in zip(got, want[: len(got)], strict=True):
        assert_close(g, w)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "dim", "state", "length"),
    [(1, 1, 1, 1), (2, 5, 12, 37), (1, 13, 16, 9), (3, 1, 70, 20), (1, 2, 64, 3), (1, 3, 33, 7)],
)
def test_matches_float64(device, dtype, batch, dim, state, length):
    check(make(batch, dim, state, length, device=device, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 64, 300])
def test_last_only(device, dtype, length):
    args = make(length=length, device=device, dtype=dtype)
    initial = torch.randn(2, 5, 12, device=device)
    m, _, _ = check(args, initial_state=initial, last_only=True, num_snapshots=3)
    assert m.shape == (2, 5, 0, 12)


def test_a_step_of_many_positions_was_taken(device):
    """The long sequence of test_last_only does leave the step-by-step path."""
    args = make(length=300, device=device)
    one_by_one = selective_scan_lmu(**args)[1]
    at_once = selective_scan_lmu(**args, last_only=True)[1]
    assert not torch.equal(one_by_one, at_once)


def test_strides_change_no_bits(device):
    args = make(device=device)
    want = selective_scan_lmu(**args)
    odd = torch.randn(2, 8, 42, device=device)[:, 1:-2, 2:-3].copy_(args["u"])
    for u in (args["u"].contiguous(), odd):
        for got, w in zip(selective_scan_lmu(**(args | {"u": u})), want, strict=True):
            assert torch.equal(got, w)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_split_anywhere_is_one_shot(length, at, state, seed):
    args = make(1, 7, state, length)
    torch.manual_seed(seed)
    start, at = torch.randn(1, 7, state), min(at, length)
    m, last = selective_scan_lmu(**args, initial_state=start)
    parts = [args | {"u": u} for u in args["u"].split([at, length - at], -1)]
    m1, middle = selective_scan_lmu(**parts[0], initial_state=start)
    m2, end = selective_scan_lmu(**parts[1], initial_state=middle)
    assert torch.equal(torch.cat([m1, m2], 2), m)
    assert torch.equal(end, last)


@pytest.mark.parametrize("last_only", [False, True])
def test_batch_and_threads_change_no_bits(last_only):
    args = make(5, 3, length=200)
    m, last = selective_scan_lmu(**args, last_only=last_only)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = selective_scan_lmu(**(args | {"u": args["u"][order]}), last_only=last_only)
    assert torch.equal(shuffled[0], m[order])
    assert torch.equal(shuffled[1], last[order])
    alone = selective_scan_lmu(**(args | {"u": args["u"][:1]}), last_only=last_only)
    assert torch.equal(alone[1], last[:1])
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(selective_scan_lmu(**args, last_only=last_only)[1], last)
    finally:
        effinfer.set_num_threads(0)


@pytest.mark.parametrize("length", [0, 2, 40])
def test_a_snapshot_is_the_state_before_the_rejected_tokens(device, length):
    args = make(length=length, device=device)
    initial = torch.randn(2, 5, 12, device=device)
    _, last, saved = check(args, initial_state=initial, num_snapshots=5)
    assert torch.equal(saved[:, 0], last)
    for k in range(5):
        kept = args | {"u": args["u"][..., : max(length - k, 0)]}
        assert torch.equal(saved[:, k], selective_scan_lmu(**kept, initial_state=initial)[1])


def test_empty(device):
    initial = torch.randn(2, 5, 12, device=device)
    m, last = selective_scan_lmu(**make(length=0, device=device), initial_state=initial)
    assert m.shape == (2, 5, 0, 12)
    assert torch.equal(last, initial)
    assert selective_scan_lmu(**make(batch=0, device=device))[0].shape == (0, 5, 37, 12)
    assert selective_scan_lmu(**make(dim=0, device=device))[1].shape == (2, 0, 12)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e18, float("inf"), float("nan")])
def test_adversarial_values(device, value):
    args = make(1, 3, 5, 8, device=device)
    args["u"][:, 1, 3] = value
    for g, w in zip(selective_scan_lmu(**args), reference(args)[:2], strict=True):
        if value == float("inf"):  # inf - inf: nan sooner or later, in one order of sums or another
            assert torch.equal(g.isfinite(), w.isfinite())
        else:
            torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_errors_name_the_argument(device):
    args = make(device=device)
    cases = [
        (ValueError, r"u, A_bar and B_bar must have shapes", args | {"u": args["u"][0]}),
        (ValueError, r"must have shapes", args | {"A_bar": args["A_bar"][1:]}),
        (ValueError, r"must have shapes", args | {"B_bar": args["B_bar"][:, None]}),
        (ValueError, r"initial_state must have shape \(2, 5, 12\)",
         args | {"initial_state": torch.zeros(2, 5, 11, device=device)}),
        (TypeError, "u must be float32 or bfloat16 or float16", args | {"u": args["u"].double()}),
        (ValueError, "num_snapshots must be 0 or more", args | {"num_snapshots": -1}),
    ]  # fmt: skip
    for error, message, bad in cases:
        with pytest.raises(error, match=f"selective_scan_lmu: .*{message}"):
            selective_scan_lmu(**bad)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        selective_scan_lmu(**(args | {"u": args["u"].clone().requires_grad_()}))


def test_registration():
    args = make(1, 3, 4, 5)
    op = torch.ops.effinfer.selective_scan_lmu.default
    torch.library.opcheck(op, (*args.values(), None, False, 2))
    torch.library.opcheck(op, (*args.values(), torch.randn(1, 3, 4), True, 0))
    compiled = torch.compile(
        lambda u: selective_scan_lmu(**(args | {"u": u}))[0] + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(args["u"]), selective_scan_lmu(**args)[0] + 1)
    with effinfer.use_reference():
        assert_close(selective_scan_lmu(**args)[0], reference(args)[0])
    assert selective_scan_lmu.isa() in ("scalar", "avx2", "avx512", "neon")


def test_matrices_remember_a_window():
    """Legendre polynomials read the input of theta / 2 positions ago out of the memory."""
    theta, state, length = 60.0, 16, 200
    a_bar, b_bar = lmu_matrices(state, theta)
    u = torch.sin(torch.arange(length) * 0.1)[None, None]
    m, _ = selective_scan_lmu(u, a_bar, b_bar)
    middle = [1.0, 0.0]  # the shifted Legendre polynomials at 1/2
    for i in range(2, state):
        middle.append(-(i - 1) / i * middle[i - 2])
    seen = m[0, 0] @ torch.tensor(middle)
    assert (seen[100:] - u[0, 0, 100 - 30 : -30]).abs().max() < 0.05
    with pytest.raises(ValueError, match="N and theta must be positive"):
        lmu_matrices(0, 1.0)
    with pytest.raises(ValueError, match="N and theta must be positive"):
        lmu_matrices(4, float("nan"))
