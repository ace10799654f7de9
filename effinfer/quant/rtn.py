"""Rounding to the nearest value of the best grid."""

from __future__ import annotations

import torch

from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.quant.grid import check_weight, fit_grid


def rtn(
    weight: torch.Tensor,
    hessian: torch.Tensor | None = None,
    *,
    format: str = "int4",
    group_size: int = 128,
    symmetric: bool | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> LowBitWeight:
    """Quantize ``weight`` to the nearest codes, with scales that minimise the squared error.

    Args:
        weight: ``(N, K)``, any float dtype, finite.
        hessian: ``(K, K)`` ``X^T X`` of the layer's inputs; its diagonal says how much each column's
            error counts in the search for scales. None counts all the same.
        format: a name in ``effinfer.ops.lowbit_weight.FORMATS``.
        group_size: columns per scale: a multiple of the format's ``group_step``, or at least ``K``.
        symmetric: without zero points; None for the format's usual.
        scale_dtype: of the stored scales; codes are chosen for the scales as stored.

    Raises:
        ValueError, TypeError: as said above, or scales beyond ``scale_dtype``.
    """
    weight = check_weight("rtn", weight)
    importance = None if hessian is None else hessian.diagonal()
    grid = fit_grid("rtn", weight, format, group_size, symmetric, scale_dtype, importance)
    return grid.weight(grid.codes(weight))
