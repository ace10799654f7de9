"""Low-bit weights: what codes, scales and zeros mean, and how they are packed for the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

PANEL = 16  # outputs side by side in a panel
MAX_GROUP = 65536  # columns of a group: int32 sums hold 255 * 127 times as many, and no more
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LowBitFormat:
    """How weights of one format are coded: ``value = step * code - centre``."""

    name: str
    bits: int  # of a code
    max_code: int
    step: int
    centre: int
    unit: int  # k of one packed unit
    unit_bytes: int
    group_step: int  # a group is a multiple of this, or all of k

    @property
    def bits_per_weight(self) -> float:
        """What one weight takes when packed, without scales."""
        return self.unit_bytes * 8 / (self.unit * PANEL)


FORMATS = {
    f.name: f
    for f in (
        LowBitFormat("int8", 8, 255, 1, 128, 4, 64, 16),
        LowBitFormat("int4", 4, 15, 1, 8, 8, 64, 16),
        LowBitFormat("int3", 3, 7, 1, 4, 32, 192, 32),
        LowBitFormat("int2", 2, 3, 1, 2, 16, 64, 16),
        LowBitFormat("ternary", 2, 2, 1, 1, 16, 64, 16),
        LowBitFormat("ternary_dense", 2, 2, 1, 1, 48, 160, 0),
        LowBitFormat("binary", 1, 1, 2, 1, 32, 64, 32),
    )
}


@dataclass(frozen=True)
class LowBitWeight:
    """A quantized weight as numbers, before packing: what loaders and quantizers make.

    ``w[n, k] = scale[n, g] * (value[n, k] - zero) + offset[n, g]`` with ``g = k // group_size``,
    computed in float32 in this order; ``value - zero`` is ``code - zero[n, g]`` where ``zero`` is
    given (formats with step 1), else the format's ``step * code - centre``.

    Attributes:
        format: a name in ``FORMATS``: int8, int4, int3, int2, ternary, ternary_dense or binary.
        codes: ``(N, K)`` uint8, at most the format's ``max_code``.
        scale: ``(N, G)`` float16, bfloat16 or float32, ``G = ceil(K / group_size)``.
        group_size: k per scale: a multiple of the format's ``group_step``, or ``K``.
        zero: ``(N, G)`` uint8, in codes; None for the format's centre.
        offset: ``(N, G)`` in ``scale``'s dtype, a float added to every weight of a group; or None.
        order: ``(K,)`` int64: column ``j`` multiplies ``x[..., order[j]]`` (act-order); or None.

    Raises:
        ValueError, TypeError: fields that do not fit together.
    """

    format: str
    codes: torch.Tensor
    scale: torch.Tensor
    group_size: int
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_format(self.format)
        layout = FORMATS[self.format]
        if self.codes.dim() != 2 or self.codes.dtype is not torch.uint8:
            raise TypeError(
                f"LowBitWeight: codes must be uint8 with 2 dimensions, got {self.codes.dtype} "
                f"{tuple(self.codes.shape)}"
            )
        n, k = self.codes.shape
        check_group_size(self.format, self.group_size, k)
        if self.codes.numel() and int(self.codes.max()) > layout.max_code:
            raise ValueError(
                f"LowBitWeight: codes of {self.format} must be at most {layout.max_code}, "
                f"got {int(self.codes.max())}"
            )
        if self.scale.dtype not in SCALE_DTYPES:
            raise TypeError(
                f"LowBitWeight: scale must be float16, bfloat16 or float32, got {self.scale.dtype}"
            )
        shape = (n, groups(k, self.group_size))
        for name, part, dtype in (
            ("scale", self.scale, self.scale.dtype),
            ("zero", self.zero, torch.uint8),
            ("offset", self.offset, self.scale.dtype),
        ):
            if part is not None and (part.shape != shape or part.dtype is not dtype):
                raise ValueError(
                    f"LowBitWeight: {name} must be {dtype} {shape}, got {part.dtype} "
                    f"{tuple(part.shape)}"
                )
        if self.zero is not None and layout.step != 1:
            raise ValueError(f"LowBitWeight: {self.format} takes no integer zero; use offset")
        if self.order is not None and (
            self.order.dtype is not torch.int64
            or self.order.shape != (k,)
            or not torch.equal(self.order.sort().values, torch.arange(k, device=self.order.device))
        ):
            raise ValueError(f"LowBitWeight: order must be an int64 permutation of {k} columns")

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.codes.shape[1]

    def values(self) -> torch.Tensor:
        """``value - zero``, ``(N, K)`` int16, columns in packed order."""
        layout = FORMATS[self.format]
        codes = self.codes.short()
        if self.zero is None:
            return layout.step * codes - layout.centre
        return codes - _per_weight(self.zero, self.group_size, self.in_features).short()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``(N, K)``, columns in the model's order; float32 arithmetic for ``dtype``
        float32 and narrower, float64 for float64."""
        wide = torch.promote_types(dtype, torch.float32)
        k = self.in_features
        weight = self.values().to(wide) * _per_weight(self.scale.to(wide), self.group_size, k)
        if self.offset is not None:
            weight += _per_weight(self.offset.to(wide), self.group_size, k)
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.order, weight)
        return weight.to(dtype)

    def to(self, device: torch.device | str) -> LowBitWeight:
        """The same on another device."""
        moved = {
            name: part.to(device)
            for name in ("codes", "scale", "zero", "offset", "order")
            if (part := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def groups(k: int, group_size: int) -> int:
    """Groups of ``k`` columns; the last may be short."""
    return -(-k // group_size) if k else 0


def check_group_size(format: str, group_size: int, k: int) -> None:
    """Raise ValueError for a group size that kernels of ``format`` do not take."""
    step = FORMATS[format].group_step
    if min(group_size, k) > MAX_GROUP:
        raise ValueError(
            f"{format}: a group must have at most {MAX_GROUP} columns, got {group_size}"
        )
    if group_size >= max(k, 1) or (step and group_size > 0 and group_size % step == 0):
        return
    allowed = f"a multiple of {step}, or at least {k} (all columns)" if step else f"at least {k}"
    raise ValueError(f"{format}: group_size must be {allowed}, got {group_size}")


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")


def _per_weight(x: torch.Tensor, group_size: int, k: int) -> torch.Tensor:
    """``(N, G)`` to ``(N, K)``."""
    return x.repeat_interleave(group_size, dim=1)[:, :k] if x.shape[1] != 1 else x.expand(-1, k)
