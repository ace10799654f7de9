from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import (
    binary_conv2d,
    binary_conv2d_fixed,
    pack_binary_conv2d,
    pack_signs,
    unpack_binary_conv2d,
)
from tests.conftest import DTYPES, assert_close

# (in, out, kernel, stride, padding, dilation, height, width)
CASES = [
    (1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, 1),
    (8, 32, (3, 3), (1, 1), (1, 1), (1, 1), 7, 5),
    (20, 40, (3, 3), (2, 2), (1, 1), (1, 1), 9, 11),
    (64, 130, (3, 3), (1, 1), (1, 1), (1, 1), 14, 14),
    (33, 70, (1, 1), (2, 1), (0, 0), (1, 1), 6, 7),
    (16, 33, (5, 3), (1, 2), (2, 3), (1, 1), 8, 6),
    (12, 5, (3, 2), (2, 1), (3, 2), (2, 3), 10, 9),
    (9, 35, (3, 3), (1, 1), (4, 4), (1, 1), 2, 2),
]


def signs(x, threshold=None):
    least = 0 if threshold is None else threshold.view(-1, 1, 1)
    return torch.where(x < least, -1.0, 1.0).double()


def problem(case, batch=2, dtype=torch.float32, device="cpu"):
    c, n, kernel, stride, padding, dilation, h, w = case
    x = torch.randn(batch, c, h, w, device=device).to(dtype)
    weight = torch.randn(n, c, *kernel, device=device)
    return x, weight, {"stride": stride, "padding": padding, "dilation": dilation}


def exact(x, weight, options, pad_ones=False, threshold=None):
    """The convolution of signs in float64."""
    down, across = options["padding"]
    around = (across, across, down, down)
    padded = F.pad(signs(x, threshold), around, value=1.0 if pad_ones else 0.0)
    return F.conv2d(padded, signs(weight), None, options["stride"], 0, options["dilation"])


@pytest.mark.parametrize("case", CASES)
def test_unpack_inverts_pack(case):
    _, weight, _ = problem(case)
    packed = pack_binary_conv2d(weight)
    got = unpack_binary_conv2d(packed, case[0], case[1], case[2])
    assert torch.equal(got.double(), signs(weight))


@pytest.mark.parametrize("pad_ones", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_convolutions_are_exact(device, case, pad_ones):
    x, weight, options = problem(case, device=device)
    packed = pack_binary_conv2d(weight)
    want = exact(x, weight, options, pad_ones)
    c, n, kernel = case[:3]
    for given_x in (x, x.contiguous(memory_format=torch.channels_last)):
        got = binary_conv2d(given_x, packed, c, n, kernel, pad_ones=pad_ones, **options)
        assert torch.equal(got.double(), want)
        assert got.is_contiguous(memory_format=torch.channels_last)
    bits = pack_signs(x.permute(0, 2, 3, 1))
    if c % 8:
        bits[..., -1] |= 255 << (c % 8) & 255  # spare bits never matter
    got = binary_conv2d(bits, packed, c, n, kernel, pad_ones=pad_ones, **options)
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["none", "silu", "gelu", "gelu_tanh"])
def test_threshold_scales_and_epilogues(device, dtype, epilogue):
    case = (20, 40, (3, 3), (2, 1), (1, 1), (1, 1), 9, 7)
    x, weight, options = problem(case, dtype=dtype, device=device)
    scale, bias = torch.rand(40, device=device) / 13, torch.randn(40, device=device)
    threshold = torch.randn(20, device=device).to(dtype).float()
    x[0, :, 1, 1] = threshold.to(dtype)  # at the threshold the sign is +1
    args = (pack_binary_conv2d(weight), 20, 40, 3, scale, bias)
    dots = exact(x, weight, options, threshold=threshold)
    want = dots * scale.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)
    want = {
        "none": lambda v: v,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    }[epilogue](want)
    residual = torch.randn(want.shape, device=device).to(dtype)
    got = binary_conv2d(x, *args, threshold=threshold, epilogue=epilogue, **options)
    assert got.dtype == dtype
    assert_close(got, want)
    got = binary_conv2d(
        x, *args, threshold=threshold, epilogue=epilogue, residual=residual, **options
    )
    assert_close(got, want + residual.double())


def fixed_problem(case, batch=2, device="cpu"):
    c, n, kernel, stride, padding, dilation, h, w = case
    x = torch.randint(-4000, 4000, (batch, c, h, w), dtype=torch.int32, device=device)
    weight = torch.randn(n, c, *kernel, device=device)

    def integers(low, high, size):
        return torch.randint(low, high, (size,), dtype=torch.int32, device=device)

    parameters = (
        integers(0, 8, n), integers(-900, 900, n), integers(0, 32, n), integers(-900, 900, n)
    )  # fmt: skip
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    return x, integers(-2000, 2000, c), weight, parameters, options


