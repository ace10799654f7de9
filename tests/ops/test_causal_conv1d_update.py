from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import causal_conv1d, causal_conv1d_update
from tests.conftest import DTYPES, assert_close


def inputs(batch, dim, length, width, columns, device="cpu", dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, length, generator=g).to(device, dtype)
    weight = torch.randn(dim, width, generator=g).to(device) * width**-0.5
    bias = torch.randn(dim, generator=g).to(device)
    return x, torch.randn(batch, dim, columns, generator=g).to(device), weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_matches_float64(device, dtype, state_dtype):
    for width, dim, extra in (
        (1, 5, 0),
        (2, 16, 1),
        (3, 9, 0),
        (4, 100, 1),
        (7, 33, 0),
        (11, 17, 3),
    ):
        x, state, weight, bias = inputs(3, dim, 2, width, width - 1 + extra, device, dtype)
        state = state.to(state_dtype)
        for t in range(2):  # one by one: the state rounds what it takes in
            wide = state.double()
            doubles = (x[..., t].double(), wide, weight.double(), bias.double(), True)
            want = causal_conv1d_update.reference(*doubles)
            assert_close(causal_conv1d_update(x[..., t], state, weight, bias, "silu"), want)
            assert torch.equal(state, wide.to(state_dtype))


def channels_dense(state):
    return state.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(state):
    return state.repeat_interleave(2, 1).repeat_interleave(3, 2)[:, ::2, ::3]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from([torch.Tensor.contiguous, channels_dense, every_other]),
    st.integers(0, 2**31),
)
def test_steps_have_the_bits_of_the_whole(dim, length, width, dilation, extra, layout, seed):
    past = (width - 1) * dilation
    x, state, weight, bias = inputs(2, dim, length, width, past + extra, seed=seed)
    initial = state[..., extra:].clone()
    want, last = causal_conv1d(x, weight, bias, "silu", initial_state=initial, dilation=dilation)
    state = layout(state)
    chunk = state.clone()
    steps = [
        causal_conv1d_update(x[..., t], state, weight, bias, "silu", dilation=dilation)
        for t in range(length)
    ]
    assert torch.equal(torch.stack(steps, 2), want)
    together = causal_conv1d_update(x, chunk, weight, bias, "silu", dilation=dilation)
    assert torch.equal(together, want)
    assert torch.equal(chunk, state)
    assert torch.equal(state[..., state.shape[2] - past :], last)


def test_slots(device):
    x, _, weight, bias = inputs(4, 19, 1, 4, 4, device)
    pool = torch.randn(6, 19, 4, device=device)
    before = pool.clone()
    indices = torch.tensor([5, -1, 0, 2], dtype=torch.int32, device=device)
    y = causal_conv1d_update(x[..., 0], pool, weight, bias, "silu", state_indices=indices)
    assert (y[1] == 0).all()
    for row, slot in ((0, 5), (2, 0), (3, 2)):
        state = before[slot : slot + 1].clone()
        alone = causal_conv1d_update(x[row : row + 1, :, 0], state, weight, bias, "silu")
        assert torch.equal(alone[0], y[row])
        assert torch.equal(state[0], pool[slot])
    assert torch.equal(pool[[1, 3, 4]], before[[1, 3, 4]])


def test_strides_and_threads(device):
    x, state, weight, bias = inputs(16, 700, 1, 4, 4, device)
    want = causal_conv1d_update(x, state.clone(), weight, bias)
    wide = torch.full((16, 1400, 2), float("nan"), device=device)
    wide[:, ::2, :1] = x
    assert torch.equal(causal_conv1d_update(wide[:, ::2, :1], state.clone(), weight, bias), want)
    padded = torch.full((16, 700, 9), float("nan"), device=device)
    padded[..., 2:6] = state
    assert torch.equal(causal_conv1d_update(x, padded[..., 2:6], weight, bias), want)
    assert padded[..., [0, 1, 6, 7, 8]].isnan().all()
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(causal_conv1d_update(x, state, weight, bias), want)
    finally:
        effinfer.set_num_threads(0)


def test_errors_leave_the_states_alone(device):
    x, state, weight, bias = inputs(2, 8, 1, 4, 4, device)
    before = state.clone()

    def slots(*values):
        return {"state_indices": torch.tensor(values, dtype=torch.int32, device=device)}

    cases = [
        (ValueError, "x must have shape", (x[0, :, 0], state, weight), {}),
        (ValueError, "conv_state must have shape", (x, state[:, :7], weight), {}),
        (ValueError, "conv_state must have at least 3", (x, state[..., :2], weight), {}),
        (ValueError, "conv_state must have at least 3", (x, state, weight), {"dilation": 2}),
        (ValueError, "conv_state must have one slot", (x[:1], state, weight), {}),
        (ValueError, "conv_state must not overlap", (x, state[:1].expand(2, 8, 4), weight), {}),
        (ValueError, "dilation must be 1", (x, state, weight), {"dilation": 0}),
        (ValueError, "activation must be", (x, state, weight, bias, "relu"), {}),
        (ValueError, "state_indices must have shape", (x, state, weight), slots(0)),
        (TypeError, "conv_state must be float32", (x, state.double(), weight), {}),
    ]
    if x.is_cpu:  # a GPU's kernel skips what is out of range
        cases += [
            (ValueError, "state_indices must be -1 or in", (x, state, weight), slots(0, 2)),
            (ValueError, "state_indices must be -1 or in", (x, state, weight), slots(-2, 0)),
            (ValueError, "state_indices must not repeat", (x, state, weight), slots(1, 1)),
        ]
    for error, message, args, options in cases:
        with pytest.raises(error, match=f"causal_conv1d_update: {message}"):
            causal_conv1d_update(*args, **options)
    assert torch.equal(state, before)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        causal_conv1d_update(x.clone().requires_grad_(), state, weight)


def test_empty(device):
    for batch, dim, length in ((0, 3, 1), (2, 0, 1), (2, 3, 0)):
        x, state, weight, bias = inputs(batch, dim, length, 4, 3, device)
        before = state.clone()
        assert causal_conv1d_update(x, state, weight, bias).shape == x.shape
        assert torch.equal(state, before)


def test_registration():
    x, state, weight, bias = inputs(2, 8, 1, 4, 4)
    op = torch.ops.effinfer.causal_conv1d_update.default
    slots = torch.tensor([1, -1], dtype=torch.int32)
    torch.library.opcheck(op, (x, state, weight, bias, True, 1, None))
    torch.library.opcheck(op, (x[..., 0], state, weight, None, False, 1, slots))
    compiled = torch.compile(
        lambda t, s: causal_conv1d_update(t, s, weight, bias) + 1, fullgraph=True, backend="eager"
    )
    one, other = state.clone(), state.clone()
    assert torch.equal(compiled(x, one), causal_conv1d_update(x, other, weight, bias) + 1)
    assert torch.equal(one, other)
