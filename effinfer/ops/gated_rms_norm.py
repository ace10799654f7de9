"""RMSNorm with a silu gate, over groups of channels (Mamba-2, arXiv 2405.21060)."""

from __future__ import annotations

from typing import cast

import torch

from effinfer._native import native
from effinfer.ops._register import Op, contiguous_rows, dense_float32, inference_only, public


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = torch.ones_like(x, dtype=wide) if z is None else torch.nn.functional.silu(z.to(wide))
    r = x.to(wide) if norm_before_gate else x.to(wide) * gate
    size = group_size or max(x.shape[-1], 1)
    groups = r.reshape(*r.shape[:-1], r.shape[-1] // size, size)
    y = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    y = y.flatten(-2)
    if weight is not None:
        y = y * weight.to(wide)
    return (y * gate if norm_before_gate else y).to(x.dtype)


def _fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(contiguous_rows(x))


def _run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    z: torch.Tensor | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
) -> torch.Tensor:
    inference_only("gated_rms_norm", x, z)
    if z is not None and z.shape != x.shape:
        raise ValueError(
            f"gated_rms_norm: z must have shape {tuple(x.shape)}, got {tuple(z.shape)}"
        )
    if group_size is not None and group_size < 1:
        raise ValueError(
            f"gated_rms_norm: group_size must divide the last dimension, got {group_size}"
        )
    x = contiguous_rows(x)
    y = torch.empty_like(x)
    native(x).gated_rms_norm(
        x,
        dense_float32(weight),
        None if z is None else contiguous_rows(z),
        eps,
        -1 if group_size is None else group_size,
        norm_before_gate,
        y,
    )
    return y


_OP = Op(
    "gated_rms_norm",
    "(Tensor x, Tensor? weight, Tensor? z, float eps, int? group_size, bool norm_before_gate)"
    " -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def gated_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    """Normalise groups of channels by their root mean square, with a gate before or after.

    ``y = norm(x * silu(z))``, or ``norm(x) * silu(z)`` with ``norm_before_gate``, where ``norm(r) =
    r * rsqrt(mean(r^2) + eps) * weight`` and the mean runs over ``group_size`` channels.

    Args:
        x: ``(..., D)``, float32, bfloat16 or float16; any strides (a copy is made unless the last
            dimension is dense and rows are evenly spaced).
        weight: ``(D,)`` or None for 1.
        z: the gate, shape and dtype of ``x``, or None for no gate.
        eps: added to the mean square.
        group_size: channels per group, a divisor of D; None for all of them.
        norm_before_gate: gate the normalised values instead of the input.

    Returns:
        ``y`` in ``x``'s dtype.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
        RuntimeError: an input requires grad.
    """
    return cast(torch.Tensor, _OP(x, weight, z, eps, group_size, norm_before_gate))
