from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.nn.linear import PackedLinear
from effinfer.ops import linear, pack_linear, unpack_linear
from tests.conftest import BOUNDS, DTYPES, assert_close

# N a multiple of 16 or not, K around the 256-term blocks, one panel and many.
SHAPES = [(1, 1), (16, 8), (17, 255), (33, 256), (100, 257), (300, 513)]
ROWS = [1, 2, 3, 5, 6, 7, 8, 16, 17, 31, 97]
EPILOGUES = ["none", "silu", "gelu", "gelu_tanh", "silu_mul", "gelu_mul"]


def gated(epilogue):
    return epilogue.endswith("_mul")


def problem(rows, n, k, dtype, device, weight_dtype=None, epilogue="none"):
    """x, the packed weight and a bias of the right shape."""
    x = torch.randn(rows, k, device=device).to(dtype)
    weights = [(torch.randn(n, k, device=device) * k**-0.5).to(weight_dtype or dtype)]
    if gated(epilogue):
        weights.append((torch.randn(n, k, device=device) * k**-0.5).to(weight_dtype or dtype))
    packed = pack_linear(weights[0], gate_weight=weights[1] if gated(epilogue) else None)
    bias = torch.randn((2, n) if gated(epilogue) else (n,), device=device)
    return x, packed, bias


def float64(x, packed, n, bias=None, epilogue="none", residual=None):
    bias = None if bias is None else bias.double()
    residual = None if residual is None else residual.double()
    return linear.reference(x.double(), packed, n, bias, epilogue, residual)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4), (4, 0)])
def test_unpack_inverts_pack(dtype, shape, gate):
    weight, other = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    packed = pack_linear(weight, gate_weight=other if gate else None)
    assert packed.shape == (-(-shape[0] // 16) * (2 if gate else 1), shape[1], 16)
    want = (other, weight) if gate else (weight,)
    for got, one in zip(unpack_linear(packed, shape[0], gated=gate), want, strict=True):
        assert torch.equal(got, one)
    tail = shape[0] % 16
    if tail:
        padded = unpack_linear(packed, packed.shape[0] // (2 if gate else 1) * 16, gated=gate)
        assert all((part[shape[0] :] == 0).all() for part in padded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device, dtype, shape):
    n, k = shape
    for rows in ROWS:
        x, packed, bias = problem(rows, n, k, dtype, device)
        assert_close(linear(x, packed, n), float64(x, packed, n))
        assert_close(linear(x, packed, n, bias), float64(x, packed, n, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_and_mixed_dtypes(device, dtype, weight_dtype, epilogue):
    for rows, n, k in [(1, 48, 64), (2, 100, 300), (9, 100, 300), (50, 33, 70)]:
        x, packed, bias = problem(rows, n, k, dtype, device, weight_dtype, epilogue)
        residual = torch.randn(rows, n, device=device).to(dtype)
        for args in [(None, epilogue, None), (bias, epilogue, residual)]:
            got = linear(x, packed, n, args[0], epilogue=epilogue, residual=args[2])
            assert got.dtype == dtype
            assert_close(got, float64(x, packed, n, *args))


@pytest.mark.parametrize("epilogue", ["gelu", "gelu_tanh", "silu"])
def test_activations_over_the_whole_range(device, epilogue):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -100.0, 100.0, 1e30])])
    x = x.to(device)[:, None]
    got = linear(x, pack_linear(torch.ones(1, 1, device=device)), 1, epilogue=epilogue)
    want = float64(x, pack_linear(torch.ones(1, 1, device=device)), 1, None, epilogue)
    assert ((got.double() - want).abs() <= 3e-7 * x.abs().double().clamp_min(1)).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 300), st.integers(1, 700), st.sampled_from(DTYPES),
    st.sampled_from(EPILOGUES), st.integers(0, 2**31),
)  # fmt: skip
def test_a_row_ignores_its_neighbours_and_the_threads(rows, n, k, weight_dtype, epilogue, seed):
    torch.manual_seed(seed)
    x, packed, bias = problem(rows, n, k, torch.float32, "cpu", weight_dtype, epilogue)
    together = linear(x, packed, n, bias, epilogue=epilogue)
    for row in range(rows):
        alone = linear(x[row : row + 1], packed, n, bias, epilogue=epilogue)
        assert torch.equal(alone, together[row : row + 1])
    order = torch.randperm(rows)
    assert torch.equal(linear(x[order], packed, n, bias, epilogue=epilogue), together[order])


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 40, 250])
def test_threads_and_batch_do_not_change_a_bit(device, weight_dtype, rows):
    x, packed, bias = problem(rows, 700, 600, torch.float32, device, weight_dtype)
    several = linear(x, packed, 700, bias)
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(linear(x, packed, 700, bias), several)
    finally:
        effinfer.set_num_threads(0)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(linear(x[row : row + 1], packed, 700, bias)[0], several[row])


