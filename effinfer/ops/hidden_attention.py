"""The attention matrix hidden in a Mamba-1 scan (arXiv 2403.01590), for looking at a model."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, dense_float32, inference_only, public
from effinfer.ops._scan import per_channel


def _reference(
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    max_bytes: int,
) -> torch.Tensor:
    _check_size(delta, max_bytes)
    batch, dim, length = delta.shape
    wide = torch.promote_types(delta.dtype, torch.float32)
    B, C = (per_channel(m.to(wide), batch, dim, length) for m in (B, C))
    step = delta.to(wide)
    if delta_bias is not None:
        step = step + delta_bias.to(wide)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    alpha = delta.new_zeros((batch, dim, length, length), dtype=wide)
    # h[..., j, :]: what an input of 1 at position j has left in the states by position i.
    h = delta.new_zeros((batch, dim, length, A.shape[1]), dtype=wide)
    for i in range(length):
        d = step[:, :, i, None]
        h[:, :, :i] = torch.exp(d * A.to(wide))[:, :, None] * h[:, :, :i]
        h[:, :, i] = d * B[..., i]
        alpha[:, :, i] = (C[..., i][:, :, None] * h).sum(-1)
    return alpha


def _check_size(delta: torch.Tensor, max_bytes: int) -> None:
    if delta.dim() != 3:
        raise ValueError(
            f"hidden_attention: delta must have shape (B, D, L), got {tuple(delta.shape)}"
        )
    needed = 4 * delta.numel() * delta.shape[2]
    if needed > max_bytes:
        raise ValueError(
            f"hidden_attention: max_bytes must be at least {needed} for a result of shape "
            f"{(*delta.shape, delta.shape[2])}, got {max_bytes}"
        )


def _fake(delta: torch.Tensor, max_bytes: int) -> torch.Tensor:
    _check_size(delta, max_bytes)
    return delta.new_empty((*delta.shape, delta.shape[-1]), dtype=torch.float32)


def _run(
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    max_bytes: int,
) -> torch.Tensor:
    inference_only("hidden_attention", delta, A, B, C)
    alpha = _fake(delta, max_bytes)
    native(delta).hidden_attention(
        delta, dense_float32(A), B, C, dense_float32(delta_bias), delta_softplus, alpha
    )
    return alpha


_OP = Op(
    "hidden_attention",
    "(Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? delta_bias, bool delta_softplus,"
    " int max_bytes) -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def hidden_attention(
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    max_bytes: int = 2**30,
) -> torch.Tensor:
    """The matrix a Mamba-1 layer multiplies its input by: ``selective_scan``'s ``y = alpha u + D u``.

    ``alpha[i, j] = sum_n C_i[n] (prod_{j < k <= i} exp(d_k A[n])) d_j B_j[n]`` for ``j <= i``, zero
    above, with ``d = softplus(delta + delta_bias)``, per channel. It is quadratic in the length.

    Args:
        delta: ``(B, D, L)``, float32, bfloat16 or float16, any strides.
        A: ``(D, N)``, real.
        B, C: ``(D, N)`` constant, ``(B, N, L)`` per position, or ``(B, G, N, L)`` grouped.
        delta_bias: ``(D,)``.
        delta_softplus: apply softplus to ``delta + delta_bias``.
        max_bytes: refuse when the result would be larger.

    Returns:
        ``(B, D, L, L)`` float32. Error bound: relative L2 against float64 <= 1e-6.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, or a result of more than
            ``max_bytes``.
        RuntimeError: an input requires grad.
    """
    return cast(torch.Tensor, _OP(delta, A, B, C, delta_bias, delta_softplus, max_bytes))
