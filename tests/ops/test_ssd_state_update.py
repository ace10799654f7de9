from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import ssd, ssd_state_update
from tests.conftest import BOUNDS, DTYPES, assert_close, relative_error

NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def inputs(batch=3, heads=4, dim=12, groups=2, state=20, *, slots=None, dtype=torch.float32,
           device="cpu", seed=0):  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g)

    args = {
        "state": randn(slots or batch, heads, dim, state),
        "x": randn(batch, heads, dim).to(dtype),
        "dt": (randn(batch, heads) * 0.5).to(dtype),
        "A": -torch.rand(heads, generator=g) * 8 - 0.5,
        "B": randn(batch, groups, state).to(dtype),
        "C": randn(batch, groups, state).to(dtype),
        "D": randn(heads),
        "z": randn(batch, heads, dim).to(dtype),
        "dt_bias": randn(heads) - 3,
    }
    return {name: t.to(device) for name, t in args.items()} | {"dt_softplus": True}


def run(a, **changes):
    """(y, state afterwards); the arguments' own state stays as it is."""
    a = a | changes
    state = a["state"].clone(memory_format=torch.preserve_format)
    return ssd_state_update(**a | {"state": state}), state


def reference(a, **changes):
    """The same in float64 on the CPU."""
    a = a | changes
    tensors = [None if a[k] is None else a[k].cpu().double().clone() for k in NAMES]
    indices = a.get("state_indices")
    limits = a.get("dt_limit", (0.0, math.inf))
    y = ssd_state_update.reference(
        *tensors, a["dt_softplus"], *limits, None if indices is None else indices.cpu()
    )
    return y, tensors[0]


def assert_matches(a, **changes):
    (y, state), (want_y, want_state) = run(a, **changes), reference(a, **changes)
    assert_close(y, want_y, BOUNDS[a["x"].dtype])
    assert_close(state, want_state, BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(device, dtype):
    a = inputs(dtype=dtype, device=device)
    assert run(a)[0].dtype is dtype
    assert_matches(a)
    assert_matches(a, D=None, z=None, dt_bias=None)
    assert_matches(a, dt_softplus=False, dt_limit=(0.01, 0.3))


@pytest.mark.parametrize("wide", ["dt", "A", "D", "dt_bias", "all"])
def test_arguments_per_channel(device, wide):
    a = inputs(device=device)
    per_channel = {
        "dt": torch.randn(3, 4, 12, device=device),
        "A": -torch.rand(4, 12, 20, device=device) * 4,
        "D": torch.randn(4, 12, device=device),
        "dt_bias": torch.randn(4, 12, device=device) - 3,
    }
    assert_matches(a | {k: v for k, v in per_channel.items() if wide in (k, "all")})


@pytest.mark.parametrize(
    ("heads", "dim", "groups", "state"),
    [(1, 1, 1, 1), (3, 5, 1, 7), (2, 64, 1, 128), (6, 33, 3, 50), (2, 17, 2, 256), (2, 0, 1, 4)],
)
def test_shapes(device, heads, dim, groups, state):
    assert_matches(inputs(2, heads, dim, groups, state, device=device))


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_slots(device, batch):
    """Rows use the slots they name; slot -1 and the slots nobody names stay as they were."""
    a = inputs(batch, slots=9, device=device)
    indices = torch.tensor([7, -1, 0, 8, -1][:batch], dtype=torch.int32, device=device)
    y, state = run(a, state_indices=indices)
    want_y, want_state = reference(a, state_indices=indices)
    assert_close(y, want_y)
    assert_close(state, want_state)
    for row in range(batch):
        if indices[row] < 0:
            assert torch.equal(y[row], torch.zeros_like(y[row]))
    idle = [s for s in range(9) if s not in indices.tolist()]
    assert torch.equal(state[idle], a["state"][idle])


def test_a_skipped_row_reads_nothing(device):
    a = inputs(2, slots=2, device=device)
    for name in ("x", "dt", "B", "C", "z"):
        a[name][1] = math.nan
    indices = torch.tensor([1, -1], dtype=torch.int32, device=device)
    y, state = run(a, state_indices=indices)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert state.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**31))
def test_neither_the_batch_nor_the_threads_change_a_bit(batch, seed):
    a = inputs(batch, 4, 40, 2, 70, seed=seed)
    y, state = run(a)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    rows = ("state", "x", "dt", "B", "C", "z")
    turned = run(a | {k: a[k][order] for k in rows})
    assert torch.equal(turned[0], y[order])
    assert torch.equal(turned[1], state[order])
    effinfer.set_num_threads(1)
    try:
        alone = run(a)
    finally:
        effinfer.set_num_threads(0)
    assert torch.equal(alone[0], y)
    assert torch.equal(alone[1], state)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**31))
def test_token_by_token_is_the_scan(length, seed):
    a = inputs(2, seed=seed)
    g = torch.Generator().manual_seed(seed)
    long = {
        k: torch.randn((2, length, *a[k].shape[1:]), generator=g)
        for k in ("x", "dt", "B", "C", "z")
    }
    state, pieces = a["state"].clone(), []
    for t in range(length):
        step = {k: v[:, t] for k, v in long.items()}
        pieces.append(ssd_state_update(**a | step | {"state": state}))
    shared = {k: a[k] for k in ("A", "D", "dt_bias", "dt_softplus")}
    y, last = ssd(**shared, **long, initial_state=a["state"])
    assert relative_error(torch.stack(pieces, 1), y.double()) <= 2e-6
    assert relative_error(state, last.double()) <= 2e-6


