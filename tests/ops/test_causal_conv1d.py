from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import causal_conv1d
from tests.conftest import DTYPES, assert_close

LAYOUTS = ("channel-major", "time-major", "strided", "reversed")
# D, L: below, at and above a vector, a tile of rows, a block of channels, a part of times.
SHAPES = [(1, 1), (3, 2), (8, 40), (17, 131), (70, 33), (515, 37), (33, 300)]


def laid_out(x, layout):
    if layout == "channel-major":
        return x.contiguous()
    if layout == "time-major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "reversed":
        wide = x.new_full((x.shape[0], x.shape[1], x.shape[2], 3), float("nan"))
        wide[..., 1] = x.flip(2)
        return wide[..., 1].flip(2)
    wide = x.new_full((x.shape[0], 2 * x.shape[1], 3 * x.shape[2]), float("nan"))
    wide[:, ::2, ::3] = x
    return wide[:, ::2, ::3]


def inputs(batch, dim, length, width, device="cpu", dtype=torch.float32, dilation=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    past = (width - 1) * dilation
    x = torch.randn(batch, dim, length, generator=g).to(device, dtype)
    weight = torch.randn(dim, width, generator=g).to(device) * width**-0.5
    bias = torch.randn(dim, generator=g).to(device)
    return x, weight, bias, torch.randn(batch, dim, past, generator=g).to(device)


def check(x, weight, bias, silu, state=None, dilation=1, cu=None, mask=None, snapshots=0):
    doubles = [None if t is None else t.double() for t in (x, weight, bias, state)]
    want, states = causal_conv1d.reference(
        *doubles[:3], silu, doubles[3], dilation, cu, mask, snapshots
    )
    activation = "silu" if silu else None
    got = causal_conv1d(
        x,
        weight,
        bias,
        activation,
        initial_state=state,
        dilation=dilation,
        cu_seqlens=cu,
        mask=mask,
        num_snapshots=snapshots,
    )
    assert got[0].dtype == x.dtype
    assert_close(got[0], want)
    assert torch.equal(got[-1].double(), states)  # copies are exact
    if snapshots:
        assert torch.equal(got[1], got[2][:, 0])
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_float64(device, dtype, layout):
    for width in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12):
        dim, length = SHAPES[width % len(SHAPES)]
        x, weight, bias, state = inputs(2, dim, length, width, device, dtype)
        x = laid_out(x, layout)
        check(x, weight, bias, True)
        check(x, weight, None, False, state)


@pytest.mark.parametrize(("dim", "length"), SHAPES)
def test_shapes(device, dim, length):
    for layout in LAYOUTS:
        x, weight, bias, state = inputs(2, dim, length, 4, device)
        y = check(laid_out(x, layout), weight, bias, True, state, snapshots=3)[0]
        if layout == "time-major" and dim > 1 and length > 1:
            assert y.stride(1) == 1  # the input's memory order


@pytest.mark.parametrize("dilation", [2, 3, 16])
def test_dilation(device, dilation):
    for layout in LAYOUTS:
        for width, length in ((2, 50), (4, 41), (8, 200), (11, 70)):
            x, weight, bias, state = inputs(1, 20, length, width, device, dilation=dilation)
            check(laid_out(x, layout), weight, bias, True, state, dilation, snapshots=2)


def test_packed_sequences(device):
    for layout in LAYOUTS:
        x, weight, bias, _ = inputs(1, 37, 90, 4, device)
        cu = torch.tensor([0, 0, 1, 3, 40, 40, 90, 90], dtype=torch.int32, device=device)
        state = torch.randn(7, 37, 3, device=device)
        check(laid_out(x, layout), weight, bias, True, state, cu=cu, snapshots=4)
        check(laid_out(x, layout), weight, bias, True, None, cu=cu)


