"""A&B BNN (CVPR 2024, arXiv 2403.03739): a network of additions, shifts and comparisons.

A block in floating point, between a network's first and last layer, is

    out = prelu(alpha g conv2d(sign(beta x + b0), sign W) + shortcut(x) + b1) + b2

with ``g`` a gain per output and ``prelu`` of slope 2^L below zero, L an integer. Here it is frozen to
fixed point, numbers of ``fraction_bits`` fractional bits in int32:

- The mask layer is gone. beta > 0, so ``sign(beta x + b0) = sign(x - t)`` with ``t = -b0 / beta``, and a
  number x on the grid is below t exactly where it is below t rounded up to the grid.
- The gain ``alpha g`` becomes a power of two: a left shift of an integer. (The public code keeps it in
  floating point.) A gain trained as a power of two loses nothing.
- ``b1`` and ``b2`` are rounded to the grid; the slope is an arithmetic right shift, rounding down.

``sign(0)`` is +1 here. The public training code uses ``torch.sign``, whose sign of 0 is 0: an activation
equal to its threshold contributes nothing there, and +1 here. Weights that are exactly 0 differ too.

How far a frozen block may be from the floating one is :meth:`ABBlock.error_bound`; it is 0 where gains
are powers of two, biases lie on the grid and right shifts lose no bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from effinfer.ops import binary_conv2d_fixed, pack_binary_conv2d
from effinfer.ops.binary_conv2d import unpack_binary_conv2d
from effinfer.ops.binary_conv2d_fixed import FIXED_LIMIT, MOST_BIAS


def to_fixed(x: torch.Tensor, fraction_bits: int) -> torch.Tensor:
    """Fixed point, int32: ``x 2^fraction_bits`` rounded to nearest even, clamped to +-2^29; NaN is 0."""
    scaled = (x.double() * 2.0**fraction_bits).round().nan_to_num(0.0)
    return scaled.clamp(-FIXED_LIMIT, FIXED_LIMIT).int()


def from_fixed(
    x: torch.Tensor, fraction_bits: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The numbers that int32 ``x`` stands for; exact in float64."""
    return (x.double() * 2.0**-fraction_bits).to(dtype)


