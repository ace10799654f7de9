"""Linear layers of signs: one bit per weight and per activation (XNOR-Net, arXiv 1603.05279)."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, contiguous_rows, dense_float32, inference_only, public

OUTPUTS = 32  # side by side in a panel
BINARY_EPILOGUES = ("none", "silu", "gelu", "gelu_tanh")


def pack_signs(x: torch.Tensor) -> torch.Tensor:
    """The signs of ``x``'s last dimension as bits: 1 where ``x < 0``, so zeros and NaN are +1.

    Args:
        x: ``(..., K)``, any real dtype.

    Returns:
        ``(..., ceil(K / 8))``, uint8; bit ``b`` of byte ``i`` belongs to element ``8 i + b``, spare
        bits are 0.
    """
    k = x.shape[-1]
    bits = F.pad((x.detach() < 0).to(torch.uint8), (0, -k % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    return (bits.view(*x.shape[:-1], -(-k // 8), 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_signs(bits: torch.Tensor, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The ``(..., k)`` signs, +1 and -1, that :func:`pack_signs` packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    ones = (bits.unsqueeze(-1) >> shifts & 1).flatten(-2)[..., :k]
    return 1 - 2 * ones.to(dtype)


def panels_of(bits: torch.Tensor) -> torch.Tensor:
    """Packed rows ``(N, bytes)`` as panels ``(ceil(N / 32), bytes, 32)``, huge pages behind them."""
    rows = F.pad(bits, (0, 0, 0, -bits.shape[0] % OUTPUTS))
    panels = rows.view(rows.shape[0] // OUTPUTS, OUTPUTS, bits.shape[1]).transpose(1, 2)
    packed = bits.new_empty(panels.shape)
    if packed.is_cpu and type(packed) is torch.Tensor and packed.numel():
        native(packed).advise_huge_pages(packed)
    return packed.copy_(panels)


def pack_binary(weight: torch.Tensor) -> torch.Tensor:
    """Pack the signs of a weight for :func:`binary_linear`.

    Args:
        weight: ``(N, K)``, any real dtype; its magnitudes are not kept (see ``weight_scale``).

    Returns:
        ``(ceil(N / 32), ceil(K / 8), 32)``, uint8: panels of 32 outputs side by side. The first
        ``p`` panels, or the first ``i`` bytes of every panel, are the packed first ``32 p`` outputs
        or ``8 i`` inputs: slices need no copy.

    Raises:
        ValueError: a weight that is not a matrix.
    """
    if weight.dim() != 2:
        raise ValueError(
            f"pack_binary: weight must have 2 dimensions, got shape {tuple(weight.shape)}"
        )
    return panels_of(pack_signs(weight))


def unpack_binary(
    packed: torch.Tensor, out_features: int, in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The ``(out_features, in_features)`` signs, +1 and -1, in ``packed``."""
    rows = packed.transpose(1, 2).flatten(0, 1)[:out_features]
    return unpack_signs(rows, in_features, dtype)


def _check(in_features: int, out_features: int, epilogue: str) -> None:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size < 0:
            raise ValueError(f"binary_linear: {name} must be 0 or more, got {size}")
    if epilogue not in BINARY_EPILOGUES:
        raise ValueError(
            f"binary_linear: epilogue must be one of {', '.join(BINARY_EPILOGUES)}, got {epilogue!r}"
        )


def activate(y: torch.Tensor, epilogue: str) -> torch.Tensor:
    """The plain-torch epilogue."""
    if epilogue == "silu":
        return F.silu(y)
    if epilogue.startswith("gelu"):
        return F.gelu(y, approximate="tanh" if epilogue == "gelu_tanh" else "none")
    return y