@pytest.mark.parametrize("width", [2, 4, 7, 10])
def test_masked_positions_count_as_zero(device, width):
    for layout in LAYOUTS:
        x, weight, bias, state = inputs(4, 21, 60, width, device)
        mask = torch.rand(4, 60, device=device) > 0.2
        mask[0, :30] = False  # padding on the left, on the right, everywhere
        mask[1, 40:] = False
        mask[2] = False
        x.masked_fill_(~mask[:, None], float("nan"))
        y = check(laid_out(x, layout), weight, bias, True, state, mask=mask, snapshots=5)[0]
        assert (y.masked_select(~mask[:, None]) == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 60),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 60),
    st.sampled_from(LAYOUTS),
    st.integers(0, 2**31),
)
def test_split_anywhere_is_one_shot(dim, length, width, dilation, cut, layout, seed):
    cut = min(cut, length)
    x, weight, bias, state = inputs(2, dim, length, width, dilation=dilation, seed=seed)
    x = laid_out(x, layout)
    options = {"activation": "silu", "dilation": dilation}
    whole, last = causal_conv1d(x, weight, bias, initial_state=state, **options)
    first, middle = causal_conv1d(x[..., :cut], weight, bias, initial_state=state, **options)
    second, end = causal_conv1d(x[..., cut:], weight, bias, initial_state=middle, **options)
    assert torch.equal(torch.cat([first, second], 2), whole)
    assert torch.equal(end, last)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 600),
    st.integers(1, 200),
    st.integers(2, 8),
    st.sampled_from(LAYOUTS),
    st.integers(0, 2**31),
)
def test_bits_ignore_batch_threads_and_layout(batch, dim, length, width, layout, seed):
    x, weight, bias, _ = inputs(batch, dim, length, width, seed=seed)
    y, state = causal_conv1d(laid_out(x, layout), weight, bias, "silu")
    order = torch.randperm(batch)
    permuted = causal_conv1d(x[order], weight, bias, "silu")
    assert torch.equal(permuted[0], y[order])
    assert torch.equal(permuted[1], state[order])
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(causal_conv1d(x, weight, bias, "silu")[0], y)
    finally:
        effinfer.set_num_threads(0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbouring_memory_is_untouched(device, layout):
    x, weight, bias, _ = inputs(1, 19, 45, 4, device)
    wide = torch.full((1, 40, 80), float("nan"), device=device)
    if layout == "time-major":
        wide = wide.transpose(1, 2).contiguous().transpose(1, 2)
    wide[:, 7:26, 11:56] = x
    inside = wide[:, 7:26, 11:56]
    assert torch.equal(causal_conv1d(inside, weight, bias)[0], causal_conv1d(x, weight, bias)[0])


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e18, -1e18, float("inf"), float("nan"), -200.0])
def test_adversarial_values(device, value):
    x, weight, bias, _ = inputs(1, 16, 40, 4, device)
    x[0, 3, 20] = value
    for silu in (False, True):
        got = causal_conv1d(x, weight, bias, "silu" if silu else None)[0].double()
        want = causal_conv1d.reference(x, weight, bias, silu)[0].double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_empty(device):
    for batch, dim, length in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        x, weight, bias, state = inputs(batch, dim, length, 4, device)
        y, last = causal_conv1d(x, weight, bias, initial_state=state)
        assert y.shape == x.shape
        assert torch.equal(last[..., -3:], state if length == 0 else last)
    x, weight, bias, _ = inputs(1, 3, 0, 4, device)
    cu = torch.zeros(1, dtype=torch.int32, device=device)
    assert causal_conv1d(x, weight, bias, cu_seqlens=cu)[1].shape == (0, 3, 3)


def test_errors_name_the_argument(device):
    x, weight, bias, state = inputs(2, 8, 10, 4, device)
    cases = [
        (ValueError, r"x must have shape \(B, D, L\)", (x[0], weight), {}),
        (ValueError, r"weight must have shape \(8, any\), got \(4, 8\)", (x, weight.t()), {}),
        (ValueError, r"weight must have shape \(D, W\)", (x, weight[:, :0]), {}),
        (ValueError, r"bias must have shape \(8,\), got \(7,\)", (x, weight, bias[:7]), {}),
        (TypeError, "x must be float32 or bfloat16 or float16", (x.double(), weight), {}),
        (ValueError, "activation must be", (x, weight, bias, "gelu"), {}),
        (ValueError, "dilation must be 1 or more", (x, weight), {"dilation": 0}),
        (ValueError, "num_snapshots must be 0", (x, weight), {"num_snapshots": -1}),
        (ValueError, r"initial_state must have shape", (x, weight), {"initial_state": state[:1]}),
        (TypeError, "mask must be bool", (x, weight), {"mask": torch.ones(2, 10, device=device)}),
    ]
    for cu, message in (
        ([0, 11], "end at"),
        ([1, 10], "start at 0"),
        ([0, 7, 5, 10], "never fall"),
    ):
        packed = torch.tensor(cu, dtype=torch.int32, device=device)
        if x.is_cpu:  # a GPU's kernel skips what is out of range
            cases.append((ValueError, message, (x[:1], weight), {"cu_seqlens": packed}))
    packed = torch.tensor([0, 10], dtype=torch.int32, device=device)
    cases.append((ValueError, "batch of 1", (x, weight), {"cu_seqlens": packed}))
    for error, message, args, options in cases:
        with pytest.raises(error, match=f"causal_conv1d: .*{message}"):
            causal_conv1d(*args, **options)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        causal_conv1d(x.clone().requires_grad_(), weight)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fuzzed_shapes_raise_or_are_right(data):
    def tensor(*dims):
        shape = [data.draw(st.sampled_from([d, d, d, 0, d + 1])) for d in dims]
        return torch.randn(shape[: data.draw(st.sampled_from([len(dims)] * 4 + [1, 2]))])

    x, weight, bias, state = tensor(2, 5, 9), tensor(5, 3), tensor(5), tensor(2, 5, 2)
    try:
        y, last = causal_conv1d(x, weight, bias, initial_state=state)
    except (ValueError, TypeError) as error:
        assert str(error).startswith("causal_conv1d: ")  # noqa: PT017
    else:
        want, want_last = causal_conv1d.reference(x.double(), weight, bias, False, state)
        assert_close(y, want)
        assert torch.equal(last.double(), want_last)


def test_registration():
    x, weight, bias, state = inputs(2, 8, 10, 4)
    op = torch.ops.effinfer.causal_conv1d.default
    torch.library.opcheck(op, (x, weight, bias, True, state, 1, None, None, 0))
    mask = torch.ones(2, 10, dtype=torch.bool)
    torch.library.opcheck(op, (x, weight, None, False, None, 2, None, mask, 3))
    compiled = torch.compile(
        lambda t: causal_conv1d(t, weight, bias, "silu")[0] + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), causal_conv1d(x, weight, bias, "silu")[0] + 1)
