from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import discretize, selective_scan_lti
from tests.conftest import DTYPES, assert_close

KINDS = ("real", "complex")


def make(
    kind="complex", batch=2, dim=24, state=16, length=37, *, device="cpu", dtype=torch.float32
):
    """An S4D layer: time-major input, decays from strong to weak, S4D-Lin's frequencies."""
    torch.manual_seed(1000 * dim + length)
    decay = -torch.rand(dim, state, device=device) - 0.01
    if kind == "complex":
        decay = torch.complex(decay, torch.pi * torch.arange(state, device=device).expand_as(decay))
    step = torch.rand(dim, 1, device=device) * 0.2 + 1e-3
    a_bar, b_bar = discretize(decay, torch.randn_like(decay), step)
    return {
        "u": torch.randn(batch, length, dim, device=device).to(dtype).movedim(1, -1),
        "A_bar": a_bar,
        "B_bar": b_bar,
        "C": torch.randn_like(decay),
        "D": torch.randn(dim, device=device),
    }


def widen(x):
    if not torch.is_tensor(x) or not (x.is_floating_point() or x.is_complex()):
        return x
    return x.to(torch.complex128) if x.is_complex() else x.double()


def reference(args, **extra):
    """The float64 reference on the same arguments."""
    rest = dict.fromkeys(("initial_state", "cu_seqlens", "mask")) | {
        "reverse": False,
        "num_snapshots": 0,
    }
    return selective_scan_lti.reference(*(widen(x) for x in (args | rest | extra).values()))


def assert_same(got, want):
    """Within the bounds; a complex number counts as its two parts."""
    for g, w in zip(got, want, strict=True):
        if g.is_complex():
            g, w = torch.view_as_real(g), torch.view_as_real(w)
        assert_close(g, w)


def check(args, **extra):
    got = selective_scan_lti(**args, **extra)
    assert_same(got, reference(args, **extra)[: len(got)])
    return got


