from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import selective_scan, selective_state_update, ssd_state_update
from tests.conftest import DTYPES, assert_close


def make(batch=3, dim=24, state=16, *, slots=None, groups=0, device="cpu", dtype=torch.float32):
    torch.manual_seed(1000 * dim + state)
    matrix = (batch, groups, state) if groups else (batch, state)
    x, dt, z = (torch.randn(batch, dim, device=device).to(dtype) for _ in range(3))
    b, c = (torch.randn(matrix, device=device).to(dtype) for _ in range(2))
    return {
        "state": torch.randn(slots or batch, dim, state, device=device),
        "x": x,
        "dt": dt,
        "A": -torch.rand(dim, state, device=device) * 16 - 0.01,
        "B": b,
        "C": c,
        "D": torch.randn(dim, device=device),
        "z": z,
        "dt_bias": torch.randn(dim, device=device) - 2,
        "dt_softplus": True,
    }


def check(args, indices=None):
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in args.items()}
    wide["state"] = wide["state"].clone()
    want = selective_state_update.reference(*wide.values(), indices)
    y = selective_state_update(**args, state_indices=indices)
    assert_close(y, want)
    assert_close(args["state"], wide["state"])
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "dim", "state"), [(1, 1, 1), (3, 24, 16), (2, 67, 7), (1, 130, 33), (2, 5, 300)]
)
def test_matches_float64(device, dtype, batch, dim, state):
    check(make(batch, dim, state, device=device, dtype=dtype))


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias"])
def test_optional_arguments(device, missing):
    check(make(device=device) | {missing: None})


@pytest.mark.parametrize("groups", [1, 2, 24])
def test_grouped(device, groups):
    check(make(groups=groups, device=device))


def test_slots(device):
    args = make(4, slots=6, device=device)
    before = args["state"].clone()
    y = check(args, torch.tensor([5, -1, 0, 2], dtype=torch.int32, device=device))
    assert not y[1].any()
    untouched = [1, 3, 4]
    assert torch.equal(args["state"][untouched], before[untouched])


@pytest.mark.parametrize("slots", [[0, 0, 1], [0, 1, 3], [0, 1, -2]])
def test_bad_slots_leave_the_states_alone(slots):
    args = make()
    before = args["state"].clone()
    with pytest.raises(ValueError, match="selective_state_update: state_indices must"):
        selective_state_update(**args, state_indices=torch.tensor(slots, dtype=torch.int32))
    assert torch.equal(args["state"], before)


def test_any_strides(device):
    args = make(device=device)
    strided = dict(args)
    strided["state"] = args["state"].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("x", "dt", "z", "B", "C"):
        strided[name] = args[name].t().contiguous().t()
    args["state"] = args["state"].clone()
    y = selective_state_update(**args)
    assert_close(selective_state_update(**strided), y.double())
    assert_close(strided["state"], args["state"].double())


def test_steps_are_the_scan(device):
    args = make(2, device=device)
    args["state"].zero_()
    torch.manual_seed(1)
    u, delta, z = (torch.randn(2, 24, 9, device=device) for _ in range(3))
    b, c = (torch.randn(2, 16, 9, device=device) for _ in range(2))
    y, last = selective_scan(u, delta, args["A"], b, c, args["D"], z, args["dt_bias"], True)
    for t in range(9):
        now = {"x": u, "dt": delta, "z": z, "B": b, "C": c}
        step = selective_state_update(**(args | {k: v[..., t] for k, v in now.items()}))
        assert_close(step, y[..., t].double(), 2e-6)  # each within 1e-6 of the truth
    assert_close(args["state"], last.double(), 2e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**31))
def test_a_row_ignores_its_neighbours_and_the_threads(batch, dim, state, seed):
    args = make(batch, dim, state)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    shuffled = {
        k: v[order] if k in ("state", "x", "dt", "B", "C", "z") else v for k, v in args.items()
    }
    y = selective_state_update(**args)
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(selective_state_update(**shuffled), y[order])
    finally:
        effinfer.set_num_threads(0)
    assert torch.equal(shuffled["state"], args["state"][order])


def test_four_dimensional_state_is_mamba2():
    torch.manual_seed(0)
    state, x, dt = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4), torch.randn(2, 3)
    a, b, c = -torch.rand(3), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    other = state.clone()
    y = selective_state_update(state, x, dt, a, b, c, dt_softplus=True)
    assert torch.equal(y, ssd_state_update(other, x, dt, a, b, c, dt_softplus=True))
    assert torch.equal(state, other)


def test_errors_name_the_argument(device):
    args = make(device=device)
    with pytest.raises(ValueError, match=r"dt must have shape \(3, 24\), got \(2, 24\)"):
        selective_state_update(**(args | {"dt": args["dt"][:2]}))
    with pytest.raises(ValueError, match="B must have a number of groups that divides 24"):
        selective_state_update(**(args | dict.fromkeys("BC", torch.randn(3, 5, 16, device=device))))
    with pytest.raises(TypeError, match="state must be float32"):
        selective_state_update(**(args | {"state": args["state"].bfloat16()}))
    with pytest.raises(ValueError, match="state must not overlap itself"):
        selective_state_update(**(args | {"state": args["state"][:1].expand(3, -1, -1)}))


def test_registration():
    args = list(make().values())
    torch.library.opcheck(torch.ops.effinfer.selective_state_update.default, (*args, None))
    named, other = make(), make()

    def step(x):
        return selective_state_update(**(named | {"x": x})) + 1

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(named["x"]), selective_state_update(**other) + 1)
    assert torch.equal(named["state"], other["state"])
