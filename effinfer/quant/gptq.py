"""GPTQ (arXiv 2210.17323): columns quantized one after another, each error made up for by the rest."""

from __future__ import annotations

import torch

from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.quant.grid import check_weight, fit_grid, nearest, value

BLOCK = 128  # columns between two updates of all later ones


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    format: str = "int4",
    group_size: int = 128,
    symmetric: bool | None = None,
    scale_dtype: torch.dtype = torch.float16,
    damping: float = 0.01,
    act_order: bool = True,
) -> LowBitWeight:
    """Quantize ``weight`` so that the layer's *outputs* stay near: ``|(W - Q) X|`` is made small.

    Scales are those of rounding to the nearest, fixed before the first column is touched, so a
    group is always neighbouring columns and the layer needs no permutation, whatever the order.

    Args:
        weight: ``(N, K)``, any float dtype, finite.
        hessian: ``(K, K)``, ``X^T X`` of the layer's inputs, by any factor.
        format, group_size, symmetric, scale_dtype: as for :func:`effinfer.quant.rtn`.
        damping: share of the mean diagonal that is added to the diagonal. Where the factorisation
            needs more it is raised tenfold at a time.
        act_order: take the columns with the largest inputs first.

    Columns whose inputs were always zero are rounded to the nearest.

    Raises:
        ValueError, TypeError: as for ``rtn``, or a ``hessian`` of another shape, with NaN or
            infinity, or that no damping makes positive definite.
    """
    weight = check_weight("gptq", weight)
    hessian = check_hessian("gptq", hessian, weight.shape[1])
    grid = fit_grid("gptq", weight, format, group_size, symmetric, scale_dtype, hessian.diagonal())
    columns = grid.columns()
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order], damping)
    rows = weight.t()[order].contiguous()  # (K, N): a column of the weight is dense
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    group_of = (order // grid.group_size).tolist()
    k = len(group_of)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        errors = torch.empty_like(rows[start:end])
        for j in range(start, end):
            column = columns[group_of[j]]
            code = nearest(format, rows[j], column)
            codes[j] = code
            error = torch.sub(rows[j], value(format, code, column), out=errors[j - start])
            error /= upper[j, j]
            if j + 1 < end:
                rows[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        rows[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return grid.weight(restored.t().contiguous())


def check_hessian(op: str, hessian: torch.Tensor, k: int) -> torch.Tensor:
    """``hessian`` as a finite float32 ``(K, K)``."""
    if hessian.shape != (k, k):
        raise ValueError(f"{op}: hessian must have shape {(k, k)}, got {tuple(hessian.shape)}")
    hessian = hessian.float()
    if not bool(hessian.isfinite().all()):
        raise ValueError(f"{op}: hessian must be finite, got NaN or infinity")
    if bool((hessian.diagonal() < 0).any()):
        raise ValueError(f"{op}: hessian must be X^T X, got a negative diagonal")
    return hessian


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular ``U`` with ``U^T U`` the inverse of the damped Hessian, in float32.

    The Hessian is factored from its last column to its first, ``H = A A^T`` with ``A`` upper
    triangular, of which ``U`` is the inverse: the inverse of ``H`` itself is never formed.
    """
    k = hessian.shape[0]
    wide = hessian.double().flip(0, 1)
    diagonal = wide.diagonal()
    dead = diagonal == 0
    mean = diagonal.mean().item() if k else 0.0
    diagonal[dead] = mean or 1.0
    share, added = damping, 0.0
    while True:
        diagonal += share * mean - added
        added = share * mean
        factor, failed = torch.linalg.cholesky_ex(wide)
        if not failed and bool(factor.isfinite().all()):
            break
        share = max(share, 1e-6) * 10
        if share > 10:
            raise ValueError("gptq: hessian is not X^T X: no damping makes it positive definite")
    eye = torch.eye(k, dtype=wide.dtype, device=wide.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse.flip(0, 1).float().contiguous()
