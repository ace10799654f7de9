"""HQQ checkpoints (Half-Quadratic Quantization): float zero points, 8 to 1 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from effinfer.ops.lowbit_weight import FORMATS, LowBitWeight, check_group_size
from effinfer.quant.loaders.common import (
    FLOATS,
    check_finite,
    check_matrix,
    check_tensor,
    integer_format,
    integer_weight,
)

# packing: dtype of the packed tensor, bits of a code, codes an element. Codes of an element lie a
# block of rows apart, the first in the highest bits used.
_PACKINGS = {
    "8bit_u8": (torch.uint8, 8, 1),
    "4bit_u8": (torch.uint8, 4, 2),
    "3bit_32": (torch.int32, 3, 10),
    "2bit_u8": (torch.uint8, 2, 4),
    "1bit_u8": (torch.uint8, 1, 8),
}
_PACKING_OF_BITS = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}
_FIELDS = ("nbits", "group_size", "axis", "view_as_float", "quant_scale", "quant_zero")


def hqq_meta(
    tensors: Mapping[str, Tensor], name: str = "hqq"
) -> dict[str, float | tuple[int, ...]]:
    """The numbers that HQQ's state dict encodes as tensors: nbits, group_size, axis, shape, flags.

    ``compute_dtype`` and the like, which HQQ itself evaluates as Python, are left alone.
    """
    meta: dict[str, float | tuple[int, ...]] = {}
    for field in _FIELDS:
        if field in tensors:
            if tensors[field].numel() != 1 or tensors[field].is_complex():
                raise ValueError(f"{name}.{field} must have one real element")
            value = float(tensors[field].reshape(()))
            # 1.58 is stored as float32
            meta[field] = 1.58 if field == "nbits" and abs(value - 1.58) < 1e-6 else value
    if "shape" in tensors:
        shape = tensors["shape"]
        if shape.shape != (2,) or shape.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}.shape must be two integers")
        meta["shape"] = tuple(int(size) for size in shape)
    return meta


def hqq_weight(
    w_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    nbits: float,
    shape: tuple[int, int],
    group_size: int | None,
    name: str = "hqq",
) -> LowBitWeight:
    """An HQQ layer grouped along its inputs (axis 1): ``w = (code - zero) * scale``.

    With float16 or bfloat16 ``scale`` and ``zero``, ``.dequantize()`` has the bits of HQQ's own
    formula in float32, as long as its ``code - zero`` is exact there (any zero of at least 1/64).
    HQQ running in float16 rounds that difference to float16, which no affine map does, unless the
    zeros are codes (``round_zero``): then every dtype agrees. With float32 ``scale`` and ``zero``
    the product of the two, kept as an offset, rounds once more.

    Args:
        w_q: packed codes as HQQ packs its ``(N * K / group_size, group_size)`` matrix, along rows;
            or their bytes as floats (``view_as_float``).
        scale, zero: ``(N * K / group_size, 1)`` float16, bfloat16 or float32.
        nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        shape: ``(N, K)``.
        group_size: inputs per scale, dividing K; None for all.
        name: the layer, for errors.

    Raises:
        ValueError, TypeError: tensors that do not fit together, groups that straddle outputs,
            scales that are not finite.
    """
    codes = hqq_codes(w_q, nbits=nbits, shape=shape, group_size=group_size, name=name)
    n, k = shape
    group = k if group_size is None else group_size
    if k % group:
        raise ValueError(f"{name}: group_size must divide {k} inputs, got {group}")
    scale = _grouped(f"{name}.scale", scale, n, k // group)
    zero = _grouped(f"{name}.zero", zero, n, k // group)
    codes = codes.reshape(n, k)
    if nbits == 1 and (weight := _binary(codes, scale, zero, group)) is not None:
        return weight
    bits = math.ceil(nbits)
    rounded = zero.float().round()
    if torch.equal(rounded, zero.float()) and bool(((rounded >= 0) & (rounded < 1 << bits)).all()):
        return integer_weight(codes, scale, rounded.to(torch.uint8), bits=bits, group_size=group)
    scale, zero = scale.float(), zero.float()
    offset = -(scale * zero)
    check_finite(f"{name}: scale * zero", offset)
    return LowBitWeight(
        integer_format(bits, group, k),
        codes,
        scale,
        group,
        zero=torch.zeros(scale.shape, dtype=torch.uint8),
        offset=offset,
    )


def hqq_dense(
    w_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    nbits: float,
    shape: tuple[int, int],
    group_size: int | None,
    name: str = "hqq",
) -> Tensor:
    """An HQQ layer grouped along its outputs (axis 0), dequantized in float32 to ``(N, K)``.

    Scales then differ from input to input, which no kernel of codes takes.
    """
    n, k = shape
    group = n if group_size is None else group_size
    codes = hqq_codes(w_q, nbits=nbits, shape=shape, group_size=group, axis=0, name=name)
    columns = codes.shape[1]
    for label, part in (("scale", scale), ("zero", zero)):
        check_tensor(f"{name}.{label}", part, (1, columns), FLOATS)
        check_finite(f"{name}.{label}", part)
    return ((codes.float() - zero.float()) * scale.float()).reshape(n, k)


def hqq_codes(
    w_q: Tensor,
    *,
    nbits: float,
    shape: tuple[int, int],
    group_size: int | None,
    axis: int = 1,
    name: str = "hqq",
) -> Tensor:
    """HQQ's packed codes as the uint8 matrix it quantized: a group per row (axis 1) or column."""
    if nbits not in _PACKING_OF_BITS:
        raise ValueError(f"{name}: nbits must be one of {tuple(_PACKING_OF_BITS)}, got {nbits}")
    n, k = shape
    group = group_size if group_size is not None else (k if axis else n)
    if n < 1 or k < 1 or group < 1 or n * k % group:
        raise ValueError(f"{name}: group_size must divide {n} x {k} weights, got {group}")
    rows, columns = (n * k // group, group) if axis else (group, n * k // group)
    dtype, bits, per_element = _PACKINGS[_PACKING_OF_BITS[nbits]]
    if bits != 3 and rows % per_element:  # only 3 bits pad
        raise ValueError(f"{name}.W_q: {rows} rows do not fill elements of {per_element} codes")
    if w_q.is_floating_point() and w_q.dim() == 2:
        w_q = _as_integers(f"{name}.W_q", w_q, dtype)
    check_tensor(f"{name}.W_q", w_q, (-(-rows // per_element), columns), (dtype,))
    mask = (1 << bits) - 1
    codes = torch.cat(
        [((w_q >> bits * (per_element - 1 - i)) & mask).to(torch.uint8) for i in range(per_element)]
    )[:rows]
    highest = round(2**nbits - 1)
    if int(codes.max()) > highest:
        raise ValueError(f"{name}.W_q: codes must be at most {highest}, got {int(codes.max())}")
    return codes


def _as_integers(name: str, w_q: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo ``view_as_float``."""
    if w_q.shape[1] * w_q.element_size() % dtype.itemsize:
        raise ValueError(f"{name}: rows of {w_q.shape[1]} {w_q.dtype} are no {dtype}")
    return w_q.contiguous().view(dtype)


def _grouped(name: str, part: Tensor, n: int, group_count: int) -> Tensor:
    check_matrix(name, part, FLOATS)
    check_tensor(name, part, (n * group_count, 1), FLOATS)
    check_finite(name, part)
    return part.reshape(n, group_count).contiguous()


def _binary(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> LowBitWeight | None:
    """One bit as plus or minus half the scale around an offset, where that is bit-exact."""
    try:
        check_group_size("binary", group, codes.shape[1])
    except ValueError:
        return None
    scale, zero = scale.float(), zero.float()
    half, offset = scale / 2, scale * (0.5 - zero)
    layout = FORMATS["binary"]
    for code in (0, 1):
        if not torch.equal(
            half * (layout.step * code - layout.centre) + offset, (code - zero) * scale
        ):
            return None
    return LowBitWeight("binary", codes, half, group, offset=offset)
