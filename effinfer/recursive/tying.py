"""One tied matrix for several, and what low rank keeps of the differences.

Section 2 of "Relaxed Recursive Transformers" (Bae et al., arXiv 2410.20672), and a refinement.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SWEEPS = 4


def truncated_svd(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors A (rank, inputs) and B (outputs, rank) of a residual (outputs, inputs).

    B A is the nearest matrix of that rank: B = U_r S_r, A = V_r^T.
    """
    u, s, vt = torch.linalg.svd(residual, full_matrices=False)
    return vt[:rank], u[:, :rank] * s[:rank]


def tied_weight(weights: list[Tensor], stepwise: Tensor, rank: int, init: str) -> Tensor:
    """The matrix that stands for ``weights``, one per loop, all (outputs, inputs).

    Args:
        stepwise: the weight of the layer that "stepwise" takes for this place in the block.
        init: "stepwise"; "average", the mean; or "svd", the one that low-rank factors complete
            best: alternately the factors of the residuals and the mean of what they leave, from
            both of the others, the better kept.
    """
    average = torch.stack(weights).mean(0)
    if init == "stepwise":
        return stepwise
    if init == "average" or rank == 0:
        return average
    candidates = [_refined(weights, start, rank) for start in (average, stepwise)]
    return min(candidates, key=lambda tied: squared_error(weights, tied, rank))


def squared_error(weights: list[Tensor], tied: Tensor, rank: int) -> float:
    """What tying loses: the squares of all that the low-rank factors cannot make up for."""
    return sum(float(_beyond_rank(weight - tied, rank).square().sum()) for weight in weights)


def _refined(weights: list[Tensor], tied: Tensor, rank: int) -> Tensor:
    """Block coordinate descent on ``squared_error``.

    The average can be a saddle (two loops: both residuals are half the difference, with opposite
    signs, and their factors cancel in the mean), which is why it is not the only start.
    """
    for _ in range(_SWEEPS):
        tied = tied + torch.stack([_beyond_rank(w - tied, rank) for w in weights]).mean(0)
    return tied


def _beyond_rank(residual: Tensor, rank: int) -> Tensor:
    a, b = truncated_svd(residual, rank)
    return residual - b @ a
