from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import moe_experts, pack_experts, unpack_experts
from effinfer.ops.moe_experts import ACTIVATIONS
from tests.conftest import DTYPES, assert_close

# rows, K, I, experts, top_k
CASES = [
    (1, 1, 1, 1, 1),
    (5, 33, 20, 3, 2),
    (40, 64, 48, 8, 3),
    (130, 16, 7, 2, 1),  # an expert with more rows than a task
    (3, 300, 16, 64, 8),  # most experts idle
]


def case(rows, k, inner, experts, top_k, *, gated=True, dtype=torch.float32, device="cpu"):
    """x, index, weights, and the plain up and down weights."""
    torch.manual_seed(rows)

    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    index = torch.rand(rows, experts, device=device).argsort(1)[:, :top_k].int()
    weights = torch.rand(rows, top_k, device=device)
    up = randn(experts, (1 + gated) * inner, k) * k**-0.5
    down = randn(experts, k, inner) * inner**-0.5
    return randn(rows, k), index, weights, up, down


def expected(x, index, weights, up, down, activation="silu", gated=True):
    """Pair by pair, from the weights as they were."""
    functions = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "relu2": lambda v: F.relu(v) ** 2,
    }
    y = torch.zeros_like(x, dtype=torch.float64)
    for row, own in enumerate(index.tolist()):
        for rank, expert in enumerate(own):
            h = up[expert].double() @ x[row].double()
            first, second = h.chunk(2) if gated else (h, 1.0)
            inner = functions[activation](first) * second
            y[row] += weights[row, rank].double() * (down[expert].double() @ inner)
    return y


def run(x, index, weights, up, down, **options):
    return moe_experts(x, index, weights, pack_experts(up), pack_experts(down), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", CASES)
def test_matches_float64(device, dtype, sizes):
    args = case(*sizes, dtype=dtype, device=device)
    bound = 2e-6 if dtype is torch.float32 else None
    assert_close(run(*args), expected(*args), bound)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation, gated):
    args = case(9, 40, 24, 4, 2, gated=gated, device=device)
    options = {"activation": activation, "gated": gated}
    want = expected(*args, **options)
    assert_close(run(*args, **options), want, 2e-6)
    x, index, weights, up, down = args
    packed = pack_experts(up), pack_experts(down)
    reference = moe_experts.reference(x, index, weights, *packed, activation, gated)
    assert_close(reference, want, 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_gives_the_bits_back(dtype):
    weight = torch.randn(3, 21, 10).to(dtype)
    packed = pack_experts(weight)
    assert packed.shape == (3, 2, 10, 16)
    assert torch.equal(unpack_experts(packed, 21), weight)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 64), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**31))
def test_a_row_ignores_the_other_rows_and_the_threads(rows, inner, experts, seed):
    x, index, weights, up, down = case(rows, 37, inner, experts, min(experts, 3))
    torch.manual_seed(seed)
    packed = pack_experts(up), pack_experts(down)
    together = moe_experts(x, index, weights, *packed)
    order = torch.randperm(rows)
    assert torch.equal(
        moe_experts(x[order], index[order], weights[order], *packed), together[order]
    )
    for row in range(rows):
        one = slice(row, row + 1)
        alone = moe_experts(x[one], index[one], weights[one], *packed)
        assert torch.equal(alone[0], together[row])
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(moe_experts(x, index, weights, *packed), together)
    finally:
        effinfer.set_num_threads(0)


def test_rows_in_several_blocks():
    """More pairs than one block of scratch holds."""
    x, index, weights, up, down = case(2100, 24, 8, 5, 2)
    whole = run(x, index, weights, up, down)
    for rows in (slice(0, 7), slice(2045, 2055), slice(2093, 2100)):
        assert torch.equal(run(x[rows], index[rows], weights[rows], up, down), whole[rows])