def fixed_exact(x, threshold, weight, parameters, options, residual=None):
    gain, pre, slope, post = (t.long().view(-1, 1, 1) for t in parameters)
    a = exact(x, weight, options, threshold=threshold).long() * 2**gain + pre
    a = a if residual is None else a + residual.long()
    return torch.where(a < 0, a.div(2**slope, rounding_mode="floor"), a) + post


@pytest.mark.parametrize("case", CASES)
def test_fixed_epilogue_is_exact(device, case):
    x, threshold, weight, parameters, options = fixed_problem(case, device=device)
    x[:, 0] = threshold[0]
    args = (x, threshold, pack_binary_conv2d(weight), case[1], case[2], *parameters)
    want = fixed_exact(x, threshold, weight, parameters, options)
    assert torch.equal(binary_conv2d_fixed(*args, **options).long(), want)
    residual = torch.randint(-9999, 9999, want.shape, dtype=torch.int32, device=device)
    got = binary_conv2d_fixed(*args, residual=residual, **options)
    assert torch.equal(got.long(), fixed_exact(x, threshold, weight, parameters, options, residual))
    with effinfer.use_reference():
        assert torch.equal(binary_conv2d_fixed(*args, residual=residual, **options), got)


def test_fixed_epilogue_saturates(device):
    """The largest of everything, both ways: nothing wraps."""
    limit, bias = 1 << 29, 1 << 28
    weight = torch.ones(33, 64, 1, 1, device=device)
    packed = pack_binary_conv2d(weight)
    for sign in (1, -1):
        full = lambda size, value: torch.full((size,), value, dtype=torch.int32, device=device)  # noqa: E731
        x = torch.full((1, 64, 3, 3), sign, dtype=torch.int32, device=device)
        residual = torch.full((1, 33, 3, 3), sign * (2**31 - 1), dtype=torch.int32, device=device)
        got = binary_conv2d_fixed(
            x, full(64, 0), packed, 33, 1, full(33, 23), full(33, sign * bias), full(33, 0),
            full(33, sign * bias), residual=residual,
        )  # fmt: skip
        assert (got == sign * limit).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3),
    st.integers(0, 3), st.integers(1, 3), st.integers(0, 2**31),
)  # fmt: skip
def test_any_geometry(c, n, kh, kw, stride, padding, dilation, seed):
    torch.manual_seed(seed)
    case = (c, n, (kh, kw), (stride, 1), (padding, 1), (dilation, 1), 10, 9)
    x, weight, options = problem(case, batch=3)
    packed = pack_binary_conv2d(weight)
    got = binary_conv2d(x, packed, c, n, (kh, kw), **options)
    assert torch.equal(got.double(), exact(x, weight, options))
    alone = binary_conv2d(x[1:2], packed, c, n, (kh, kw), **options)
    assert torch.equal(alone, got[1:2])


def test_every_thread_count_gives_the_same_bits(device):
    case = (48, 200, (3, 3), (1, 1), (1, 1), (1, 1), 30, 31)
    x, weight, options = problem(case, batch=20, device=device)
    packed, scale = pack_binary_conv2d(weight), torch.rand(200, device=device)
    several = binary_conv2d(x, packed, 48, 200, 3, scale, scale, **options)
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(binary_conv2d(x, packed, 48, 200, 3, scale, scale, **options), several)
    finally:
        effinfer.set_num_threads(0)


def test_no_counter_overflows(device):
    """3 x 3 x 8192 products, all alike."""
    for sign in (1, -1):
        weight = torch.full((33, 8192, 3, 3), float(sign), device=device)
        packed = pack_binary_conv2d(weight)
        x = torch.ones(1, 8192, 3, 3, device=device)
        for value in (1, -1):
            got = binary_conv2d(value * x, packed, 8192, 33, 3)
            assert (got == sign * value * 9 * 8192).all()


def test_empty(device):
    weight = torch.randn(33, 4, 3, 3, device=device)
    packed = pack_binary_conv2d(weight)
    none = binary_conv2d(torch.randn(0, 4, 5, 5, device=device), packed, 4, 33, 3)
    assert none.shape == (0, 33, 3, 3)
    small = binary_conv2d(torch.randn(2, 4, 2, 5, device=device), packed, 4, 33, 3)
    assert small.shape == (2, 33, 0, 3)
    nothing = pack_binary_conv2d(torch.randn(0, 4, 3, 3, device=device))
    assert binary_conv2d(torch.randn(2, 4, 5, 5, device=device), nothing, 4, 0, 3).shape[1] == 0


def test_nan_is_positive(device):
    x = torch.full((1, 8, 3, 3), float("nan"), device=device)
    packed = pack_binary_conv2d(torch.ones(1, 8, 3, 3, device=device))
    assert binary_conv2d(x, packed, 8, 1, 3).item() == 72


