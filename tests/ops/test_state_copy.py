from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effinfer.ops import (
    causal_conv1d,
    causal_conv1d_update,
    state_copy,
    state_fork,
    state_gather,
    state_rollback,
    state_scatter,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


def slots(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def pool_of(shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * 100).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 1, 3, 5, 2)])
def test_gather_and_scatter(device, dtype, shape):
    pool = pool_of((6, *shape), dtype, device)
    before = pool.clone()
    indices = slots(4, -1, 0, 4, device=device)
    states = state_gather(pool, indices)
    assert torch.equal(states[[0, 2, 3]], before[[4, 0, 4]])
    assert (states[1] == 0).all()
    new = pool_of((3, *shape), dtype, device, seed=1)
    state_scatter(pool, slots(2, -1, 5, device=device), new)
    before[2], before[5] = new[0], new[2]
    assert torch.equal(pool, before)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(0, 2**31))
def test_fork_reads_all_before_it_writes(data, size, seed):
    pool = pool_of((size, 3, 2), seed=seed)
    count = data.draw(st.integers(0, size))
    to = data.draw(st.permutations(range(size)))[:count]
    sources = st.lists(st.integers(-1, size - 1), min_size=count, max_size=count)
    origin = data.draw(sources)
    want = pool.clone()
    for t, f in zip(to, origin, strict=True):
        if f >= 0:
            want[t] = pool[f]
    state_fork(pool, slots(*origin), slots(*to))
    assert torch.equal(pool, want)


def test_strides_and_special_values(device):
    pool = torch.full((4, 6, 10), 7.0, device=device)
    view = pool[:, ::2, 1:9:3].transpose(1, 2)
    src = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42], device=device)
    src = src.view(4, 1, 1).expand(4, *view.shape[1:])
    state_copy(view, slots(3, 0, device=device), src, slots(0, 3, device=device))
    assert torch.equal(
        view[3].contiguous().view(torch.int32), src[0].contiguous().view(torch.int32)
    )
    assert torch.equal(view[0], src[3])
    rest = pool.clone()
    rest[:, ::2, 1:9:3] = 7.0
    assert (rest == 7.0).all()


def test_rollback_is_never_having_run(device):
    """Rejecting the last tokens leaves the bits that a run without them has."""
    x = torch.randn(3, 10, 12, device=device)
    weight = torch.randn(10, 4, device=device)
    pool = torch.zeros(5, 10, 3, device=device)
    indices = slots(4, 0, 2, device=device)
    _, last, snapshots = causal_conv1d(x, weight, num_snapshots=5)
    state_scatter(pool, indices, last)
    steps = slots(0, 4, 2, device=device)
    state_rollback(pool, indices, snapshots, steps)
    for row, (slot, back) in enumerate(((4, 0), (0, 4), (2, 2))):
        kept = x[row : row + 1, :, : 12 - back]
        assert torch.equal(pool[slot], causal_conv1d(kept, weight)[1][0])
        again = causal_conv1d_update(x[row : row + 1, :, 5], pool[slot : slot + 1].clone(), weight)
        assert torch.isfinite(again).all()
    state_rollback(pool, slots(1, -1, 3, device=device), snapshots, 1)
    assert torch.equal(pool[1], snapshots[0, 1])


def test_errors_leave_the_pool_alone(device):
    pool = pool_of((4, 3), device=device)
    src = pool_of((2, 3), device=device)
    before = pool.clone()

    def at(*values):
        return slots(*values, device=device)

    cases = [
        (ValueError, "src must hold states", (pool, at(0), src[:, :2], at(0))),
        (ValueError, "src must have dst's dtype", (pool, at(0), src.half(), at(0))),
        (ValueError, "src_indices must have shape", (pool, at(0, 1), src, at(0))),
        (TypeError, "dst_indices must be int32", (pool, at(0).long(), src, at(0))),
        (ValueError, "dst must not overlap itself", (pool[:1].expand(4, 3), at(0), src, at(0))),
        (ValueError, "src must be dst itself", (pool[1:], at(0), pool[:3], at(0))),
    ]
    if pool.is_cpu:  # a GPU's kernel skips what is out of range
        cases += [
            (ValueError, "dst_indices must be -1 or in", (pool, at(4), src, at(0))),
            (ValueError, "src_indices must be -1 or in", (pool, at(0), src, at(-2))),
            (ValueError, "dst_indices must not repeat", (pool, at(1, 1), src, at(0, 1))),
            (ValueError, "src_indices must not name", (pool, at(0, 1), pool, at(1, 2))),
        ]
    for error, message, args in cases:
        with pytest.raises(error, match=f"state_copy: {message}"):
            state_copy(*args)
    snapshots = torch.zeros(1, 2, 3, device=device)
    for steps in (2, -1):
        with pytest.raises(ValueError, match="state_rollback: steps must be in"):
            state_rollback(pool, at(0), snapshots, steps)
    with pytest.raises(ValueError, match="state_rollback: steps must have shape"):
        state_rollback(pool, at(0), snapshots, at(0, 1))
    assert torch.equal(pool, before)
    state_copy(pool, at(1), pool, at(1))  # a slot onto itself is nothing
    assert torch.equal(pool, before)


def test_empty(device):
    pool = torch.zeros(0, 3, device=device)
    assert state_gather(pool, slots(device=device)).shape == (0, 3)
    assert state_gather(torch.zeros(2, 0, device=device), slots(1, device=device)).shape == (1, 0)


def test_registration():
    pool, src = pool_of((4, 3)), pool_of((2, 3))
    op = torch.ops.effinfer.state_copy.default
    torch.library.opcheck(op, (pool, slots(0, 3), src, slots(1, -1)))
    compiled = torch.compile(
        lambda p: state_scatter(p, slots(1, 2), src), fullgraph=True, backend="eager"
    )
    compiled(pool)
    assert torch.equal(pool[1:3], src)
