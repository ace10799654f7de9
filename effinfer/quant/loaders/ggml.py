"""ggml's quantized blocks (GGUF files) as low-bit weights; the ``gguf`` package is the reference.

Each decoder takes ``(blocks, bytes)`` uint8 and gives ``(codes, scale, offset)``: ``(blocks,
block size)`` uint8, then ``(blocks, groups of a block)`` each. Scales of the K types are a float16
times a 6- or 8-bit integer: exact in float32, where ``.dequantize()`` has the reference's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.quant.loaders.common import check_finite, check_tensor, ternary_weight

Decoded = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class GgmlType:
    """A quantized type of ggml.

    Attributes:
        id: its number in a GGUF file.
        name: its name in ggml.
        block: weights of a block.
        block_bytes: bytes of a block.
        group: weights per scale.
        format: the low-bit format of its codes; "ternary" falls back to int2 for codes of 3.
        zero: the integer subtracted from codes, or None for the format's centre.
        decode: blocks to codes, scales and offsets.
    """

    id: int
    name: str
    block: int
    block_bytes: int
    group: int
    format: str
    zero: int | None
    decode: Callable[[Tensor], Decoded]


def ggml_weight(data: Tensor, type: GgmlType, name: str = "ggml") -> LowBitWeight:
    """A matrix of ggml blocks, exactly.

    Args:
        data: ``(N, bytes of a row)`` uint8, whole blocks.
        type: one of ``GGML_TYPES``.
        name: the tensor, for errors.

    Raises:
        ValueError, TypeError: rows that are not whole blocks, scales that are not finite.
    """
    if data.dim() != 2 or not data.numel() or data.shape[1] % type.block_bytes:
        raise ValueError(
            f"{name} must be rows of whole {type.name} blocks ({type.block_bytes} bytes), "
            f"got shape {tuple(data.shape)}"
        )
    n, row_bytes = data.shape
    check_tensor(name, data, (n, row_bytes), (torch.uint8,))
    codes, scale, offset = type.decode(data.reshape(-1, type.block_bytes))
    codes, scale = codes.reshape(n, -1), scale.reshape(n, -1)
    check_finite(f"{name}: scales", scale)
    if offset is not None:
        offset = offset.reshape(n, -1)
        check_finite(f"{name}: offsets", offset)
    if type.format == "ternary":
        return ternary_weight(codes, scale, type.group)
    zero = None if type.zero is None else torch.full(scale.shape, type.zero, dtype=torch.uint8)
    return LowBitWeight(type.format, codes, scale, type.group, zero=zero, offset=offset)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, ``(blocks, 1)``."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _planes(packed: Tensor, bits: int, run: int) -> Tensor:
    """Fields of ``bits`` from bytes that hold ``run`` consecutive codes in their lowest bits, the
    next ``run`` in the bits above, and so on, before the next ``run`` bytes."""
    shifts = range(0, 8, bits)
    runs = packed.reshape(packed.shape[0], -1, run)
    fields = torch.stack([(runs >> shift) & ((1 << bits) - 1) for shift in shifts], dim=2)
    return fields.reshape(packed.shape[0], -1)


def _q8_0(blocks: Tensor) -> Decoded:
    return blocks[:, 2:] ^ 0x80, _half(blocks, 0), None  # two's complement to value + 128


def _q4_0(blocks: Tensor) -> Decoded:
    return _planes(blocks[:, 2:], 4, 16), _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> Decoded:
    return _planes(blocks[:, 4:], 4, 16), _half(blocks, 0), _half(blocks, 2)


def _q5(low: Tensor, high: Tensor) -> Tensor:
    """Five bits: the fifth of code ``i`` is bit ``i`` of a 32-bit word."""
    return _planes(low, 4, 16) | _planes(high, 1, 1) << 4


def _q5_0(blocks: Tensor) -> Decoded:
    return _q5(blocks[:, 6:], blocks[:, 2:6]), _half(blocks, 0), None


def _q5_1(blocks: Tensor) -> Decoded:
    return _q5(blocks[:, 8:], blocks[:, 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q2_k(blocks: Tensor) -> Decoded:
    scales, d, minimum = blocks[:, :16], _half(blocks, 80).float(), _half(blocks, 82).float()
    return _planes(blocks[:, 16:80], 2, 32), d * (scales & 15), -(minimum * (scales >> 4))


def _q3_k(blocks: Tensor) -> Decoded:
    low, high = _planes(blocks[:, 32:96], 2, 32), _planes(blocks[:, :32], 1, 32)
    scales = _planes(blocks[:, 96:104], 4, 8) | _planes(blocks[:, 104:108], 2, 4) << 4
    d = _half(blocks, 108).float() * (scales.short() - 32)
    return low | high << 2, d, None  # value is code - 4


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and minimums from 12 bytes: the first four have a byte's low six bits, the
    others four bits of the last bytes and the two bits left over."""
    scale, minimum, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        torch.cat([scale & 63, (rest & 15) | (scale >> 6) << 4], dim=1),
        torch.cat([minimum & 63, (rest >> 4) | (minimum >> 6) << 4], dim=1),
    )


