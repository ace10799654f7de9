from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import low_rank_add, pack_low_rank
from tests.conftest import DTYPES, assert_close

# rows, K, (outputs, rank) of each part, groups
CASES = [
    (1, 1, [(1, 1)], 1),
    (7, 33, [(16, 3), (40, 5), (1, 2)], 3),
    (12, 64, [(48, 8), (16, 8), (16, 8)], 4),
    (5, 130, [(20, 0), (7, 4)], 2),
    (0, 8, [(16, 2)], 2),
]


def given_case(rows, k, parts, groups, *, dtype=torch.float32, device="cpu"):
    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    factors = [(randn(groups, r, k), randn(groups, n, r)) for n, r in parts]
    n = sum(outputs for outputs, _ in parts)
    index = torch.randint(groups, (rows,), dtype=torch.int32, device=device).sort().values
    bias = torch.randn(groups, n, device=device)
    return randn(rows, n), randn(rows, k), index.int(), factors, bias


def expected(y, x, index, factors, bias):
    """Row by row, from the factors as they were."""
    out = y.double()
    for row, group in enumerate(index.tolist()):
        at = x[row].double()
        out[row] += torch.cat([b[group].double() @ (a[group].double() @ at) for a, b in factors])
        if bias is not None:
            out[row] += bias[group].double()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(device, dtype, case, with_bias):
    y, x, index, factors, bias = given_case(*case, dtype=dtype, device=device)
    bias = bias if with_bias else None
    down, up, parts = pack_low_rank(factors)
    want = expected(y, x, index, factors, bias)
    reference = y.double()
    low_rank_add.reference(
        reference, x.double(), index, down.double(), up.double(), bias, list(parts)
    )
    torch.testing.assert_close(reference, want)
    low_rank_add(y, x, index, down, up, bias, parts=parts)
    assert_close(y, want)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 13), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**31))
def test_a_row_ignores_the_other_rows_and_the_threads(rows, k, rank, seed):
    torch.manual_seed(seed)
    y, x, index, factors, bias = given_case(rows, k, [(37, rank), (16, 2)], 3)
    down, up, parts = pack_low_rank(factors)
    together = y.clone()
    low_rank_add(together, x, index, down, up, bias, parts=parts)
    for row in range(rows):
        alone = y[row : row + 1].clone()
        one = slice(row, row + 1)
        low_rank_add(alone, x[one], index[one], down, up, bias, parts=parts)
        assert torch.equal(alone[0], together[row])
    effinfer.set_num_threads(1)
    try:
        low_rank_add(y, x, index, down, up, bias, parts=parts)
    finally:
        effinfer.set_num_threads(0)
    assert torch.equal(y, together)


def test_many_rows_on_all_threads():
    y, x, index, factors, bias = given_case(90, 300, [(640, 24), (200, 3)], 4)
    down, up, parts = pack_low_rank(factors)
    want = expected(y, x, index, factors, bias)
    low_rank_add(y, x, index, down, up, bias, parts=parts)
    assert_close(y, want)


def test_strides(device):
    y, x, index, factors, _ = given_case(6, 32, [(24, 4)], 2, device=device)
    down, up, parts = pack_low_rank(factors)
    wide_y, wide_x = torch.zeros(6, 40, device=device), torch.zeros(6, 50, device=device)
    wide_y[:, 8:32], wide_x[:, :32] = y, x
    low_rank_add(wide_y[:, 8:32], wide_x[:, :32], index, down, up, parts=parts)
    low_rank_add(y, x, index, down, up, parts=parts)
    assert torch.equal(wide_y[:, 8:32], y)
    assert not wide_y[:, :8].any()
    assert not wide_y[:, 32:].any()


def test_errors_name_the_argument(device):
    y, x, index, factors, bias = given_case(4, 8, [(16, 2)], 2, device=device)
    down, up, parts = pack_low_rank(factors)
    with pytest.raises(ValueError, match="low_rank_add: y must"):
        low_rank_add(y[:, :15], x, index, down, up, parts=parts)
    with pytest.raises(ValueError, match="low_rank_add: down must"):
        low_rank_add(y, x[:, :7], index, down, up, parts=parts)
    with pytest.raises(ValueError, match="low_rank_add: up must"):
        low_rank_add(y, x, index, down, up[:, :-1].contiguous(), parts=parts)
    with pytest.raises(ValueError, match="low_rank_add: bias must"):
        low_rank_add(y, x, index, down, up, bias[:1], parts=parts)
    with pytest.raises(ValueError, match="low_rank_add: parts must"):
        low_rank_add(y, x, index, down, up, parts=(16,))
    with pytest.raises(TypeError, match="low_rank_add: index must"):
        low_rank_add(y, x, index.long(), down, up, parts=parts)


def test_index_out_of_range():
    y, x, _, factors, _ = given_case(2, 8, [(16, 2)], 2)
    down, up, parts = pack_low_rank(factors)
    for wrong in (-1, 2):
        index = torch.tensor([0, wrong], dtype=torch.int32)
        with pytest.raises(ValueError, match=r"low_rank_add: index must be in \[0, 2\)"):
            low_rank_add(y, x, index, down, up, parts=parts)


def test_refuses_gradients():
    y, x, index, factors, _ = given_case(2, 8, [(16, 2)], 2)
    down, up, parts = pack_low_rank(factors)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"low_rank_add.*requires grad"):
        low_rank_add(y, x.requires_grad_(), index, down, up, parts=parts)


def test_registration():
    y, x, index, factors, bias = given_case(3, 8, [(16, 2), (5, 1)], 2)
    down, up, parts = pack_low_rank(factors)
    args = (y, x, index, down, up, bias, list(parts))
    torch.library.opcheck(torch.ops.effinfer.low_rank_add.default, args)


def test_reference_mode_and_isa():
    y, x, index, factors, bias = given_case(3, 8, [(16, 2)], 2)
    down, up, parts = pack_low_rank(factors)
    want = y.clone()
    low_rank_add.reference(want, x, index, down, up, bias, list(parts))
    with effinfer.use_reference():
        low_rank_add(y, x, index, down, up, bias, parts=parts)
    assert torch.equal(y, want)
    assert low_rank_add.isa() in ("scalar", "avx2", "avx512", "neon")