def random_state(args, sequences):
    return torch.randn(sequences, *args["A_bar"].shape, dtype=args["A_bar"].dtype).to(
        args["u"].device
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "dim", "state", "length"),
    [(1, 1, 1, 1), (2, 24, 16, 37), (1, 67, 7, 131), (3, 8, 33, 65), (2, 5, 64, 9), (1, 3, 130, 4)],
)
def test_matches_float64(device, dtype, kind, batch, dim, state, length):
    check(make(kind, batch, dim, state, length, device=device, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_without_D(device, kind):
    check(make(kind, device=device) | {"D": None})


@pytest.mark.parametrize("real", [("A_bar",), ("B_bar", "C"), ("A_bar", "B_bar")])
def test_real_and_complex_coefficients_mix(device, real):
    args = make(device=device)
    check(args | {k: args[k].real for k in real})


def test_lazily_conjugated_coefficients(device):
    args = make(device=device)
    check(args | {k: args[k].conj() for k in ("A_bar", "C")})


def test_conjugate_pairs_are_both_states(device):
    args = make(state=5, device=device)
    both = {k: torch.cat([args[k], args[k].conj()], 1) for k in ("A_bar", "B_bar", "C")}
    want = reference(args | both)
    assert_close(selective_scan_lti(**args, conjugate_pairs=True)[0], want[0])


def test_no_decay(device):
    args = make(dim=8, length=300, device=device)
    check(args | {"A_bar": torch.polar(torch.ones(8, 16), torch.rand(8, 16)).to(device)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["channel-major", "odd", "every other channel", "expanded"])
def test_strides_change_no_bits(device, kind, layout):
    args = make(kind, 2, 40, 16, 45, device=device)
    u = args["u"]
    if layout == "channel-major":
        moved = u.contiguous()
    elif layout == "odd":
        moved = torch.randn(2, 43, 50, device=device)[:, 1:-2, 2:-3].copy_(u)
    elif layout == "every other channel":
        moved = torch.zeros(2, 80, 45, device=device)[:, ::2].copy_(u)
    else:
        u = u[:, :1].contiguous().expand(-1, 40, -1)
        args, moved = args | {"u": u.contiguous()}, u
    want, got = selective_scan_lti(**args), selective_scan_lti(**(args | {"u": moved}))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("kind", KINDS)
def test_reverse_is_the_flipped_scan(device, kind):
    args = make(kind, device=device)
    y, last = check(args, reverse=True)
    want, want_last = selective_scan_lti(**(args | {"u": args["u"].flip(-1)}))
    assert torch.equal(y, want.flip(-1))
    assert torch.equal(last, want_last)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 90),
    st.integers(0, 90),
    st.integers(1, 20),
    st.integers(0, 2**31),
)
def test_split_anywhere_is_one_shot(kind, length, at, state, seed):
    args = make(kind, 1, 19, state, length)
    torch.manual_seed(seed)
    start = random_state(args, 1)
    y, last = selective_scan_lti(**args, initial_state=start)
    parts = [
        args | {"u": u} for u in args["u"].split([min(at, length), length - min(at, length)], -1)
    ]
    y1, middle = selective_scan_lti(**parts[0], initial_state=start)
    y2, end = selective_scan_lti(**parts[1], initial_state=middle)
    assert torch.equal(torch.cat([y1, y2], -1), y)
    assert torch.equal(end, last)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_threads_change_no_bits(kind):
    args = make(kind, 5, 150, 16, 33)
    y, last = selective_scan_lti(**args)
    order = torch.tensor([3, 0, 4, 1, 2])
    y2, last2 = selective_scan_lti(**(args | {"u": args["u"][order]}))
    assert torch.equal(y2, y[order])
    assert torch.equal(last2, last[order])
    effinfer.set_num_threads(1)
    try:
        y1, last1 = selective_scan_lti(**args)
    finally:
        effinfer.set_num_threads(0)
    assert torch.equal(y1, y)
    assert torch.equal(last1, last)


@pytest.mark.parametrize("kind", KINDS)
def test_varlen(device, kind):
    args = make(kind, 1, 24, 16, 80, device=device)
    starts = [0, 0, 5, 70, 70, 80]
    cu = torch.tensor(starts, dtype=torch.int32, device=device)
    initial = random_state(args, 5)
    y, last, saved = check(args, initial_state=initial, cu_seqlens=cu, num_snapshots=3)
    for s in range(5):
        here = slice(starts[s], starts[s + 1])
        alone = selective_scan_lti(
            **(args | {"u": args["u"][..., here]}),
            initial_state=initial[s : s + 1],
            num_snapshots=3,
        )
        assert torch.equal(y[..., here], alone[0])
        assert torch.equal(last[s], alone[1][0])
        assert torch.equal(saved[s], alone[2][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_masked_positions_are_as_if_absent(device, kind, reverse):
    args = make(kind, 2, 24, 16, 50, device=device)
    mask = torch.rand(2, 50, device=device) > 0.4
    poisoned = args | {"u": args["u"].masked_fill(~mask[:, None], float("nan"))}
    initial = random_state(args, 2)
    y, last, saved = selective_scan_lti(
        **poisoned, initial_state=initial, mask=mask, reverse=reverse, num_snapshots=4
    )
    assert not y[(~mask)[:, None].expand_as(y)].any()
    for row in range(2):
        kept = args | {"u": args["u"][row : row + 1][..., mask[row]]}
        alone = selective_scan_lti(
            **kept, initial_state=initial[row : row + 1], reverse=reverse, num_snapshots=4
        )
        assert torch.equal(y[row][:, mask[row]], alone[0][0])
        assert torch.equal(last[row], alone[1][0])
        assert torch.equal(saved[row], alone[2][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 2, 40])
def test_a_snapshot_is_the_state_before_the_rejected_tokens(device, kind, length):
    args = make(kind, 2, 24, 16, length, device=device)
    initial = random_state(args, 2)
    _, last, saved = selective_scan_lti(**args, initial_state=initial, num_snapshots=5)
    assert torch.equal(saved[:, 0], last)
    for k in range(5):
        kept = args | {"u": args["u"][..., : max(length - k, 0)]}
        assert torch.equal(saved[:, k], selective_scan_lti(**kept, initial_state=initial)[1])


def test_empty(device):
    args = make(length=0, device=device)
    initial = random_state(args, 2)
    y, last = selective_scan_lti(**args, initial_state=initial)
    assert y.shape == (2, 24, 0)
    assert torch.equal(last, initial)
    assert selective_scan_lti(**make(batch=0, device=device))[1].shape == (0, 24, 16)
    assert selective_scan_lti(**make(dim=0, device=device))[0].shape == (2, 0, 37)
    y, last = check(make(state=0, device=device))
    assert last.shape == (2, 24, 0)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e18, float("inf"), float("nan")])
def test_adversarial_values(device, value):
    args = make("real", 1, 9, 5, 6, device=device) | {"D": None}
    args["u"][..., 3] = value
    for g, w in zip(selective_scan_lti(**args), reference(args)[:2], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_errors_name_the_argument(device):
    args = make(device=device)
    real = make("real", device=device)
    starts = torch.tensor([0, 37], dtype=torch.int32, device=device)
    cases = [
        (ValueError, r"u and A_bar must have shapes", args | {"u": args["u"][0]}),
        (ValueError, r"B_bar must have shape \(24, 16\)", args | {"B_bar": args["B_bar"][:, 1:]}),
        (ValueError, r"C must have shape \(24, 16\)", args | {"C": args["C"].t()}),
        (ValueError, r"D must have shape \(24,\)", args | {"D": args["D"][1:]}),
        (TypeError, "u must be float32 or bfloat16 or float16", args | {"u": args["u"].double()}),
        (ValueError, "num_snapshots must be 0 or more", args | {"num_snapshots": -1}),
        (ValueError, "batch size 1 when cu_seqlens", args | {"cu_seqlens": starts}),
        (ValueError, "at least 1 element", args | {"cu_seqlens": starts[:0]}),
        (ValueError, "conjugate_pairs must", real | {"conjugate_pairs": True}),
        (TypeError, "must be real", real | {"initial_state": random_state(args, 2)}),
    ]
    for error, message, bad in cases:
        with pytest.raises(error, match=f"selective_scan_lti: .*{message}"):
            selective_scan_lti(**bad)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        selective_scan_lti(**(args | {"u": args["u"].clone().requires_grad_()}))


@pytest.mark.parametrize("kind", KINDS)
def test_registration(kind):
    args = make(kind, 1, 6, 4, 8)
    torch.library.opcheck(
        torch.ops.effinfer.selective_scan_lti.default, (*args.values(), None, None, None, False, 2)
    )
    compiled = torch.compile(
        lambda u: selective_scan_lti(**(args | {"u": u}))[0] + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(args["u"]), selective_scan_lti(**args)[0] + 1)


def test_reference_mode():
    args = make(length=8)
    with effinfer.use_reference():
        got = selective_scan_lti(**args)
    assert_same(got, reference(args)[:2])
    assert selective_scan_lti.isa() in ("scalar", "avx2", "avx512", "neon")


@pytest.mark.parametrize("magnitude", [0.0, 1e-12, 1e-6, 1e-3, 0.4, 0.6, 3.0])
def test_zero_order_hold(magnitude):
    decay = magnitude * torch.tensor([-1.0, -1.0 + 1.0j, 1.0j], dtype=torch.complex128)
    a_bar, b_bar = discretize(decay, torch.full((3,), 2.0 + 1.0j, dtype=torch.complex128), 0.5)
    for i in range(3):  # the exponential of the system's block matrix gives both
        block = torch.zeros(2, 2, dtype=torch.complex128)
        block[0, 0], block[0, 1] = decay[i] * 0.5, (2.0 + 1.0j) * 0.5
        want = torch.linalg.matrix_exp(block)
        torch.testing.assert_close(a_bar[i], want[0, 0], rtol=1e-12, atol=0)
        torch.testing.assert_close(b_bar[i], want[0, 1], rtol=1e-12, atol=0)


def test_zero_order_hold_keeps_float32s_digits():
    decay = -torch.logspace(-8, 1, 200)[None]
    step = torch.full((1, 1), 0.3)
    got = discretize(decay, torch.ones_like(decay), step)
    want = discretize(decay.double(), torch.ones_like(decay).double(), step.double())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=5e-7, atol=0)


def test_bilinear():
    decay = torch.tensor([-1.0 + 2.0j, 0.0], dtype=torch.complex128)
    a_bar, b_bar = discretize(decay, torch.ones(2, 3), 0.5, "bilinear")
    x = decay * 0.25
    torch.testing.assert_close(a_bar, (1 + x) / (1 - x))
    torch.testing.assert_close(b_bar, (0.5 / (1 - x))[:, None].expand(2, 3))
    with pytest.raises(ValueError, match="method must be 'zoh' or 'bilinear'"):
        discretize(decay, decay, 0.5, "euler")
