from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import ssd
from tests.conftest import BOUNDS, DTYPES, assert_close, relative_error


def inputs(batch=2, length=70, heads=4, dim=12, groups=2, state=20, *, dtype=torch.float32,
           device="cpu", seed=0, steps=0.05):  # fmt: skip
    """Arguments of a typical layer; `steps` is the mean step, small for a weak decay."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g)

    args = {
        "x": randn(batch, length, heads, dim).to(dtype),
        "dt": (randn(batch, length, heads) * 0.5).to(dtype),
        "A": -torch.rand(heads, generator=g) * 8 - 0.5,
        "B": randn(batch, length, groups, state).to(dtype),
        "C": randn(batch, length, groups, state).to(dtype),
        "D": randn(heads),
        "z": randn(batch, length, heads, dim).to(dtype),
        "dt_bias": torch.full((heads,), math.log(math.expm1(steps))) + 0.1 * randn(heads),
        "initial_state": randn(batch, heads, dim, state),
    }
    return {name: t.to(device) for name, t in args.items()} | {"dt_softplus": True}


def run(a, **changes):
    """(y, last_state[, snapshots]) of the op."""
    a = a | changes
    return ssd(**a)


def reference(a, **changes):
    """(y, last_state, snapshots) of the plain-torch definition in float64, on the CPU."""
    a = {
        k: v.cpu().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in (a | changes).items()
    }
    tensors = [a.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")]
    extras = [t if t is None else t.cpu() for t in map(a.get, ("seq_idx", "cu_seqlens", "mask"))]
    limits = a.get("dt_limit", (0.0, math.inf))
    return ssd.reference(
        *tensors, *extras, a.get("dt_softplus", False), *limits, a.get("num_snapshots", 0)
    )


def tokens(a, start, stop, **changes):
    """The same arguments for part of the sequence."""
    cut = {k: a[k][:, start:stop] for k in ("x", "dt", "B", "C", "z")}
    return a | cut | changes


def assert_matches(a, **changes):
    got, want = run(a, **changes), reference(a, **changes)
    for g, w in zip(got, want, strict=False):
        bound = BOUNDS[a["x"].dtype] if g.dtype is a["x"].dtype else BOUNDS[torch.float32]
        assert_close(g, w, bound)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 47, 48, 49, 97, 131])
def test_matches_float64(device, dtype, length):
    a = inputs(length=length, dtype=dtype, device=device)
    y, last = assert_matches(a)
    assert y.dtype is dtype
    assert last.dtype is torch.float32
    assert_matches(a, D=torch.randn(4, 12, device=device), z=None)
    assert_matches(a, D=None, dt_bias=None, initial_state=None, dt_limit=(0.01, 0.3))


@pytest.mark.parametrize(
    ("heads", "dim", "groups", "state"),
    [(1, 1, 1, 1), (3, 5, 1, 7), (2, 16, 2, 16), (2, 64, 1, 128), (6, 33, 3, 50), (2, 80, 1, 6)],
)
def test_shapes(device, heads, dim, groups, state):
    assert_matches(inputs(1, 61, heads, dim, groups, state, device=device))
    assert_matches(inputs(1, 5, heads, dim, groups, state, device=device))


@pytest.mark.parametrize("steps", [1e-4, 0.02, 1.0, 12.0])
def test_weak_and_strong_decay(device, steps):
    """A weak decay carries errors of the state far: it shows hand-offs that a strong one hides."""
    a = inputs(1, 400, steps=steps, device=device)
    assert_matches(a)


@pytest.mark.parametrize("limit", [(0.0, math.inf), (-math.inf, math.inf)])
def test_steps_of_any_size(device, limit):
    a = inputs(1, 60, device=device) | {"dt_softplus": False, "dt_bias": None, "dt_limit": limit}
    a["dt"] = torch.linspace(-2 if limit[0] < 0 else -20, 20, 240, device=device).view(1, 60, 4)
    assert_matches(a | {"A": -torch.rand(4, device=device)})


def test_decay_to_nothing(device):
    a = inputs(1, 60, device=device) | {"dt_softplus": False, "dt_bias": None}
    a["dt"] = torch.rand(1, 60, 4, device=device)
    a["dt"][0, 30] = 1e4  # exp underflows: what came before is gone, exactly
    y, last = assert_matches(a)
    a["x"] = a["x"].clone()
    a["x"][:, :30] += 1
    y2, last2 = run(a)
    assert torch.equal(y[:, 30:], y2[:, 30:])
    assert torch.equal(last, last2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=2, max_size=5), st.integers(0, 2**31))
def test_split_anywhere_is_one_shot(parts, seed):
    a = inputs(1, sum(parts), seed=seed)
    y, last = run(a)
    state, pieces, at = a["initial_state"], [], 0
    for part in parts:
        piece, state = run(tokens(a, at, at + part, initial_state=state))
        pieces.append(piece)
        at += part
    assert relative_error(torch.cat(pieces, 1), y.double()) <= 2e-6
    assert relative_error(state, last.double()) <= 2e-6


@pytest.mark.parametrize("length", [0, 1, 3, 7, 9, 48, 50, 55, 60, 100])
def test_a_snapshot_is_a_run_that_ended_there(device, length):
    a = inputs(2, length, device=device)
    keep = 12
    y, last, snapshots = run(a, num_snapshots=keep)
    assert_close(snapshots, reference(a, num_snapshots=keep)[2])
    plain = run(a)
    assert torch.equal(y, plain[0])
    assert torch.equal(last, plain[1])
    for k in range(keep):
        shorter = max(length - k, 0)
        assert torch.equal(snapshots[:, k], run(tokens(a, 0, shorter))[1]), k


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 110), st.integers(0, 2**31))
def test_neither_the_batch_nor_the_threads_change_a_bit(batch, length, seed):
    a = inputs(batch, length, seed=seed)
    together = run(a, num_snapshots=2)
    per_row = ("x", "dt", "B", "C", "z", "initial_state")
    for row in range(batch):
        alone = run(a | {k: a[k][row : row + 1] for k in per_row}, num_snapshots=2)
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_[row])
    effinfer.set_num_threads(1)
    try:
        for one, all_ in zip(run(a, num_snapshots=2), together, strict=True):
            assert torch.equal(one, all_)
    finally:
        effinfer.set_num_threads(0)


@pytest.mark.parametrize("lengths", [[5, 0, 60, 1, 0], [0], [], [49, 48]])
def test_packed_sequences(device, lengths):
    total = sum(lengths)
    a = inputs(1, total, device=device)
    first = torch.randn(len(lengths), 4, 12, 20, device=device)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    y, last, snapshots = run(a, initial_state=first, cu_seqlens=ends, num_snapshots=3)
    assert last.shape[0] == len(lengths)
    for s, length in enumerate(lengths):
        at = int(ends[s])
        alone = run(
            tokens(a, at, at + length, initial_state=first[s : s + 1], num_snapshots=3),
        )
        assert torch.equal(y[:, at : at + length], alone[0])
        assert torch.equal(last[s : s + 1], alone[1])
        assert torch.equal(snapshots[s : s + 1], alone[2])


def test_seq_idx_restarts_the_state(device):
    ids = torch.tensor([[0] * 30 + [1] * 55 + [5] * 10, [2] * 95], dtype=torch.int32, device=device)
    a = inputs(2, 95, device=device)
    y, last, snapshots = assert_matches(a, seq_idx=ids, num_snapshots=14)
    row = {k: a[k][:1] for k in ("x", "dt", "B", "C", "z", "initial_state")}
    middle = run(tokens(a | row, 30, 85, initial_state=None))
    assert torch.equal(y[:1, 30:85], middle[0])
    tail = run(tokens(a | row, 85, 95, initial_state=None, num_snapshots=14))
    assert torch.equal(last[:1], tail[1])
    assert torch.equal(snapshots[:1], tail[2])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(0, 2**31))
def test_masked_positions_are_not_there(pad, seed):
    """Padding anywhere, full of NaN, gives the bits of the sequence without it."""
    a = inputs(1, 70, seed=seed)
    keep = torch.ones(70 + pad, dtype=torch.bool)
    keep[torch.randperm(70 + pad, generator=torch.Generator().manual_seed(seed))[:pad]] = False
    padded = dict(a)
    for name in ("x", "dt", "B", "C", "z"):
        wide = torch.full((1, 70 + pad, *a[name].shape[2:]), math.nan)
        wide[:, keep] = a[name]
        padded[name] = wide
    got = run(padded, mask=keep[None], num_snapshots=5)
    want = run(a, num_snapshots=5)
    assert torch.equal(got[0][:, keep], want[0])
    assert torch.equal(got[0][:, ~keep], torch.zeros_like(got[0][:, ~keep]))
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])


def test_mask_on_every_backend(device):
    a = inputs(2, 60, device=device)
    mask = torch.rand(2, 60, device=device) < 0.7
    ids = torch.arange(60, device=device).div(25, rounding_mode="floor").int().repeat(2, 1)
    assert_matches(a, mask=mask, num_snapshots=3)
    assert_matches(a, mask=mask, seq_idx=ids, num_snapshots=30)
    assert_matches(a, mask=torch.zeros_like(mask), num_snapshots=3)


def test_strides(device):
    a = inputs(2, 55, device=device)
    want = run(a)
    wide = torch.full((2, 55, 4 * 12 + 2 * 2 * 20 + 4), math.nan, device=device)
    x, b, c, dt = wide.split([48, 40, 40, 4], -1)
    views = {
        "x": x.unflatten(-1, (4, 12)), "dt": dt,
        "B": b.unflatten(-1, (2, 20)), "C": c.unflatten(-1, (2, 20)),
    }  # fmt: skip
    for name, view in views.items():
        view.copy_(a[name])
    assert all(torch.equal(g, w) for g, w in zip(run(a | views), want, strict=True))
    turned = {
        k: a[k].permute(*reversed(range(a[k].dim()))).contiguous().permute(
            *reversed(range(a[k].dim()))
        )
        for k in ("x", "dt", "B", "C", "z", "initial_state")
    }  # fmt: skip
    assert all(torch.equal(g, w) for g, w in zip(run(a | turned), want, strict=True))


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e15, math.inf, math.nan])
@pytest.mark.parametrize("name", ["x", "B", "C", "dt"])
def test_adversarial_values_stay_behind(device, name, value):
    """A bad token changes nothing before it, and nothing of the other sequence."""
    a = inputs(2, 60, device=device)
    y, _ = run(a)
    a[name] = a[name].clone()
    a[name][1, 31] = value
    bad, last = run(a)
    assert torch.equal(bad[0], y[0])
    assert torch.equal(bad[1, :31], y[1, :31])
    want_y, want_last, _ = reference(a)
    if math.isfinite(value):
        assert_close(bad[0], want_y[0])
        torch.testing.assert_close(
            bad[1].cpu().double(), want_y[1], rtol=1e-4, atol=1e-5 * max(1, value)
        )
    else:
        assert torch.equal(last[1].cpu().isfinite(), want_last[1].isfinite())


def test_zero_state_is_no_state(device):
    a = inputs(1, 60, device=device)
    none, zeros = run(a, initial_state=None), run(a, initial_state=a["initial_state"] * 0)
    assert all(torch.equal(n, z) for n, z in zip(none, zeros, strict=True))


def test_empty_dimensions(device):
    for sizes in [(0, 5, 4, 12, 2, 20), (2, 5, 4, 0, 2, 20), (2, 60, 4, 12, 2, 0)]:
        a = inputs(*sizes, device=device)
        y, last = run(a)
        assert y.shape == a["x"].shape
        assert last.shape == a["initial_state"].shape
        assert_close(y, reference(a)[0])


ERRORS = [
    ({"dt": torch.zeros(2, 9, 3)}, ValueError, r"ssd: dt must have shape \(2, 9, 4\), got"),
    ({"A": torch.zeros(3)}, ValueError, r"ssd: A must have shape \(4,\), got \(3,\)"),
    ({"B": torch.zeros(2, 9, 3, 20)}, ValueError, "B must have a number of groups that divides 4"),
    ({"C": torch.zeros(2, 9, 2, 21)}, ValueError, r"C must have shape \(2, 9, 2, 20\)"),
    ({"C": torch.zeros(2, 9, 2, 20).half()}, TypeError, "C must be float32, got torch.float16"),
    ({"x": torch.zeros(2, 9, 4, 12).double()}, TypeError, "x must be float32 or bfloat16"),
    ({"D": torch.zeros(4, 11)}, ValueError, r"D must have shape \(4, 12\)"),
    ({"z": torch.zeros(2, 9, 4, 13)}, ValueError, "z must have shape"),
    ({"initial_state": torch.zeros(1, 4, 12, 20)}, ValueError, "initial_state must have shape"),
    ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, ValueError, "batch size 1"),
    ({"mask": torch.ones(2, 8, dtype=torch.bool)}, ValueError, "mask must have shape"),
    ({"mask": torch.ones(2, 9)}, TypeError, "mask must be bool"),
    ({"seq_idx": torch.zeros(2, 9)}, TypeError, "seq_idx must be int32"),
    ({"dt_limit": (1.0, 0.5)}, ValueError, "dt_limit must be a pair"),
    ({"num_snapshots": -1}, ValueError, "num_snapshots must be 0 or more"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be 1 or more"),
]


@pytest.mark.parametrize(("change", "kind", "text"), ERRORS)
def test_errors_name_the_argument(device, change, kind, text):
    a = inputs(2, 9, device=device)
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(kind, match=text):
        run(a | change)


@pytest.mark.parametrize("ends", [[1, 9], [0, 5, 4, 9], [0, 8], [0, 10]])
def test_bad_cu_seqlens(ends):
    a = inputs(1, 9) | {"initial_state": None}
    with pytest.raises(ValueError, match="ssd: cu_seqlens must"):
        run(a, cu_seqlens=torch.tensor(ends, dtype=torch.int32))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mismatch_is_refused(data):
    """One argument's shape, type or strides changed at random: an error, or a right result."""
    a = inputs(1, 9)
    tensors = [k for k, v in a.items() if isinstance(v, torch.Tensor)]
    name = data.draw(st.sampled_from(tensors))
    shape = data.draw(st.lists(st.integers(0, 13), min_size=1, max_size=5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int32, torch.float64]))
    changed = a | {name: torch.zeros(shape).to(dtype)}
    try:
        got = run(changed)
    except (ValueError, TypeError):
        return
    assert_close(got[0], reference(changed)[0])


def test_refuses_gradients():
    a = inputs(1, 9)
    a["x"].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        run(a)


def test_registration():
    a = inputs(1, 9)
    tensors = [a[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")]
    args = (*tensors, None, None, None, True, 0.0, math.inf, 2)
    torch.library.opcheck(torch.ops.effinfer.ssd.default, args)
    compiled = torch.compile(lambda t: run(a, x=t)[0] + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(a["x"]), run(a)[0] + 1)


def test_reference_mode_and_isa():
    a = inputs(1, 9)
    with effinfer.use_reference():
        assert_close(run(a)[0], reference(a)[0])
    assert ssd.isa() in ("scalar", "avx2", "avx512", "neon")
