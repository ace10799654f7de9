"""Tied matrices and their low-rank completions."""

from __future__ import annotations

import pytest
import torch

from effinfer.recursive.tying import squared_error, tied_weight, truncated_svd


def matrices(count: int, outputs: int = 10, inputs: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    shape = (outputs, inputs)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) * (i + 1) for i in range(count)
    ]


def test_truncated_svd_is_the_nearest_of_its_rank():
    (matrix,) = matrices(1)
    singular = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 7):
        a, b = truncated_svd(matrix, rank)
        assert (a.shape, b.shape) == ((rank, 7), (10, rank))
        error = (matrix - b @ a).square().sum()
        torch.testing.assert_close(error, singular[rank:].square().sum(), atol=1e-20, rtol=1e-9)
        torch.testing.assert_close(a @ a.t(), torch.eye(rank, dtype=torch.float64))


def test_stepwise_and_average():
    weights = matrices(3)
    assert tied_weight(weights, weights[2], 2, "stepwise") is weights[2]
    mean = (weights[0] + weights[1] + weights[2]) / 3
    torch.testing.assert_close(tied_weight(weights, weights[2], 2, "average"), mean)
    torch.testing.assert_close(tied_weight(weights, weights[2], 0, "svd"), mean)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 3])
def test_svd_loses_less(count: int, rank: int):
    weights = matrices(count)
    lost = {
        init: squared_error(weights, tied_weight(weights, weights[0], rank, init), rank)
        for init in ("stepwise", "average", "svd")
    }
    assert lost["svd"] < 0.999 * min(lost["stepwise"], lost["average"])


def test_two_loops_get_twice_the_rank():
    """W_0 - W_1 = B_0 A_0 - B_1 A_1 has rank 2 r: past it, half the rest's squares are lost."""
    weights = matrices(2)
    rest = torch.linalg.svdvals(weights[0] - weights[1])[4:].square().sum() / 2
    tied = tied_weight(weights, weights[0], 2, "svd")
    assert squared_error(weights, tied, 2) == pytest.approx(float(rest), rel=0.02)