def test_strides(device):
    _, packed, bias = problem(1, 50, 65, torch.float32, device)
    wide = torch.randn(6, 100, device=device)
    residual = torch.randn(6, 80, device=device)[:, 3:53]
    x = wide[:, 10:75]
    got = linear(x, packed, 50, bias, residual=residual)
    assert torch.equal(got, linear(x.contiguous(), packed, 50, bias, residual=residual.clone()))
    across = torch.randn(65, 6, device=device).t()
    assert torch.equal(linear(across, packed, 50), linear(across.contiguous(), packed, 50))
    batched = torch.randn(2, 3, 65, device=device)
    assert torch.equal(
        linear(batched, packed, 50), linear(batched.view(6, 65), packed, 50).view(2, 3, 50)
    )
    assert linear(torch.randn(65, device=device), packed, 50).shape == (50,)
    same = torch.randn(1, 65, device=device).expand(4, 65)
    assert torch.equal(linear(same, packed, 50), linear(same.contiguous(), packed, 50))


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 30])
def test_neighbouring_memory_is_untouched(device, rows):
    _, packed, bias = problem(1, 33, 70, torch.float32, device)
    padded = torch.full((rows + 2, 90), float("nan"), device=device)
    padded[1:-1, 8:78] = torch.randn(rows, 70, device=device)
    assert torch.isfinite(linear(padded[1:-1, 8:78], packed, 33, bias)).all()


def test_empty(device):
    packed = pack_linear(torch.randn(20, 8, device=device))
    assert linear(torch.randn(0, 8, device=device), packed, 20).shape == (0, 20)
    none = pack_linear(torch.randn(0, 8, device=device))
    assert linear(torch.randn(3, 8, device=device), none, 0).shape == (3, 0)
    bias = torch.randn(20, device=device)
    for rows in (1, 8, 20):
        x = torch.randn(rows, 0, device=device)
        got = linear(x, pack_linear(torch.randn(20, 0, device=device)), 20, bias, epilogue="silu")
        assert torch.allclose(got, torch.nn.functional.silu(bias).expand(rows, 20))


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e30, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("rows", [1, 4, 13])
def test_adversarial_values(device, value, rows):
    x, packed, _ = problem(rows, 40, 300, torch.float32, device)
    clean = linear(x, packed, 40)
    x[-1, 7] = value
    got, want = linear(x, packed, 40), float64(x, packed, 40)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(got[:-1], clean[:-1])


def test_an_ordinary_tensor(device, tmp_path):
    x, packed, _ = problem(3, 40, 64, torch.bfloat16, device)
    want = linear(x, packed, 40)
    assert torch.equal(linear(x, copy.deepcopy(packed), 40), want)
    torch.save(packed, tmp_path / "packed.pt")
    assert torch.equal(linear(x, torch.load(tmp_path / "packed.pt"), 40), want)


