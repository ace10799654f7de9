"""Linear layers on weights packed once: ``epilogue(x W^T + bias) + residual``."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, contiguous_rows, dense_float32, inference_only, public

PANEL = 16  # outputs side by side in a panel
EPILOGUES = ("none", "silu", "gelu", "gelu_tanh", "silu_mul", "gelu_mul")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _takes_two(epilogue: str) -> bool:
    return epilogue.endswith("_mul")


def _pack_into(panels: torch.Tensor, weight: torch.Tensor) -> None:
    """Fill ``panels`` (ceil(N/16), K, 16) from ``weight`` (N, K); outputs past N become zero."""
    n, k = weight.shape
    full = n // PANEL
    if panels.dtype is torch.bfloat16:  # output j beside output j + 8
        panels = panels.view(panels.shape[0], k, 8, 2).transpose(2, 3)
        rows = weight[: full * PANEL].view(full, 2, 8, k).permute(0, 3, 1, 2)
    else:
        rows = weight[: full * PANEL].view(full, PANEL, k).transpose(1, 2)
    panels[:full].copy_(rows)
    if full < panels.shape[0]:
        tail = weight.new_zeros(k, PANEL)
        tail[:, : n - full * PANEL] = weight[full * PANEL :].t()
        panels[full].copy_(tail.view(panels[full].shape))


def pack_linear(weight: torch.Tensor, *, gate_weight: torch.Tensor | None = None) -> torch.Tensor:
    """Pack a weight for :func:`linear`: once, when the model is patched or loaded.

    Args:
        weight: ``(N, K)``, float32, bfloat16 or float16.
        gate_weight: ``(N, K)``, for the epilogues ``silu_mul`` and ``gelu_mul``, whose ``weight`` is
            the "up" projection.

    Returns:
        An ordinary tensor of ``weight``'s dtype and device, ``(ceil(N/16), K, 16)``, or with a gate
        ``(2 ceil(N/16), K, 16)``; huge pages are asked for behind it. bfloat16 panels hold their
        16 outputs interleaved, so change the dtype before packing, not after.

    Raises:
        ValueError, TypeError: a weight that is not a matrix, or a gate that does not match it.
    """
    weight = weight.detach()
    if weight.dim() != 2:
        raise ValueError(
            f"pack_linear: weight must have 2 dimensions, got shape {tuple(weight.shape)}"
        )
    if weight.dtype not in _FLOATS:
        raise TypeError(
            f"pack_linear: weight must be float32 or bfloat16 or float16, got {weight.dtype}"
        )
    parts = [weight] if gate_weight is None else [gate_weight.detach(), weight]
    for part in parts:
        if part.shape != weight.shape or part.dtype != weight.dtype or part.device != weight.device:
            raise ValueError(
                f"pack_linear: gate_weight must be {weight.dtype} {tuple(weight.shape)} on "
                f"{weight.device} like weight, got {part.dtype} {tuple(part.shape)} on {part.device}"
            )
    n, k = weight.shape
    packed = weight.new_empty((n + PANEL - 1) // PANEL * len(parts), k, PANEL)
    if packed.is_cpu and type(packed) is torch.Tensor and packed.numel():
        native(packed).advise_huge_pages(packed)
    for i, part in enumerate(parts):
        _pack_into(packed[i :: len(parts)], part.contiguous())
    return packed


def unpack_linear(
    packed: torch.Tensor, out_features: int, *, gated: bool = False
) -> tuple[torch.Tensor, ...]:
    """The matrices :func:`pack_linear` was given: ``(weight,)``, or ``(gate_weight, weight)``."""
    if packed.dtype is torch.bfloat16:
        packed = packed.view(*packed.shape[:2], 8, 2).transpose(2, 3).flatten(2)
    count = 2 if gated else 1
    rows = [packed[i::count].transpose(1, 2).flatten(0, 1)[:out_features] for i in range(count)]
    return tuple(row.contiguous() for row in rows)


def _check(epilogue: str, out_features: int) -> None:
    if out_features < 0:
        raise ValueError(f"linear: out_features must be 0 or more, got {out_features}")
    if epilogue not in EPILOGUES:
        raise ValueError(
            f"linear: epilogue must be one of {', '.join(EPILOGUES)}, got {epilogue!r}"
        )


def _reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    epilogue: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    _check(epilogue, out_features)
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = unpack_linear(packed, out_features, gated=_takes_two(epilogue))
    biases = [None] * len(weights) if bias is None else bias.to(wide).view(len(weights), -1)
    y, *up = (F.linear(x.to(wide), w.to(wide), b) for w, b in zip(weights, biases, strict=True))
    if epilogue.startswith("silu"):
        y = F.silu(y)
    elif epilogue.startswith("gelu"):
        y = F.gelu(y, approximate="tanh" if epilogue == "gelu_tanh" else "none")
    if up:
        y = y * up[0]
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype)


def _fake(x: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _run(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    epilogue: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    inference_only("linear", x, bias, residual)
    _check(epilogue, out_features)
    x = contiguous_rows(x)
    y = x.new_empty((*x.shape[:-1], out_features))
    if residual is not None:
        if residual.shape != y.shape:
            raise ValueError(
                f"linear: residual must have shape {tuple(y.shape)}, got {tuple(residual.shape)}"
            )
        residual = contiguous_rows(residual)
    native(x).linear(x, packed, out_features, dense_float32(bias), epilogue, residual, y)
    return y


_OP = Op(
    "linear",
    "(Tensor x, Tensor packed, SymInt out_features, Tensor? bias, str epilogue, Tensor? residual)"
    " -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    *,
    epilogue: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``epilogue(x W^T + bias) + residual`` with ``W`` from :func:`pack_linear`.

    A row's bits depend on that row and the weights alone: not on the other rows, the strides or the
    number of threads.

    Args:
        x: ``(..., K)``, float32, bfloat16 or float16, whatever the weights' dtype; any strides (a
            copy is made unless the last dimension is dense and rows are evenly spaced).
        packed: from ``pack_linear(weight)``; for ``silu_mul`` and ``gelu_mul`` from
            ``pack_linear(up, gate_weight=gate)``.
        out_features: ``N``.
        bias: ``(N,)``; ``(2, N)``, the gate's first, for the ``*_mul`` epilogues.
        epilogue: ``none``, ``silu``, ``gelu`` (erf), ``gelu_tanh``, ``silu_mul``
            (``silu(gate) * up``) or ``gelu_mul``.
        residual: ``(..., N)`` in ``x``'s dtype, added last.

    Returns:
        ``(..., N)`` in ``x``'s dtype; products are summed in float32.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype, device or epilogue that does not fit.
        RuntimeError: an input requires grad.
    """
    return cast(torch.Tensor, _OP(x, packed, out_features, bias, epilogue, residual))
