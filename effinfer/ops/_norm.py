"""What the norms with a residual share."""

from __future__ import annotations

import torch

from effinfer.ops._register import contiguous_rows


def sum_type(x: torch.Tensor, residual: torch.Tensor, in_fp32: bool) -> torch.dtype:
    """The dtype in which ``x + residual`` is returned."""
    return torch.float32 if in_fp32 else torch.promote_types(x.dtype, residual.dtype)


def residual_rows(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """``residual`` as the kernels take it: in rows, and float32 unless it has ``x``'s dtype."""
    if residual.dim() != x.dim():
        raise TypeError(f"residual must have {x.dim()} dimensions, as x, got {residual.dim()}")
    if residual.dtype is not x.dtype and residual.dtype in (torch.bfloat16, torch.float16):
        residual = residual.float()
    return contiguous_rows(residual)


def fake_with_residual(
    x: torch.Tensor, residual: torch.Tensor, in_fp32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs ``(y, x + residual)``."""
    y = torch.empty_like(contiguous_rows(x))
    return y, torch.empty_like(y, dtype=sum_type(x, residual, in_fp32))
