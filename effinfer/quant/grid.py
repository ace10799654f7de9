"""The values a low-bit weight can take: scales, zeros and offsets fitted to a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from effinfer.ops.lowbit_weight import FORMATS, LowBitWeight, check_group_size, groups

_CHUNK = 1 << 18  # weights looked at together: several passes over them stay in cache
_SCALES = 24  # candidates of a search
# By bits, the range of scales worth trying, in units of the one that just holds the largest weight.
_SPAN = {8: (0.9, 1.02), 4: (0.55, 1.15), 3: (0.4, 1.35), 2: (0.25, 2.0)}


class Column(NamedTuple):
    """The grid of one column, a number per output each."""

    inverse: torch.Tensor  # 1 / (scale * step), 0 where scale is
    shift: torch.Tensor  # code = round((w - offset) * inverse + shift)
    scale: torch.Tensor
    centre: torch.Tensor
    offset: torch.Tensor | None


@dataclass(frozen=True)
class Grid:
    """Scales ``(N, G)`` in their stored dtype, zeros in codes and offsets, each possibly absent."""

    format: str
    group_size: int
    scale: torch.Tensor
    zero: torch.Tensor | None
    offset: torch.Tensor | None

    def columns(self) -> list[Column]:
        """The grid of each group's columns, in float32."""
        layout = FORMATS[self.format]
        scale = self.scale.float().t().contiguous()
        inverse = torch.where(scale == 0, 0, 1 / (scale * layout.step))
        centre = torch.full_like(scale, layout.centre) if self.zero is None else self.zero.t()
        centre = centre.float().contiguous()
        shift = centre / layout.step
        offset = None if self.offset is None else self.offset.float().t().contiguous()
        return [
            Column(inverse[g], shift[g], scale[g], centre[g], None if offset is None else offset[g])
            for g in range(scale.shape[0])
        ]

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest codes ``(N, K)`` uint8 of a float32 ``weight``."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for g, column in enumerate(self.columns()):
            part = slice(g * self.group_size, (g + 1) * self.group_size)
            codes[:, part] = nearest(self.format, weight[:, part].t(), column).t()
        return codes

    def weight(self, codes: torch.Tensor) -> LowBitWeight:
        """A quantized weight of these codes."""
        return LowBitWeight(self.format, codes, self.scale, self.group_size, self.zero, self.offset)


def nearest(format: str, weight: torch.Tensor, column: Column) -> torch.Tensor:
    """The nearest codes of ``weight`` ``(..., N)``, as floats."""
    if column.offset is not None:
        weight = weight - column.offset
    codes = torch.addcmul(column.shift, weight, column.inverse)
    return codes.round_().clamp_(0, FORMATS[format].max_code)


def value(format: str, codes: torch.Tensor, column: Column) -> torch.Tensor:
    """What ``codes`` stand for, in the arithmetic of ``LowBitWeight.dequantize``."""
    step = FORMATS[format].step
    weight = ((codes if step == 1 else codes * step) - column.centre) * column.scale
    return weight if column.offset is None else weight + column.offset