def _q4_k(blocks: Tensor) -> Decoded:
    scale, minimum = _k_scales(blocks[:, 4:16])
    d, least = _half(blocks, 0).float() * scale, _half(blocks, 2).float() * minimum
    return _planes(blocks[:, 16:], 4, 32), d, -least


def _q5_k(blocks: Tensor) -> Decoded:
    scale, minimum = _k_scales(blocks[:, 4:16])
    d, least = _half(blocks, 0).float() * scale, _half(blocks, 2).float() * minimum
    codes = _planes(blocks[:, 48:], 4, 32) | _planes(blocks[:, 16:48], 1, 32) << 4
    return codes, d, -least


def _q6_k(blocks: Tensor) -> Decoded:
    codes = _planes(blocks[:, :128], 4, 64) | _planes(blocks[:, 128:192], 2, 32) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return codes, _half(blocks, 208).float() * scales, None


def _tq1_0(blocks: Tensor) -> Decoded:
    """Five trits a byte (the last four bytes: four), as a fraction of 256 in base 3."""
    parts = []
    for first, last, trits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        packed = blocks[:, first:last]
        shifted = [packed * 3**t for t in range(trits)]  # uint8: whole trits fall out on the left
        parts += [((s.short() * 3) >> 8).to(torch.uint8) for s in shifted]
    return torch.cat(parts, dim=1), _half(blocks, 52), None


def _tq2_0(blocks: Tensor) -> Decoded:
    return _planes(blocks[:, :64], 2, 32), _half(blocks, 64), None


GGML_TYPES = {
    type.id: type
    for type in (
        GgmlType(2, "Q4_0", 32, 18, 32, "int4", None, _q4_0),
        GgmlType(3, "Q4_1", 32, 20, 32, "int4", 0, _q4_1),
        GgmlType(6, "Q5_0", 32, 22, 32, "int8", 16, _q5_0),
        GgmlType(7, "Q5_1", 32, 24, 32, "int8", 0, _q5_1),
        GgmlType(8, "Q8_0", 32, 34, 32, "int8", None, _q8_0),
        GgmlType(10, "Q2_K", 256, 84, 16, "int2", 0, _q2_k),
        GgmlType(11, "Q3_K", 256, 110, 16, "int4", 4, _q3_k),
        GgmlType(12, "Q4_K", 256, 144, 32, "int4", 0, _q4_k),
        GgmlType(13, "Q5_K", 256, 176, 32, "int8", 0, _q5_k),
        GgmlType(14, "Q6_K", 256, 210, 16, "int8", 32, _q6_k),
        GgmlType(34, "TQ1_0", 256, 54, 256, "ternary", None, _tq1_0),
        GgmlType(35, "TQ2_0", 256, 66, 256, "ternary", None, _tq2_0),
    )
}