def test_strides(device):
    """Any strides are right: the same bits where N is dense, the same values where it is not."""
    a = inputs(device=device)
    y, state = run(a)
    pool = torch.full((3, 9, 12, 25), math.nan, device=device)
    view = pool[:, 2:6, :, 3:23]
    view.copy_(a["state"])
    got = ssd_state_update(**a | {"state": view})
    assert torch.equal(got, y)
    assert torch.equal(view, state)
    outside = torch.ones_like(pool, dtype=torch.bool)
    outside[:, 2:6, :, 3:23] = False
    assert pool[outside].isnan().all()  # nothing around the view was written
    turned = {
        k: a[k].permute(*reversed(range(a[k].dim()))).contiguous().permute(
            *reversed(range(a[k].dim()))
        )
        for k in ("state", "x", "dt", "B", "C", "z")
    }  # fmt: skip
    assert_matches(a | turned)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e15, math.inf, math.nan])
@pytest.mark.parametrize("name", ["x", "B", "C", "dt"])
def test_adversarial_values_stay_in_their_row(device, name, value):
    a = inputs(2, device=device)
    y, state = run(a)
    a[name][1] = value
    bad_y, bad_state = run(a)
    assert torch.equal(bad_y[0], y[0])
    assert torch.equal(bad_state[0], state[0])
    want_y, want_state = reference(a)
    if math.isfinite(value):
        assert_close(bad_y[1], want_y[1])
        assert_close(bad_state[1], want_state[1])
    else:
        assert torch.equal(bad_state[1].cpu().isfinite(), want_state[1].isfinite())


ERRORS = [
    ({"dt": torch.zeros(3, 5)}, ValueError, r"dt must have shape \(3, 4\), got \(3, 5\)"),
    ({"A": torch.zeros(3)}, ValueError, r"ssd_state_update: A must have shape \(4,\)"),
    ({"A": torch.zeros(4, 12)}, ValueError, r"A must have shape \(4, 12, 20\)"),
    ({"B": torch.zeros(3, 3, 20)}, ValueError, "B must have a number of groups that divides 4"),
    ({"C": torch.zeros(3, 2, 20).half()}, TypeError, "C must be float32, got torch.float16"),
    ({"state": torch.zeros(3, 4, 12, 20).half()}, TypeError, "state must be float32"),
    ({"state": torch.zeros(5, 4, 12, 20)}, ValueError, "state must have one slot for each of 3"),
    ({"state": torch.zeros(1, 4, 12, 20).expand(3, 4, 12, 20)}, ValueError, "not overlap itself"),
    ({"D": torch.zeros(4, 11)}, ValueError, r"D must have shape \(4, 12\)"),
    ({"z": torch.zeros(3, 4, 13)}, ValueError, "z must have shape"),
    ({"dt_limit": (1.0, 0.5)}, ValueError, "dt_limit must be a pair"),
    ({"state_indices": torch.zeros(3)}, TypeError, "state_indices must be int32"),
]


@pytest.mark.parametrize(("change", "kind", "text"), ERRORS)
def test_errors_name_the_argument(device, change, kind, text):
    a = inputs(device=device)
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(kind, match=text):
        ssd_state_update(**a | change)


@pytest.mark.parametrize("slots", [[0, 1, 0], [0, 1, 3], [0, 1, -2]])
def test_bad_slots_change_no_state(slots):
    a = inputs()
    before = a["state"].clone()
    with pytest.raises(ValueError, match="ssd_state_update: state_indices must"):
        ssd_state_update(**a, state_indices=torch.tensor(slots, dtype=torch.int32))
    assert torch.equal(a["state"], before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mismatch_is_refused(data):
    """One argument's shape or type changed at random: an error, or a right result."""
    a = inputs()
    name = data.draw(st.sampled_from(NAMES))
    shape = data.draw(st.lists(st.integers(0, 13), min_size=1, max_size=5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int32, torch.float64]))
    changed = a | {name: torch.zeros(shape).to(dtype)}
    try:
        y, state = run(changed)
    except (ValueError, TypeError):
        return
    want_y, want_state = reference(changed)
    assert_close(y, want_y)
    assert_close(state, want_state)


def test_refuses_gradients():
    a = inputs()
    a["x"].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        ssd_state_update(**a)


def test_registration():
    a = inputs()
    indices = torch.tensor([2, -1, 0], dtype=torch.int32)
    args = (*(a[k] for k in NAMES), True, 0.0, math.inf, indices)
    torch.library.opcheck(torch.ops.effinfer.ssd_state_update.default, args)
    compiled = torch.compile(
        lambda s, t: ssd_state_update(**a | {"state": s, "x": t}), fullgraph=True, backend="eager"
    )
    state = a["state"].clone()
    y = compiled(state, a["x"])
    want_y, want_state = run(a)
    assert torch.equal(y, want_y)
    assert torch.equal(state, want_state)


def test_reference_mode_and_isa():
    a = inputs()
    with effinfer.use_reference():
        assert_close(run(a)[0], reference(a)[0])
    assert ssd_state_update.isa() in ("scalar", "avx2", "avx512", "neon")
