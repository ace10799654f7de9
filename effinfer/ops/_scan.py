"""What the scan ops share."""

from __future__ import annotations

import torch


def in_float32(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t`` in float32 with its strides kept: parameters that expand() made are not written out."""
    return t if t is None or t.dtype is torch.float32 else t.float()


def per_channel(m: torch.Tensor, batch: int, dim: int, length: int) -> torch.Tensor:
    """B or C in any of its forms as (batch, dim, N, length)."""
    if m.dim() == 2:
        return m[None, :, :, None].expand(batch, -1, -1, length)
    if m.dim() == 3:
        m = m[:, None]
    return m.repeat_interleave(dim // m.shape[1], 1)


def take_token(
    out: torch.Tensor,
    new: torch.Tensor,
    h: torch.Tensor,
    snapshots: torch.Tensor,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, state and snapshots after a token that made ``h`` into ``new``; ``valid`` (B,) False
    leaves the old ones and gives 0."""
    shifted = torch.cat([new[:, None], snapshots[:, :-1]], 1) if snapshots.shape[1] else snapshots
    if valid is None:
        return out, new, shifted
    # where, not a product: what is masked may be inf or nan
    return (
        torch.where(valid[:, None], out, torch.zeros_like(out)),
        torch.where(valid[:, None, None], new, h),
        torch.where(valid[:, None, None, None], shifted, snapshots),
    )
