"""LayerNorm with an optional residual add (arXiv 1607.06450)."""

from __future__ import annotations

from typing import overload

import torch

from effinfer._native import native
from effinfer.ops._norm import fake_with_residual, residual_rows, sum_type
from effinfer.ops._register import Op, contiguous_rows, dense_float32, inference_only, public

Tensors = tuple[torch.Tensor, torch.Tensor]


def _reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    r = x.to(wide)
    centred = r - r.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


def _fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(contiguous_rows(x))


def _run(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    inference_only("layer_norm", x)
    x = contiguous_rows(x)
    y = torch.empty_like(x)
    native(x).layer_norm(x, dense_float32(weight), dense_float32(bias), eps, None, y, None)
    return y


def _reference_residual(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor,
    in_fp32: bool,
) -> Tensors:
    wide = torch.promote_types(x.dtype, torch.float32)
    r = x.to(wide) + residual.to(wide)
    y = _reference(r, weight, bias, eps)
    return y.to(x.dtype), r.to(sum_type(x, residual, in_fp32))


def _run_residual(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor,
    in_fp32: bool,
) -> Tensors:
    inference_only("layer_norm", x, residual)
    y, r = fake_with_residual(x, residual, in_fp32)
    x, residual = contiguous_rows(x), residual_rows(x, residual)
    native(x).layer_norm(x, dense_float32(weight), dense_float32(bias), eps, residual, y, r)
    return y, r


_OP = Op(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)
_OP_RESIDUAL = Op(
    "layer_norm_residual",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor residual, bool in_fp32)"
    " -> (Tensor, Tensor)",
    run=_run_residual,
    fake=fake_with_residual,
    reference=_reference_residual,
)


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    residual: torch.Tensor,
    residual_in_fp32: bool = ...,
) -> Tensors: ...


@public(_OP)
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    residual_in_fp32: bool = False,
) -> torch.Tensor | Tensors:
    """Normalise the last dimension to mean 0 and variance 1, optionally adding a residual first.

    ``r = x + residual``, ``y = (r - mean(r)) * rsqrt(var(r) + eps) * weight + bias``.

    Args:
        x: ``(..., D)``, float32, bfloat16 or float16; any strides (a copy is made unless the last
            dimension is dense and rows are evenly spaced).
        weight: ``(D,)`` or None for 1.
        bias: ``(D,)`` or None for 0.
        eps: added to the variance.
        residual: same shape as ``x``; its sum with ``x`` is returned too.
        residual_in_fp32: return that sum in float32 rather than the wider of the two types.

    Returns:
        ``y`` in ``x``'s dtype, or ``(y, r)`` when a residual is given.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
        RuntimeError: an input requires grad.
    """
    if residual is None:
        y: torch.Tensor = _OP(x, weight, bias, eps)
        return y
    pair: Tensors = _OP_RESIDUAL(x, weight, bias, eps, residual, residual_in_fp32)
    return pair
