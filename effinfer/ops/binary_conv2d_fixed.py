"""A&B BNN's block in integers: a binary convolution, additions and shifts (arXiv 2403.03739)."""

from __future__ import annotations

from typing import cast

import torch

from effinfer._native import native
from effinfer.ops._register import Op, public
from effinfer.ops.binary_conv2d import (
    Pair,
    binary_conv2d,
    channels_last,
    check,
    conv_of_signs,
    new_output,
    pair,
)

FIXED_LIMIT = 1 << 29  # residuals and outputs are kept within +- this
MOST_BIAS = 1 << 28


def _reference(
    x: torch.Tensor,
    threshold: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: tuple[int, int],
    gain_shift: torch.Tensor,
    pre_bias: torch.Tensor,
    slope_shift: torch.Tensor,
    post_bias: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    pad_ones: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    check("binary_conv2d_fixed", x, kernel_size, stride, padding, dilation)

    def per_channel(t: torch.Tensor) -> torch.Tensor:
        return t.long().view(-1, 1, 1)

    signs = torch.where(x < threshold.view(-1, 1, 1), -1.0, 1.0).double()
    dot = conv_of_signs(
        signs, packed, out_channels, kernel_size, stride, padding, dilation, pad_ones
    )
    a = (dot.long() << per_channel(gain_shift)) + per_channel(pre_bias)
    if residual is not None:
        a = a + residual.long().clamp(-FIXED_LIMIT, FIXED_LIMIT)
    a = torch.where(a < 0, a >> per_channel(slope_shift), a) + per_channel(post_bias)
    y = a.clamp(-FIXED_LIMIT, FIXED_LIMIT).int()
    return y.contiguous(memory_format=torch.channels_last)


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
    threshold: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: tuple[int, int],
    gain_shift: torch.Tensor,
    pre_bias: torch.Tensor,
    slope_shift: torch.Tensor,
    post_bias: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    pad_ones: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    check("binary_conv2d_fixed", x, kernel_size, stride, padding, dilation)
    y = new_output(x, out_channels, kernel_size, stride, padding, dilation)
    native(x).binary_conv2d_fixed(
        channels_last(x),
        threshold,
        packed,
        x.shape[1],
        out_channels,
        tuple(kernel_size),
        gain_shift,
        pre_bias,
        slope_shift,
        post_bias,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        pad_ones,
        None if residual is None else channels_last(residual),
        y,
    )
    return y.permute(0, 3, 1, 2)


_OP = Op(
    "binary_conv2d_fixed",
    "(Tensor x, Tensor threshold, Tensor packed, SymInt out_channels, SymInt[2] kernel_size,"
    " Tensor gain_shift, Tensor pre_bias, Tensor slope_shift, Tensor post_bias, SymInt[2] stride,"
    " SymInt[2] padding, SymInt[2] dilation, bool pad_ones, Tensor? residual) -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def binary_conv2d_fixed(
    x: torch.Tensor,
    threshold: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: Pair,
    gain_shift: torch.Tensor,
    pre_bias: torch.Tensor,
    slope_shift: torch.Tensor,
    post_bias: torch.Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    pad_ones: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """A block of A&B BNN on 32-bit fixed-point numbers: no multiplication, nothing rounded but ``>>``.

    With ``dot = conv2d(sign(x - threshold), sign W)`` and, per output channel,
    ``a = (dot << gain_shift) + residual + pre_bias``,
    ``y = clamp((a if a >= 0 else a >> slope_shift) + post_bias)``; ``>>`` rounds down. Exact on
    every instruction set.

    Args:
        x: int32 ``(B, C, H, W)``, fastest with channels last in memory.
        threshold: int32 ``(C,)``; ``x < threshold`` is -1, else +1.
        packed: from :func:`~effinfer.ops.pack_binary_conv2d`.
        out_channels: ``N``.
        kernel_size: ``kh`` and ``kw``, or one number for both.
        gain_shift: int32 ``(N,)``, 0 to 29, with ``C kh kw << gain_shift <= 2^29``.
        pre_bias, post_bias: int32 ``(N,)``, within +-2^28.
        slope_shift: int32 ``(N,)``, 0 to 31: the slope of negative numbers is 2^-slope_shift.
        stride, padding, dilation, pad_ones: as in :func:`~effinfer.ops.binary_conv2d`.
        residual: int32 of the result's shape.

    Returns:
        int32 ``(B, N, H', W')`` with channels last in memory. It and the residual are clamped to
        +-2^29, so that with parameters in the stated ranges no sum overflows.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; on the CPU also a shift or
            bias out of its range (a GPU's are not read for that).
    """
    geometry = (
        ("kernel_size", kernel_size),
        ("stride", stride),
        ("padding", padding),
        ("dilation", dilation),
    )
    kernel, *rest = (pair("binary_conv2d_fixed", *p) for p in geometry)
    return cast(
        torch.Tensor,
        _OP(
            x, threshold, packed, out_channels, kernel, gain_shift, pre_bias, slope_shift,
            post_bias, *rest, pad_ones, residual,
        ),
    )  # fmt: skip


binary_conv2d_fixed.isa = binary_conv2d.isa  # one native op with two epilogues
