"""Convolutions of signs: one bit per weight and per activation (XNOR-Net, arXiv 1603.05279)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, dense_float32, inference_only, public
from effinfer.ops.binary_linear import (
    BINARY_EPILOGUES,
    activate,
    pack_signs,
    panels_of,
    unpack_signs,
)

Pair = int | tuple[int, int]


def pair(op: str, name: str, value: Pair) -> tuple[int, int]:
    """``(vertical, horizontal)`` of an argument that may be one number for both."""
    both = (value, value) if isinstance(value, int) else value
    if not isinstance(both, tuple | list) or [type(v) for v in both] != [int, int]:
        raise TypeError(f"{op}: {name} must be an integer or two, got {value!r}")
    return both[0], both[1]


def pack_binary_conv2d(weight: torch.Tensor) -> torch.Tensor:
    """Pack the signs of a weight for :func:`binary_conv2d`.

    Args:
        weight: ``(N, C, kh, kw)``, any real dtype; its magnitudes are not kept.

    Returns:
        ``(ceil(N / 32), kh * kw * ceil(C / 8), 32)``, uint8: panels of 32 outputs side by side.

    Raises:
        ValueError: a weight without four dimensions.
    """
    if weight.dim() != 4:
        raise ValueError(
            f"pack_binary_conv2d: weight must have 4 dimensions, got shape {tuple(weight.shape)}"
        )
    return panels_of(pack_signs(weight.permute(0, 2, 3, 1)).flatten(1))


def unpack_binary_conv2d(
    packed: torch.Tensor, in_channels: int, out_channels: int, kernel_size: tuple[int, int]
) -> torch.Tensor:
    """The ``(N, C, kh, kw)`` signs, +1 and -1 in float32, that :func:`pack_binary_conv2d` packed."""
    rows = packed.transpose(1, 2).flatten(0, 1)[:out_channels]
    taps = rows.reshape(out_channels, *kernel_size, -(-in_channels // 8))
    return unpack_signs(taps, in_channels).permute(0, 3, 1, 2).contiguous()


def output_size(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Height and width of a convolution's output; 0 where the kernel does not fit."""
    room = [
        s + 2 * p - d * (k - 1) - 1
        for s, k, p, d in zip(size, kernel, padding, dilation, strict=True)
    ]
    down, across = (0 if r < 0 else r // s + 1 for r, s in zip(room, stride, strict=True))
    return down, across


def conv_of_signs(
    signs: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    pad_ones: bool,
) -> torch.Tensor:
    """The dot products in plain torch, from signs ``(B, C, H, W)`` of a floating dtype."""
    spare = -signs.shape[1] % 8  # bits of each tap: +1 in x, and no products
    signs = F.pad(signs, (0, 0, 0, 0, 0, spare), value=1.0)
    weight = unpack_binary_conv2d(packed, signs.shape[1], out_channels, kernel_size)
    around = (padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(signs, around, value=1.0 if pad_ones else 0.0)
    dots = F.conv2d(padded, weight.to(signs.dtype), None, stride, 0, dilation)
    if spare:
        inside = padded[:1, -1:].abs(), weight.new_ones(1, 1, *kernel_size).to(signs.dtype)
        dots = dots - spare * F.conv2d(*inside, None, stride, 0, dilation)
    return dots


def check(
    op: str, x: torch.Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:  # fmt: skip
    """Refuse what would make the output's shape meaningless; the binding checks the rest."""
    if x.dim() != 4:
        raise ValueError(f"{op}: x must have 4 dimensions, got shape {tuple(x.shape)}")
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(values) < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {min(values)}")


def _check_epilogue(epilogue: str) -> None:
    if epilogue not in BINARY_EPILOGUES:
        raise ValueError(
            f"binary_conv2d: epilogue must be one of {', '.join(BINARY_EPILOGUES)}, got {epilogue!r}"
        )


def _reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    pad_ones: bool,
    epilogue: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    check("binary_conv2d", x, kernel_size, stride, padding, dilation)
    _check_epilogue(epilogue)
    is_bits = x.dtype is torch.uint8
    dtype = torch.float32 if is_bits else x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if is_bits:
        signs = unpack_signs(x, in_channels, wide).permute(0, 3, 1, 2)
    else:
        least = 0 if threshold is None else threshold.view(-1, 1, 1)
        signs = torch.where(x < least, -1, 1).to(wide)
    y = conv_of_signs(signs, packed, out_channels, kernel_size, stride, padding, dilation, pad_ones)
    if weight_scale is not None:
        y = y * weight_scale.to(wide).view(-1, 1, 1)
    if bias is not None:
        y = y + bias.to(wide).view(-1, 1, 1)
    y = activate(y, epilogue)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(dtype).contiguous(memory_format=torch.channels_last)


def new_output(
    x: torch.Tensor,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:
    """An empty output, ``(B, H, W, N)``."""
    is_bits = x.dtype is torch.uint8
    size = (x.shape[1], x.shape[2]) if is_bits else (x.shape[2], x.shape[3])
    shape = (x.shape[0], *output_size(size, kernel_size, stride, padding, dilation), out_channels)
    return x.new_empty(shape, dtype=torch.float32) if is_bits else x.new_empty(shape)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``(B, C, H, W)`` as dense ``(B, H, W, C)``, without a copy where memory lies so already."""
    return x.permute(0, 2, 3, 1).contiguous()


def _fake(
    x: torch.Tensor,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:
    return new_output(x, out_channels, kernel_size, stride, padding, dilation).permute(0, 3, 1, 2)


def _run(
    x: torch.Tensor,
    packed: torch.Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    pad_ones: bool,
    epilogue: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    inference_only("binary_conv2d", x, weight_scale, bias, threshold, residual)
    check("binary_conv2d", x, kernel_size, stride, padding, dilation)
    _check_epilogue(epilogue)
    y = new_output(x, out_channels, kernel_size, stride, padding, dilation)
    native(x).binary_conv2d(
        x.contiguous() if x.dtype is torch.uint8 else channels_last(x),
        packed,
        in_channels,
        out_channels,
        tuple(kernel_size),
        dense_float32(weight_scale),
        dense_float32(bias),
        dense_float32(threshold),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        pad_ones,
        epilogue,
        None if residual is None else channels_last(residual),
        y,
    )
    return y.permute(0, 3, 1, 2)


_OP = Op(
    "binary_conv2d",
    "(Tensor x, Tensor packed, SymInt in_channels, SymInt out_channels,"
    " SymInt[2] kernel_size, Tensor? weight_scale, Tensor? bias, Tensor? threshold, SymInt[2] stride, SymInt[2] padding,"
    " SymInt[2] dilation, bool pad_ones, str epilogue, Tensor? residual) -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def binary_conv2d(
    x: torch.Tensor,
    packed: torch.Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: Pair,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    threshold: torch.Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    pad_ones: bool = False,
    epilogue: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``epilogue(ws conv2d(sign(x - threshold), sign W) + bias) + residual``.

    ``sign`` is -1 where ``x < threshold`` and +1 elsewhere, at equality and for NaN too. The
    convolution is exact; without epilogue the result has the same bits on every instruction set and
    for every number of threads and images.

    Args:
        x: ``(B, C, H, W)``, float32, bfloat16 or float16, fastest with channels last in memory; or
            its signs, uint8 ``(B, H, W, ceil(C / 8))``, ``pack_signs(x.permute(0, 2, 3, 1))``.
        packed: from :func:`pack_binary_conv2d`.
        in_channels: ``C``.
        out_channels: ``N``.
        kernel_size: ``kh`` and ``kw``, or one number for both.
        weight_scale: ``(N,)``; 1 by default.
        bias: ``(N,)``.
        threshold: ``(C,)``; 0 by default, None for packed signs.
        stride, padding, dilation: of both dimensions, or ``(vertical, horizontal)``.
        pad_ones: padding is +1 instead of 0. A padding of 0 is neither sign: such taps contribute
            nothing, as in ``F.conv2d`` on signs.
        epilogue: ``none``, ``silu``, ``gelu`` (erf) or ``gelu_tanh``.
        residual: of the result's shape and dtype, added last.

    Returns:
        ``(B, N, H', W')`` with channels last in memory, in ``x``'s dtype, float32 for packed signs.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype, device or epilogue that does not fit.
        RuntimeError: an input requires grad.
    """
    geometry = (
        ("kernel_size", kernel_size),
        ("stride", stride),
        ("padding", padding),
        ("dilation", dilation),
    )
    kernel, *rest = (pair("binary_conv2d", *p) for p in geometry)
    return cast(
        torch.Tensor,
        _OP(
            x, packed, in_channels, out_channels, kernel, weight_scale, bias, threshold,
            *rest, pad_ones, epilogue, residual,
        ),
    )  # fmt: skip