def test_errors_name_the_argument(device):
    x = torch.randn(2, 8, device=device)
    packed = pack_linear(torch.randn(20, 8, device=device))
    with pytest.raises(ValueError, match=r"linear: packed must have shape \(3, 8, 16\), got"):
        linear(x, packed, 40)
    with pytest.raises(ValueError, match=r"linear: packed must have shape \(4, 8, 16\), got"):
        linear(x, packed, 20, epilogue="silu_mul")
    with pytest.raises(ValueError, match=r"linear: packed must have shape \(2, 9, 16\), got"):
        linear(torch.randn(2, 9, device=device), packed, 20)
    with pytest.raises(ValueError, match="linear: packed must be contiguous"):
        linear(x, packed.transpose(0, 1).contiguous().transpose(0, 1), 20)
    with pytest.raises(ValueError, match=r"linear: bias must have shape \(20,\), got \(3,\)"):
        linear(x, packed, 20, torch.randn(3, device=device))
    with pytest.raises(ValueError, match=r"linear: residual must have shape \(2, 20\)"):
        linear(x, packed, 20, residual=torch.randn(2, 8, device=device))
    with pytest.raises(TypeError, match="linear: residual must be float32"):
        linear(x, packed, 20, residual=torch.randn(2, 20, device=device).half())
    with pytest.raises(ValueError, match=r"linear: epilogue must be one of none, silu, .* 'relu'"):
        linear(x, packed, 20, epilogue="relu")
    with pytest.raises(ValueError, match="linear: out_features must be 0 or more, got -1"):
        linear(x, packed, -1)
    with pytest.raises(TypeError, match="linear: x must be float32 or bfloat16 or float16"):
        linear(x.double(), packed, 20)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        linear(x.clone().requires_grad_(), packed, 20)
    with pytest.raises(ValueError, match="pack_linear: weight must have 2 dimensions"):
        pack_linear(torch.randn(3))
    with pytest.raises(TypeError, match="pack_linear: weight must be float32"):
        pack_linear(torch.randn(3, 3).double())
    with pytest.raises(ValueError, match="pack_linear: gate_weight must be"):
        pack_linear(torch.randn(3, 3), gate_weight=torch.randn(3, 4))


def test_registration():
    x, packed, bias = problem(3, 20, 8, torch.float32, "cpu")
    args = (x, packed, 20, bias, "silu", torch.randn(3, 20))
    torch.library.opcheck(torch.ops.effinfer.linear.default, args)
    compiled = torch.compile(
        lambda t: linear(t, packed, 20, bias, epilogue="gelu") + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), linear(x, packed, 20, bias, epilogue="gelu") + 1)


def test_reference_mode_and_isa():
    x, packed, bias = problem(3, 20, 8, torch.float32, "cpu")
    with effinfer.use_reference():
        want = linear.reference(x, packed, 20, bias, "none", None)
        assert torch.equal(linear(x, packed, 20, bias), want)
        with pytest.raises(ValueError, match="linear: epilogue must be one of"):
            linear(x, packed, 20, epilogue="relu")
    assert linear.isa() in ("scalar", "avx2", "avx512", "neon")


def test_error_grows_slowly_with_k(device):
    x, packed, _ = problem(3, 16, 20000, torch.float32, device)
    assert_close(linear(x, packed, 16), float64(x, packed, 16), BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear_stands_in_for_a_layer(dtype, bias):
    layer = torch.nn.Linear(70, 33, bias=bias).to(dtype)
    module = PackedLinear(layer)
    x = torch.randn(2, 5, 70).to(dtype)
    want = torch.nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    assert_close(module(x), want)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert module.state_dict().keys() == layer.state_dict().keys()
    for name, value in layer.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)
    other = torch.nn.Linear(70, 33, bias=bias).to(dtype)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.weight, other.weight)
    assert module.to(torch.float32).packed.dtype == torch.float32
    assert torch.equal(module.weight, other.weight.float())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.load_state_dict(torch.nn.Linear(70, 34, bias=bias).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        module.load_state_dict({})