@pytest.mark.parametrize("experts", [2, 16])
def test_on_all_threads(experts):
    """A few experts cut into tasks, and many of one task each."""
    args = case(48, 128, 160, experts, 2)
    assert_close(run(*args), expected(*args), 2e-6)


def test_an_expert_may_come_twice_and_ranks_have_an_order(device):
    x, index, weights, up, down = case(6, 20, 16, 4, 2, device=device)
    index = index[:, :1].expand(6, 2)
    assert_close(run(x, index, weights, up, down), expected(x, index, weights, up, down), 2e-6)


def test_a_row_of_nan_stays_alone(device):
    x, index, weights, up, down = case(12, 20, 16, 3, 2, device=device)
    want = run(x, index, weights, up, down)
    x[5] = torch.nan
    got = run(x, index, weights, up, down)
    assert got[5].isnan().all()
    others = torch.arange(12, device=device) != 5
    assert torch.equal(got[others], want[others])


def test_strides_and_empty_shapes(device):
    x, index, weights, up, down = case(6, 32, 16, 3, 2, device=device)
    wide = torch.zeros(6, 50, device=device)
    wide[:, 8:40] = x
    assert torch.equal(
        run(wide[:, 8:40], index, weights, up, down), run(x, index, weights, up, down)
    )
    none = run(x[:0], index[:0], weights[:0], up, down)
    assert none.shape == (0, 32)
    assert not run(x, index[:, :0], weights[:, :0], up, down).any()


def test_errors_name_the_argument(device):
    x, index, weights, up, down = case(4, 8, 16, 3, 2, device=device)
    up, down = pack_experts(up), pack_experts(down)
    with pytest.raises(ValueError, match="moe_experts: x must"):
        moe_experts(x[None], index, weights, up, down)
    with pytest.raises(ValueError, match="moe_experts: index must"):
        moe_experts(x, index[:3], weights, up, down)
    with pytest.raises(TypeError, match="moe_experts: index must"):
        moe_experts(x, index.long(), weights, up, down)
    with pytest.raises(ValueError, match="moe_experts: weights must"):
        moe_experts(x, index, weights[:, :1], up, down)
    with pytest.raises(ValueError, match="moe_experts: up must"):
        moe_experts(x, index, weights, up[:2], down)
    with pytest.raises(ValueError, match="moe_experts: up must"):
        moe_experts(x, index, weights, up, down, gated=False)
    with pytest.raises(ValueError, match="moe_experts: down must"):
        moe_experts(x[:, :7], index, weights, up, torch.cat([down, down], 1))
    with pytest.raises(ValueError, match="moe_experts: activation must be one of silu"):
        moe_experts(x, index, weights, up, down, activation="relu")
    with pytest.raises(ValueError, match="pack_experts: weight must have 3 dimensions"):
        pack_experts(x)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_index_out_of_range(wrong):
    x, index, weights, up, down = case(4, 8, 16, 3, 2)
    index[2, 1] = wrong
    with pytest.raises(ValueError, match=r"moe_experts: index must be in \[0, 3\)"):
        run(x, index, weights, up, down)


def test_refuses_gradients():
    x, index, weights, up, down = case(4, 8, 16, 3, 2)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"moe_experts.*requires grad"):
        run(x.requires_grad_(), index, weights, up, down)


def test_registration():
    x, index, weights, up, down = case(4, 8, 16, 3, 2)
    args = (x, index, weights, pack_experts(up), pack_experts(down), "silu", True)
    torch.library.opcheck(torch.ops.effinfer.moe_experts.default, args)


def test_reference_mode_and_isa():
    args = case(4, 8, 16, 3, 2)
    packed = pack_experts(args[3]), pack_experts(args[4])
    with effinfer.use_reference():
        got = run(*args)
    assert torch.equal(got, moe_experts.reference(*args[:3], *packed, "silu", True))
    assert moe_experts.isa() in ("scalar", "avx2", "avx512", "neon")