def _reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    in_features: int,
    out_features: int,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    mean_scale: bool,
    epilogue: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    _check(in_features, out_features, epilogue)
    is_bits = x.dtype is torch.uint8
    dtype = torch.float32 if is_bits else x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    signs = unpack_signs(x, in_features, wide) if is_bits else torch.where(x < 0, -1, 1).to(wide)
    spare = -in_features % 8  # bits of the last byte: +1 in x, and no products
    signs = F.pad(signs, (0, spare), value=1.0)
    y = signs @ unpack_binary(packed, out_features, in_features + spare, wide).t() - spare
    if weight_scale is not None:
        y = y * weight_scale.to(wide)
    if mean_scale:
        y = y * x.to(wide).abs().mean(-1, keepdim=True)
    if x_scale is not None:
        y = y * x_scale.to(wide).view(*x.shape[:-1], 1)
    if bias is not None:
        y = y + bias.to(wide)
    y = activate(y, epilogue)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(dtype)


def _fake(x: torch.Tensor, out_features: int) -> torch.Tensor:
    shape = (*x.shape[:-1], out_features)
    if x.dtype is torch.uint8:
        return x.new_empty(shape, dtype=torch.float32)
    return x.new_empty(shape)


def _run(
    x: torch.Tensor,
    packed: torch.Tensor,
    in_features: int,
    out_features: int,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    mean_scale: bool,
    epilogue: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    inference_only("binary_linear", x, weight_scale, bias, x_scale, residual)
    _check(in_features, out_features, epilogue)
    x = contiguous_rows(x)
    y = _fake(x, out_features)
    if residual is not None:
        if residual.shape != y.shape:
            raise ValueError(
                f"binary_linear: residual must have shape {tuple(y.shape)}, "
                f"got {tuple(residual.shape)}"
            )
        residual = contiguous_rows(residual)
    if x_scale is not None:
        x_scale = dense_float32(x_scale).reshape(-1)
    native(x).binary_linear(
        x,
        packed,
        in_features,
        out_features,
        dense_float32(weight_scale),
        dense_float32(bias),
        x_scale,
        mean_scale,
        epilogue,
        residual,
        y,
    )
    return y


_OP = Op(
    "binary_linear",
    "(Tensor x, Tensor packed, SymInt in_features, SymInt out_features, Tensor? weight_scale,"
    " Tensor? bias, Tensor? x_scale, bool mean_scale, str epilogue, Tensor? residual) -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def binary_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    in_features: int,
    out_features: int,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | Literal["mean"] | None = None,
    epilogue: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``epilogue(xs ws dot(sign x, sign W) + bias) + residual`` with ``W`` from :func:`pack_binary`.

    ``sign`` is -1 where a value is negative and +1 elsewhere: at 0, -0 and NaN too (``torch.sign(0)``
    is 0). The dot product is exact; without epilogue the result has the same bits on every
    instruction set, for every number of threads and of rows.

    Args:
        x: ``(..., K)``, float32, bfloat16 or float16, any strides; or its signs from
            :func:`pack_signs`, uint8 ``(..., ceil(K / 8))``, whose spare bits are ignored.
        packed: from :func:`pack_binary`; a slice of leading panels or bytes will do.
        in_features: ``K``, at most 2^24.
        out_features: ``N``.
        weight_scale: ``(N,)``, mean ``|W|`` of each output for instance; 1 by default.
        bias: ``(N,)``.
        x_scale: ``x.shape[:-1]``; or ``"mean"`` for ``mean |x|`` of each row, which carries a row's NaN
            and infinities on; 1 by default.
        epilogue: ``none``, ``silu``, ``gelu`` (erf) or ``gelu_tanh``.
        residual: ``(..., N)`` in the result's dtype, added last.

    Returns:
        ``(..., N)`` in ``x``'s dtype, float32 for packed signs.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype, device or epilogue that does not fit.
        RuntimeError: an input requires grad.
    """
    mean = isinstance(x_scale, str)
    if mean and x_scale != "mean":
        raise ValueError(f"binary_linear: x_scale must be a tensor or 'mean', got {x_scale!r}")
    return cast(
        torch.Tensor,
        _OP(
            x, packed, in_features, out_features, weight_scale, bias,
            None if mean else x_scale, mean, epilogue, residual,
        ),
    )  # fmt: skip