def _per_output(name: str, value: torch.Tensor, size: int) -> torch.Tensor:
    value = value.detach().double()
    if value.shape != (size,):
        raise ValueError(f"ABBlock: {name} must have shape ({size},), got {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"ABBlock: {name} must be finite")
    return value


def _power_of_two(name: str, gain: torch.Tensor) -> torch.Tensor:
    """Exponents of the powers of two nearest to ``|gain|`` in ratio."""
    if (gain == 0).any():
        raise ValueError(f"ABBlock: {name} must not be 0: no power of two is near it")
    return gain.abs().log2().round()


def _integers(name: str, value: torch.Tensor, most: int) -> torch.Tensor:
    if (value.abs() > most).any():
        largest = value.abs().max().item()
        raise ValueError(
            f"ABBlock: {name} must be within +-{most} in fixed point, got {largest:.0f}"
        )
    return value.int()


class ABShortcut(nn.Module):
    """The shortcut of a block that changes its shape: means of 2 x 2 pixels, then a 1 x 1 convolution with
    binary weights, ``y = gain sum(+-mean)``, in fixed point. All sums are exact; one right shift at the
    end rounds down, so that the error is below one unit.

    Args:
        weight: ``(N, C, 1, 1)``, of which the signs are kept.
        gain: ``(N,)``, frozen to powers of two of at most 4.
        pool: 2, or 1 for no pooling.
    """

    signs: torch.Tensor
    shift: torch.Tensor

    def __init__(self, weight: torch.Tensor, gain: torch.Tensor, pool: int = 2) -> None:
        super().__init__()
        if pool not in (1, 2):
            raise ValueError(f"ABShortcut: pool must be 1 or 2, got {pool}")
        gain = _per_output("gain of a shortcut", gain, weight.shape[0])
        exponent = _power_of_two("gain of a shortcut", gain)
        shift = 2 * (pool - 1) - exponent
        if (shift < 0).any() or (shift > 31).any():
            raise ValueError("ABShortcut: gain must be in [2^-29, 1] times the pooled pixels")
        self.pool = pool
        signs = torch.where(weight.detach() < 0, -1.0, 1.0).double()
        self.register_buffer("signs", signs * gain.sign().view(-1, 1, 1, 1).to(signs))
        self.register_buffer("shift", shift.long().view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sums = x.double()  # every sum is an integer below 2^53
        if self.pool == 2:
            sums = F.avg_pool2d(sums, 2, divisor_override=1)
        shifted = F.conv2d(sums, self.signs.double()).long() >> self.shift
        return shifted.clamp(-FIXED_LIMIT, FIXED_LIMIT).int()

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The same in float64, nothing rounded."""
        x = x.double()
        pooled = F.avg_pool2d(x, 2, divisor_override=1) if self.pool == 2 else x
        return F.conv2d(pooled, self.signs.double()) * 2.0 ** -self.shift.double()


class ABBlock(nn.Module):
    """One block of A&B BNN, int32 fixed point in and out: additions, shifts and comparisons only.

    Args:
        weight: ``(N, C, kh, kw)``, as the network binarizes it (after its standardization, where the
            network has one): its signs are kept.
        gain: ``(N,)``, the whole factor of the convolution: ``alpha * gain * mean|w|``; frozen to the
            nearest powers of two. A negative gain turns its output's weights.
        threshold: ``(C,)``, ``-b0 / beta``.
        pre_bias, post_bias: ``(N,)``, ``b1`` and ``b2``.
        slope_exponent: ``(N,)``, ``L`` rounded to integers, -31 to 0.
        fraction_bits: of the numbers in and out, 0 to 24; enough that every gain times
            2^fraction_bits is at least 1.
        stride, padding, pad_ones: of the convolution.
        shortcut: None for the identity, which keeps the shape; else a module from int32 to int32,
            :class:`ABShortcut` for instance.

    Raises:
        ValueError: a shape, a number that is not finite or does not fit the fixed point.
    """

    packed: torch.Tensor
    threshold: torch.Tensor
    gain_shift: torch.Tensor
    pre_bias: torch.Tensor
    slope_shift: torch.Tensor
    post_bias: torch.Tensor
    freezing_error: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        gain: torch.Tensor,
        threshold: torch.Tensor,
        pre_bias: torch.Tensor,
        slope_exponent: torch.Tensor,
        post_bias: torch.Tensor,
        fraction_bits: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        pad_ones: bool = False,
        shortcut: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if weight.dim() != 4:
            raise ValueError(f"ABBlock: weight must have 4 dimensions, got {tuple(weight.shape)}")
        if not 0 <= fraction_bits <= 24:
            raise ValueError(f"ABBlock: fraction_bits must be in [0, 24], got {fraction_bits}")
        n, c = weight.shape[:2]
        self.in_channels, self.out_channels = c, n
        self.kernel_size = (weight.shape[2], weight.shape[3])
        self.stride, self.padding, self.pad_ones = stride, padding, pad_ones
        self.fraction_bits, self.shortcut = fraction_bits, shortcut
        one = 2.0**fraction_bits
        gain = _per_output("gain", gain, n)
        exponent = _power_of_two("gain", gain)
        shift = exponent + fraction_bits
        if (shift < 0).any():
            raise ValueError(
                f"ABBlock: fraction_bits must be at least {-int(exponent.min())} for these gains, "
                f"got {fraction_bits}"
            )
        terms = weight[0].numel() if n else 0
        if n and terms * 2.0 ** shift.max().item() > FIXED_LIMIT:
            most = fraction_bits - math.ceil(
                math.log2(terms * 2.0 ** shift.max().item() / FIXED_LIMIT)
            )
            raise ValueError(
                f"ABBlock: fraction_bits must be at most {most} for these gains, got {fraction_bits}"
            )
        slope = _per_output("slope_exponent", slope_exponent, n)
        if (slope != slope.round()).any() or (slope > 0).any() or (slope < -31).any():
            raise ValueError("ABBlock: slope_exponent must be integers in [-31, 0]")
        biases = {
            name: _per_output(name, value, n)
            for name, value in (("pre_bias", pre_bias), ("post_bias", post_bias))
        }
        signs = torch.where(weight.detach() < 0, -1.0, 1.0) * gain.sign().view(-1, 1, 1, 1)
        self.register_buffer("packed", pack_binary_conv2d(signs))
        above = (_per_output("threshold", threshold, c) * one).ceil()
        self.register_buffer("threshold", above.clamp(-(2**31), 2**31 - 1).int())
        self.register_buffer("gain_shift", shift.int())
        self.register_buffer("slope_shift", (-slope).int())
        error = terms * (gain.abs() - 2.0**exponent).abs()
        for name, value in biases.items():
            rounded = (value * one).round()
            self.register_buffer(name, _integers(name, rounded, MOST_BIAS))
            error = error + (value - rounded / one).abs()
        self.register_buffer("freezing_error", error)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return binary_conv2d_fixed(
            x,
            self.threshold,
            self.packed,
            self.out_channels,
            self.kernel_size,
            self.gain_shift,
            self.pre_bias,
            self.slope_shift,
            self.post_bias,
            stride=self.stride,
            padding=self.padding,
            pad_ones=self.pad_ones,
            residual=x if self.shortcut is None else self.shortcut(x),
        )

    def error_bound(self) -> torch.Tensor:
        """``(N,)``: how far an output may be from the floating block's, for an input on the grid, the same
        shortcut, and numbers within the range of the fixed point.

        Both see the same signs, so the convolutions differ by at most ``terms |gain - 2^e|``; the biases
        add their roundings; the prelu's slopes are at most 1, so it enlarges nothing, and its right
        shift loses less than one unit.
        """
        return self.freezing_error + (self.slope_shift > 0) * 2.0**-self.fraction_bits

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The frozen block in float64, nothing rounded: ``x`` and the result are ordinary numbers."""
        one = 2.0**self.fraction_bits

        def per_channel(value: torch.Tensor) -> torch.Tensor:
            return value.double().view(-1, 1, 1)

        x = x.double()
        signs = torch.where(x < per_channel(self.threshold) / one, -1.0, 1.0).double()
        shape = self.in_channels, self.out_channels, self.kernel_size
        weight = unpack_binary_conv2d(self.packed, *shape).double()
        down, across = (self.padding,) * 2 if isinstance(self.padding, int) else self.padding
        padded = F.pad(signs, (across, across, down, down), value=float(self.pad_ones))
        dot = F.conv2d(padded, weight, stride=self.stride)
        shortcut = x if self.shortcut is None else self.shortcut.reference(x)  # type: ignore[operator]
        a = dot * (2.0 ** per_channel(self.gain_shift) / one) + shortcut
        a = a + per_channel(self.pre_bias) / one
        a = torch.where(a < 0, a * 2.0 ** -per_channel(self.slope_shift), a)
        return a + per_channel(self.post_bias) / one

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, fraction_bits={self.fraction_bits}"
        )
