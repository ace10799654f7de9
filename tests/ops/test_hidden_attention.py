from __future__ import annotations

import pytest
import torch

import effinfer
from effinfer.ops import hidden_attention, selective_scan
from tests.conftest import DTYPES, assert_close


def make(batch=2, dim=6, state=16, length=21, *, groups=0, device="cpu", dtype=torch.float32):
    torch.manual_seed(1000 * dim + length)
    matrix = (batch, length, groups, state) if groups else (batch, length, state)
    b, c = (torch.randn(matrix, device=device).to(dtype).movedim(1, -1) for _ in range(2))
    return {
        "delta": torch.randn(batch, length, dim, device=device).to(dtype).movedim(1, -1),
        "A": -torch.rand(dim, state, device=device) * 4 - 0.01,
        "B": b,
        "C": c,
        "delta_bias": torch.randn(dim, device=device) - 2,
        "delta_softplus": True,
    }


def reference(args):
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in args.items()}
    return hidden_attention.reference(*wide.values(), 2**30)


def check(args):
    alpha = hidden_attention(**args)
    assert_close(alpha, reference(args))
    assert not alpha.triu(1).any()
    return alpha


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "dim", "state", "length"),
    [(1, 1, 1, 1), (2, 6, 16, 21), (1, 3, 7, 40), (1, 2, 33, 17), (2, 2, 64, 8)],
)
def test_matches_float64(device, dtype, batch, dim, state, length):
    check(make(batch, dim, state, length, device=device, dtype=dtype))


@pytest.mark.parametrize("groups", [1, 3])
def test_grouped(device, groups):
    check(make(groups=groups, device=device))


@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")])
def test_constant(device, constant):
    check(make(device=device) | {k: torch.randn(6, 16, device=device) for k in constant})


def test_without_bias_and_softplus_and_growing(device):
    args = make(device=device) | {"delta_bias": None, "delta_softplus": False}
    check(args)
    check(args | {"A": args["A"].abs() * 0.1})


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_the_scan_multiplies_by(device, dtype):
    args = make(device=device, dtype=dtype)
    u, skip = torch.randn(2, 6, 21, device=device), torch.randn(6, device=device)
    y, _ = selective_scan(u, **args, D=skip)
    want = (hidden_attention(**args).double() @ u.double()[..., None])[..., 0]
    assert_close(y, want + skip.double()[:, None] * u.double())


def test_strides_change_no_bits(device):
    args = make(device=device)
    moved = args | {k: args[k].contiguous() for k in ("delta", "B", "C")}
    assert torch.equal(hidden_attention(**args), hidden_attention(**moved))


def test_batch_and_threads_change_no_bits():
    args = make(4, 20)
    alpha = hidden_attention(**args)
    order = torch.tensor([3, 0, 2, 1])
    shuffled = args | {k: args[k][order] for k in ("delta", "B", "C")}
    assert torch.equal(hidden_attention(**shuffled), alpha[order])
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(hidden_attention(**args), alpha)
    finally:
        effinfer.set_num_threads(0)


def test_later_positions_change_nothing_earlier(device):
    args = make(length=20, device=device)
    alpha = hidden_attention(**args)
    for name in ("delta", "B", "C"):
        args[name][..., 13:] = float("nan")
    assert torch.equal(hidden_attention(**args)[..., :13, :], alpha[..., :13, :])


def test_empty(device):
    assert hidden_attention(**make(length=0, device=device)).shape == (2, 6, 0, 0)
    assert hidden_attention(**make(batch=0, device=device)).shape == (0, 6, 21, 21)
    assert hidden_attention(**make(dim=0, device=device)).shape == (2, 0, 21, 21)
    assert not hidden_attention(**make(state=0, device=device)).any()


def test_errors_name_the_argument(device):
    args = make(device=device)
    cases = [
        (ValueError, r"delta must have shape \(B, D, L\)", args | {"delta": args["delta"][0]}),
        (ValueError, r"A must have shape \(6, any\)", args | {"A": args["A"][1:]}),
        (ValueError, r"B must have shape \(6, 16\), \(2, 16, 21\)", args | {"B": args["B"][:, 1:]}),
        (ValueError, r"delta_bias must have shape \(6,\)", args | {"delta_bias": args["A"][0]}),
        (TypeError, "delta must be float32", args | {"delta": args["delta"].double()}),
        (ValueError, "max_bytes must be at least 21168 .*got 21167", args | {"max_bytes": 21167}),
    ]
    for error, message, bad in cases:
        with pytest.raises(error, match=f"hidden_attention: {message}"):
            hidden_attention(**bad)
    assert hidden_attention(**args, max_bytes=21168).shape == (2, 6, 21, 21)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        hidden_attention(**(args | {"B": args["B"].clone().requires_grad_()}))


def test_registration():
    args = make(1, 3, 4, 5)
    torch.library.opcheck(torch.ops.effinfer.hidden_attention.default, (*args.values(), 2**30))
    compiled = torch.compile(
        lambda delta: hidden_attention(**(args | {"delta": delta})) + 1,
        fullgraph=True,
        backend="eager",
    )
    assert torch.equal(compiled(args["delta"]), hidden_attention(**args) + 1)
    with effinfer.use_reference():
        assert_close(hidden_attention(**args), reference(args))
    assert hidden_attention.isa() in ("scalar", "avx2", "avx512", "neon")