def check_weight(op: str, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` as a finite float32 matrix.

    Raises:
        TypeError, ValueError: it is no floating matrix, or has NaN or infinity.
    """
    if not weight.is_floating_point():
        raise TypeError(f"{op}: weight must be floating, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must have 2 dimensions, got shape {tuple(weight.shape)}")
    weight = weight.detach().float().contiguous()
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{op}: weight must be finite, got NaN or infinity")
    return weight


def is_symmetric(format: str, symmetric: bool | None) -> bool:
    """Whether a format goes without zeros and offsets; None asks for its usual."""
    return format not in ("int3", "int2") if symmetric is None else symmetric


def fit_grid(
    op: str,
    weight: torch.Tensor,
    format: str,
    group_size: int,
    symmetric: bool | None = None,
    scale_dtype: torch.dtype = torch.float16,
    importance: torch.Tensor | None = None,
) -> Grid:
    """The scales and zeros of least squared error of rounding ``weight`` to the nearest.

    Ternary and binary scales are the optimum, found by sorting; others the best of a search,
    refined by least squares. A column's error counts ``importance`` ``(K,)`` times.

    Raises:
        ValueError: a group size the format does not take, or scales beyond ``scale_dtype``.
    """
    n, k = weight.shape
    check_group_size(format, group_size, k)
    symmetric = is_symmetric(format, symmetric)
    if not symmetric and format.startswith("ternary"):
        raise ValueError(f"{op}: {format} is always symmetric")
    group_size = min(group_size, max(k, 1))
    count = groups(k, group_size)
    cost = torch.ones(k, device=weight.device) if importance is None else importance.float()
    # A little for columns that calibration never saw: their scale should still make sense.
    cost = cost / cost.mean().clamp_min(1e-30) + 1e-4
    pad = (0, count * group_size - k)
    cost = torch.nn.functional.pad(cost, pad).view(count, group_size)
    scale = torch.empty(n, count, dtype=scale_dtype, device=weight.device)
    takes_zero = not symmetric and format != "binary"
    zero = torch.empty(n, count, dtype=torch.uint8, device=weight.device) if takes_zero else None
    offset = torch.empty_like(scale) if not symmetric and format == "binary" else None
    rows = max(1, _CHUNK // max(k, 1))
    for start in range(0, n if k else 0, rows):
        part = slice(start, start + rows)
        x = torch.nn.functional.pad(weight[part], pad).view(-1, count, group_size)
        if format == "binary":
            scale[part], middle = _fit_binary(x, cost, symmetric, scale_dtype)
            if offset is not None:
                offset[part] = middle
        elif zero is None and format.startswith("ternary"):
            scale[part] = _fit_ternary(x, cost)
        else:
            search = _Search(x, cost, format, scale_dtype)
            search.symmetric() if zero is None else search.asymmetric()
            scale[part] = search.scale
            if zero is not None:
                zero[part] = search.zero.to(torch.uint8)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{op}: scales do not fit {scale_dtype}; take a wider scale_dtype")
    return Grid(format, group_size, scale, zero, offset)


class _Search:
    """The best scale and zero so far of every group of ``x`` ``(n, G, group)``."""

    def __init__(
        self, x: torch.Tensor, cost: torch.Tensor, format: str, scale_dtype: torch.dtype
    ) -> None:
        self.x, self.cost, self.dtype = x, cost, scale_dtype
        self.layout = FORMATS[format]
        low, high = _SPAN[self.layout.bits]
        self.ratios = torch.linspace(low, high, _SCALES).tolist()
        self.error = x.new_full(x.shape[:2], torch.inf)
        self.scale = x.new_zeros(x.shape[:2])
        self.zero = x.new_full(x.shape[:2], self.layout.centre)

    def symmetric(self) -> None:
        """Scales of either sign: codes reach one further below the centre than above it."""
        largest = self.x.abs().argmax(-1, keepdim=True)
        base = self.x.gather(-1, largest).squeeze(-1) / -self.layout.centre
        signs = (1, -1) if self.layout.bits <= 4 else (1,)  # of 8 bits, one level more is nothing
        for sign in signs:
            for ratio in self.ratios:
                self._try(base * (sign * ratio), self.zero)
        self._refine()

    def asymmetric(self) -> None:
        """Any zero at all of a few codes; at 3 bits and more the neighbours of the natural one."""
        top = self.layout.max_code
        low, high = self.x.amin(-1).clamp_max(0), self.x.amax(-1).clamp_min(0)
        base = (high - low) / top
        natural = torch.where(base == 0, 0, -low / base).round()
        if self.layout.bits <= 2:
            zeros = [torch.full_like(natural, z) for z in range(top + 1)]
        else:
            zeros = [natural]
        for zero in zeros:
            for ratio in self.ratios:
                self._try(base * ratio, zero)
        best = self.zero
        if self.layout.bits in (3, 4):
            for step in (-1, 1):
                for ratio in (0.8, 0.9, 1.0, 1.1):
                    self._try(self.scale * ratio, (best + step).clamp(0, top))
        self._refine()

    def _values(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        inverse = torch.where(scale == 0, 0, 1 / scale).unsqueeze(-1)
        codes = torch.addcmul(zero.unsqueeze(-1), self.x, inverse)
        return codes.round_().clamp_(0, self.layout.max_code).sub_(zero.unsqueeze(-1))

    def _try(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Keep ``scale``, as it will be stored, and ``zero`` where they beat what is kept."""
        scale = scale.to(self.dtype).float()
        off = torch.addcmul(self.x, self._values(scale, zero), scale.unsqueeze(-1), value=-1)
        error = off.square_().mul_(self.cost).sum(-1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        if not bool(scale.isfinite().all()):
            self.scale = torch.where(scale.isfinite(), self.scale, scale)

    def _refine(self) -> None:
        """Alternate between codes and their least-squares scale."""
        for _ in range(2):
            values = self._values(self.scale, self.zero)
            weighted = values * self.cost
            norm = (weighted * values).sum(-1)
            fitted = (weighted * self.x).sum(-1) / norm.clamp_min(1e-30)
            self._try(torch.where(norm == 0, self.scale, fitted), self.zero)


def _fit_ternary(x: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """The optimal scale of {-1, 0, 1}: whatever it is, the m largest weights are not 0 for some m,
    and then the best one is their mean."""
    size, order = x.abs().sort(-1, descending=True)
    weight = cost.expand_as(x).gather(-1, order)
    total, mass = (size * weight).cumsum(-1), weight.cumsum(-1).clamp_min(1e-30)
    best = (total.square() / mass).argmax(-1, keepdim=True)
    return (total / mass).gather(-1, best).squeeze(-1)


def _fit_binary(
    x: torch.Tensor, cost: torch.Tensor, symmetric: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The optimal scale of {-1, 1} and the offset: the mean size, or the means of the lower and the
    upper part of the sorted weights, split where that explains most."""
    if symmetric:
        mean = (x.abs() * cost).sum(-1) / cost.sum(-1)
        return mean, torch.zeros_like(mean)
    # Padding has no cost; sorted among the weights it moves no mean.
    ordered, order = x.sort(-1)
    weight = cost.expand_as(x).gather(-1, order)
    total, mass = (ordered * weight).cumsum(-1), weight.cumsum(-1)
    below = total / mass.clamp_min(1e-30)
    rest = mass[..., -1:] - mass
    above = (total[..., -1:] - total) / rest.clamp_min(1e-30)
    # At the last split everything is below.
    above = torch.where(rest <= 1e-7 * mass[..., -1:], below, above)
    explained = mass * below.square() + rest.clamp_min(0) * above.square()
    best = explained.argmax(-1, keepdim=True)
    low, high = below.gather(-1, best).squeeze(-1), above.gather(-1, best).squeeze(-1)
    return (high - low) / 2, ((high + low) / 2).to(dtype)