def test_errors_name_the_argument(device):
    x = torch.randn(1, 8, 5, 5, device=device)
    packed = pack_binary_conv2d(torch.randn(20, 8, 3, 3, device=device))
    ones = torch.ones(20, device=device)
    with pytest.raises(ValueError, match="binary_conv2d: x must have 4 dimensions"):
        binary_conv2d(x[0], packed, 8, 20, 3)
    with pytest.raises(ValueError, match="binary_conv2d: x must have 16 channels, got 8"):
        binary_conv2d(x, packed, 16, 20, 3)
    with pytest.raises(ValueError, match=r"binary_conv2d: packed must have shape \(1, 9, 32\)"):
        binary_conv2d(x, packed[:, :8], 8, 20, 3)
    with pytest.raises(ValueError, match="binary_conv2d: kernel_size must be at least 1, got 0"):
        binary_conv2d(x, packed, 8, 20, 0)
    with pytest.raises(TypeError, match="binary_conv2d: kernel_size must be an integer or two"):
        binary_conv2d(x, packed, 8, 20, (3, 3, 3))
    with pytest.raises(ValueError, match=r"binary_conv2d: weight_scale must have shape \(20,\)"):
        binary_conv2d(x, packed, 8, 20, 3, ones[:3])
    with pytest.raises(ValueError, match=r"binary_conv2d: threshold must have shape \(8,\)"):
        binary_conv2d(x, packed, 8, 20, 3, threshold=ones)
    bits = pack_signs(x.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="binary_conv2d: threshold must be None"):
        binary_conv2d(bits, packed, 8, 20, 3, threshold=ones[:8])
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        with pytest.raises(ValueError, match=f"binary_conv2d: {name} must be at least {least}"):
            binary_conv2d(x, packed, 8, 20, 3, **{name: least - 1})
    with pytest.raises(ValueError, match="binary_conv2d: epilogue must be one of none"):
        binary_conv2d(x, packed, 8, 20, 3, epilogue="relu")
    with pytest.raises(ValueError, match="binary_conv2d: residual must have shape"):
        binary_conv2d(x, packed, 8, 20, 3, residual=x)
    with pytest.raises(TypeError, match="binary_conv2d: x must be float32"):
        binary_conv2d(x.double(), packed, 8, 20, 3)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        binary_conv2d(x.clone().requires_grad_(), packed, 8, 20, 3)
    with pytest.raises(ValueError, match="pack_binary_conv2d: weight must have 4 dimensions"):
        pack_binary_conv2d(torch.randn(3, 3))
    i = torch.zeros(20, dtype=torch.int32, device=device)
    args = (i[:8], packed, 20, 3, i, i, i, i)
    with pytest.raises(TypeError, match="binary_conv2d_fixed: x must be int32, got"):
        binary_conv2d_fixed(x, *args)
    with pytest.raises(ValueError, match=r"binary_conv2d_fixed: threshold must have shape \(8,\)"):
        binary_conv2d_fixed(x.int(), i, *args[1:])
    with pytest.raises(ValueError, match=r"binary_conv2d_fixed: slope_shift must have shape"):
        binary_conv2d_fixed(x.int(), *args[:6], i[:2], i)


@pytest.mark.parametrize(
    ("arg", "value"),
    [(4, -1), (4, 23), (5, 2**28 + 1), (5, -(2**31)), (6, -1), (6, 32), (7, -(2**28) - 1)],
)
def test_fixed_parameters_out_of_range(arg, value):
    packed = pack_binary_conv2d(torch.ones(3, 8, 3, 3))
    i = torch.zeros(8, dtype=torch.int32)
    args = [i, packed, 3, 3, *(torch.zeros(3, dtype=torch.int32) for _ in range(4))]
    x = torch.zeros(1, 8, 4, 4, dtype=torch.int32)
    binary_conv2d_fixed(x, *args)
    args[arg][2] = value
    with pytest.raises(ValueError, match=rf"must be within .*, got {value}$"):
        binary_conv2d_fixed(x, *args)


def test_registration():
    x, weight, options = problem(CASES[2])
    packed = pack_binary_conv2d(weight)
    pairs = tuple(options.values())
    args = (x, packed, 20, 40, (3, 3), torch.rand(40), torch.rand(40), torch.rand(20), *pairs, True)
    residual = torch.randn(2, 40, 5, 6).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.effinfer.binary_conv2d.default, (*args, "silu", residual))
    x, threshold, weight, parameters, options = fixed_problem(CASES[2])
    args = (x, threshold, pack_binary_conv2d(weight), 40, (3, 3), *parameters, *pairs, False, None)
    torch.library.opcheck(torch.ops.effinfer.binary_conv2d_fixed.default, args)
    compiled = torch.compile(
        lambda t: binary_conv2d(t, packed, 20, 40, 3, padding=1) + 1,
        fullgraph=True,
        backend="eager",
    )
    x = torch.randn(2, 20, 9, 11)
    assert torch.equal(compiled(x), binary_conv2d(x, packed, 20, 40, 3, padding=1) + 1)
    assert binary_conv2d_fixed.isa() == binary_conv2d.isa()
