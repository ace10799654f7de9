from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import binary_linear, pack_binary, pack_signs, unpack_binary, unpack_signs
from tests.conftest import DTYPES, assert_close

# N around panels of 32 and groups of 128, K around bytes, vectors and the 31-byte flush.
SHAPES = [(1, 1), (32, 8), (33, 247), (100, 256), (128, 248), (170, 257), (300, 1030)]
ROWS = [1, 2, 3, 4, 5, 8, 9, 97]


def signs(x):
    return torch.where(x < 0, -1.0, 1.0).double()


def problem(rows, n, k, dtype=torch.float32, device="cpu"):
    x = torch.randn(rows, k, device=device).to(dtype)
    weight = torch.randn(n, k, device=device)
    return x, weight, torch.rand(n, device=device) + 0.1, torch.randn(n, device=device)


@pytest.mark.parametrize("k", [0, 1, 7, 8, 9, 64, 131])
def test_signs_round_trip(k):
    x = torch.randn(3, 2, k)
    bits = pack_signs(x)
    assert bits.shape == (3, 2, -(-k // 8))
    assert bits.dtype is torch.uint8
    assert torch.equal(unpack_signs(bits, k).double(), signs(x))
    if k % 8:
        assert (bits[..., -1] >> (k % 8) == 0).all()


def test_zeros_and_nan_are_positive():
    x = torch.tensor([0.0, -0.0, float("nan"), -1e-45, float("-inf"), float("inf"), -1, 1])
    assert pack_signs(x).tolist() == [0b01011000]


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4), (4, 0)])
def test_unpack_inverts_pack(shape):
    weight = torch.randn(shape)
    packed = pack_binary(weight)
    assert packed.shape == (-(-shape[0] // 32), -(-shape[1] // 8), 32)
    assert torch.equal(unpack_binary(packed, *shape).double(), signs(weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_dot_products_are_exact(device, shape):
    n, k = shape
    for rows in ROWS:
        x, weight, _, _ = problem(rows, n, k, device=device)
        want = signs(x) @ signs(weight).t()
        packed = pack_binary(weight)
        assert torch.equal(binary_linear(x, packed, k, n).double(), want)
        assert torch.equal(binary_linear(pack_signs(x), packed, k, n).double(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_scale", [None, "mean", "rows"])
@pytest.mark.parametrize("epilogue", ["none", "silu", "gelu", "gelu_tanh"])
def test_scales_and_epilogues(device, dtype, x_scale, epilogue):
    for rows, n, k in [(1, 48, 64), (2, 100, 300), (9, 170, 123)]:
        x, weight, scale, bias = problem(rows, n, k, dtype, device)
        scale = scale * k**-0.5
        residual = torch.randn(rows, n, device=device).to(dtype)
        rows_scale = torch.rand(rows, device=device) if x_scale == "rows" else x_scale
        packed = pack_binary(weight)
        for extra in (None, residual):
            got = binary_linear(
                x, packed, k, n, scale, bias, x_scale=rows_scale, epilogue=epilogue, residual=extra
            )
            assert got.dtype == dtype
            want = binary_linear.reference(
                x.double(), packed, k, n, scale, bias,
                rows_scale if x_scale == "rows" else None, x_scale == "mean", epilogue, extra,
            )  # fmt: skip
            assert_close(got, want)


@pytest.mark.parametrize("k", [255 * 8, 4096, 65536])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_no_counter_overflows(device, k, rows):
    """Every product the same: the largest and smallest dot products there are."""
    x = torch.ones(rows, k, device=device)
    for sign in (1, -1):
        packed = pack_binary(sign * torch.ones(65, k, device=device))
        for value in (1, -1):
            got = binary_linear(value * x, packed, k, 65)
            assert torch.equal(got, torch.full_like(got, float(sign * value * k)))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 900), st.integers(0, 2**31))
def test_a_row_ignores_its_neighbours(rows, n, k, seed):
    torch.manual_seed(seed)
    x, weight, scale, bias = problem(rows, n, k)
    packed = pack_binary(weight)

    def run(x):
        return binary_linear(x, packed, k, n, scale, bias, x_scale="mean")

    together = run(x)
    for row in range(rows):
        assert torch.equal(run(x[row : row + 1]), together[row : row + 1])
    order = torch.randperm(rows)
    assert torch.equal(run(x[order]), together[order])


@pytest.mark.parametrize("rows", [1, 2, 8, 250, 1600])
def test_every_backend_and_thread_count_gives_the_same_bits(device, rows):
    n, k = 700, 601
    x, weight, scale, bias = problem(rows, n, k, device=device)
    packed = pack_binary(weight)

    def run(device=device):
        args = (t.to(device) for t in (x, packed, scale, bias))
        x_, packed_, scale_, bias_ = args
        return binary_linear(x_, packed_, k, n, scale_, bias_, x_scale="mean")

    several = run()
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(run(), several)
    finally:
        effinfer.set_num_threads(0)
    with effinfer.use_backend("cpu"):
        cpu = effinfer._native.module("_C")
        cpu.set_isa("scalar")
        try:
            assert torch.equal(run("cpu"), several.cpu())
        finally:
            cpu.set_isa("")


@pytest.mark.parametrize("rows", [1, 5])
def test_slices_of_packed_weights(device, rows):
    x, weight, scale, _ = problem(rows, 200, 400, device=device)
    packed = pack_binary(weight)
    for n, k in [(96, 400), (200, 136), (64, 8), (32, 400)]:
        got = binary_linear(x[:, :k], packed[: -(-n // 32), : k // 8], k, n, scale[:n])
        want = binary_linear(x[:, :k], pack_binary(weight[:n, :k]), k, n, scale[:n])
        assert torch.equal(got, want)


def test_strides_and_shapes(device):
    x, weight, _, bias = problem(6, 50, 65, device=device)
    packed = pack_binary(weight)
    want = binary_linear(x, packed, 65, 50, bias=bias)
    wide = torch.randn(6, 100, device=device)
    wide[:, 10:75] = x
    assert torch.equal(binary_linear(wide[:, 10:75], packed, 65, 50, bias=bias), want)
    across = x.t().contiguous().t()
    assert torch.equal(binary_linear(across, packed, 65, 50, bias=bias), want)
    batched = binary_linear(x.view(2, 3, 65), packed, 65, 50, bias=bias)
    assert torch.equal(batched, want.view(2, 3, 50))
    assert torch.equal(binary_linear(x[0], packed, 65, 50, bias=bias), want[0])
    residual = torch.randn(6, 80, device=device)[:, 3:53]
    got = binary_linear(x, packed, 65, 50, bias=bias, residual=residual)
    assert torch.equal(got, want + residual)


def test_spare_bits_and_neighbouring_memory_never_matter(device):
    x, weight, _, _ = problem(5, 40, 61, device=device)
    packed = pack_binary(weight)
    want = binary_linear(x, packed, 61, 40)
    bits = pack_signs(x)
    bits[:, -1] |= 0b11100000
    wide = torch.full((5, 20), 255, dtype=torch.uint8, device=device)
    wide[:, 3:11] = bits
    assert torch.equal(binary_linear(bits, packed, 61, 40), want)
    assert torch.equal(binary_linear(wide[:, 3:11], packed, 61, 40), want)
    padded = torch.full((7, 90), float("nan"), device=device)
    padded[1:-1, 8:69] = x
    assert torch.equal(binary_linear(padded[1:-1, 8:69], packed, 61, 40), want)
    got = binary_linear(padded[1:-1, 8:69], packed, 61, 40, x_scale="mean")
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, -1e-42, float("inf"), -float("inf"), float("nan")])  # fmt: skip
def test_adversarial_values(device, value):
    x, weight, _, _ = problem(5, 40, 300, device=device)
    packed = pack_binary(weight)
    clean = binary_linear(x, packed, 300, 40, x_scale="mean")
    x[-1, 7] = value
    exact = signs(x) @ signs(weight).t()
    assert torch.equal(binary_linear(x, packed, 300, 40).double(), exact)
    got = binary_linear(x, packed, 300, 40, x_scale="mean")
    assert torch.equal(got[:-1], clean[:-1])
    want = exact * x.double().abs().mean(-1, keepdim=True)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_empty(device):
    packed = pack_binary(torch.randn(20, 8, device=device))
    assert binary_linear(torch.randn(0, 8, device=device), packed, 8, 20).shape == (0, 20)
    none = pack_binary(torch.randn(0, 8, device=device))
    assert binary_linear(torch.randn(3, 8, device=device), none, 8, 0).shape == (3, 0)
    bias = torch.randn(20, device=device)
    nothing = pack_binary(torch.randn(20, 0, device=device))
    got = binary_linear(torch.randn(3, 0, device=device), nothing, 0, 20, bias=bias)
    assert torch.equal(got, bias.expand(3, 20))


def test_an_ordinary_tensor(device, tmp_path):
    x, weight, _, _ = problem(3, 40, 64, device=device)
    packed = pack_binary(weight)
    want = binary_linear(x, packed, 64, 40)
    assert torch.equal(binary_linear(x, copy.deepcopy(packed), 64, 40), want)
    torch.save(packed, tmp_path / "packed.pt")
    assert torch.equal(binary_linear(x, torch.load(tmp_path / "packed.pt"), 64, 40), want)


def test_errors_name_the_argument(device):
    x = torch.randn(2, 8, device=device)
    packed = pack_binary(torch.randn(20, 8, device=device))
    ones = torch.ones(20, device=device)
    with pytest.raises(ValueError, match=r"binary_linear: packed must have shape \(2, 1, 32\)"):
        binary_linear(x, packed, 8, 40)
    with pytest.raises(ValueError, match="binary_linear: x must have any number of rows of 16"):
        binary_linear(x, packed, 16, 20)
    with pytest.raises(ValueError, match="binary_linear: x must have any number of rows of 1 "):
        binary_linear(pack_signs(torch.randn(2, 9, device=device)), packed, 8, 20)
    with pytest.raises(TypeError, match="binary_linear: packed must be uint8, got"):
        binary_linear(x, packed.float(), 8, 20)
    with pytest.raises(ValueError, match="binary_linear: packed must have contiguous panels"):
        binary_linear(x, packed.expand(1, 1, 32)[..., ::1].transpose(0, 1).repeat(1, 1, 2)[..., ::2].transpose(0, 1), 8, 20)  # fmt: skip
    with pytest.raises(ValueError, match=r"binary_linear: weight_scale must have shape \(20,\)"):
        binary_linear(x, packed, 8, 20, ones[:3])
    with pytest.raises(ValueError, match=r"binary_linear: bias must have shape \(20,\)"):
        binary_linear(x, packed, 8, 20, bias=ones[:3])
    with pytest.raises(ValueError, match=r"binary_linear: x_scale must have shape \(2,\)"):
        binary_linear(x, packed, 8, 20, x_scale=ones[:3])
    with pytest.raises(ValueError, match="binary_linear: x_scale must be a tensor or 'mean'"):
        binary_linear(x, packed, 8, 20, x_scale="max")
    with pytest.raises(ValueError, match="x_scale must not be 'mean', got packed signs"):
        binary_linear(pack_signs(x), packed, 8, 20, x_scale="mean")
    with pytest.raises(ValueError, match=r"binary_linear: residual must have shape \(2, 20\)"):
        binary_linear(x, packed, 8, 20, residual=x)
    with pytest.raises(ValueError, match="binary_linear: epilogue must be one of none, silu"):
        binary_linear(x, packed, 8, 20, epilogue="silu_mul")
    with pytest.raises(ValueError, match=r"binary_linear: in_features must be in \[0, 2\^24\]"):
        binary_linear(x, packed, 2**24 + 1, 20)
    for sizes, name in [((8, -1), "out_features"), ((-1, 20), "in_features")]:
        with pytest.raises(ValueError, match=f"binary_linear: {name} must be 0 or more, got -1"):
            binary_linear(x, packed, *sizes)
    with pytest.raises(TypeError, match="binary_linear: x must be float32 or bfloat16 or float16"):
        binary_linear(x.double(), packed, 8, 20)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        binary_linear(x.clone().requires_grad_(), packed, 8, 20)
    with pytest.raises(ValueError, match="pack_binary: weight must have 2 dimensions"):
        pack_binary(torch.randn(3))


def test_registration():
    x, weight, scale, bias = problem(3, 20, 12)
    packed = pack_binary(weight)
    residual = torch.randn(3, 20)
    args = (x, packed, 12, 20, scale, bias, torch.rand(3), False, "silu", residual)
    torch.library.opcheck(torch.ops.effinfer.binary_linear.default, args)
    compiled = torch.compile(
        lambda t: binary_linear(t, packed, 12, 20, scale, x_scale="mean") + 1,
        fullgraph=True,
        backend="eager",
    )
    assert torch.equal(compiled(x), binary_linear(x, packed, 12, 20, scale, x_scale="mean") + 1)
    with effinfer.use_reference():
        want = binary_linear(x, packed, 12, 20, scale, bias)
    assert_close(binary_linear(x, packed, 12, 20, scale, bias), want.double())
