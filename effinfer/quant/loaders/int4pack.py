"""torch's packed 4-bit weights for CPUs (``_convert_weight_to_int4pack_for_cpu``)."""

from __future__ import annotations

import platform
from typing import Literal

import torch
from torch import Tensor

from effinfer.ops.lowbit_weight import LowBitWeight, groups
from effinfer.quant.loaders.common import FLOATS, check_finite, check_matrix, check_tensor

Layout = Literal["avx512", "avx2", "plain", "neon"]
# outputs of a block, and whether a byte pairs its first half with its second (else neighbours)
_BLOCKS = {"avx512": (64, True), "avx2": (32, True), "plain": (32, False), "neon": (16, False)}


def int4pack_layout() -> Layout:
    """The layout that torch packs in on this machine."""
    if platform.machine() == "aarch64":
        return "neon"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return "avx512"
    return "avx2" if capability == "AVX2" else "plain"


def int4pack_weight(
    packed: Tensor,
    scales_and_zeros: Tensor,
    *,
    group_size: int,
    layout: Layout | None = None,
    name: str = "int4pack",
) -> LowBitWeight:
    """A weight for ``_weight_int4pack_mm_for_cpu``: ``w = scale * (code - 8) + zero``.

    torch rounds that once, in float32. With float16 or bfloat16 scales the product is exact and
    ``.dequantize()`` has torch's bits; with float32 scales it rounds the product too, while
    ``.dequantize(torch.float64).float()`` has them.

    Args:
        packed: ``(N, K / 2)`` uint8; N a multiple of 16.
        scales_and_zeros: ``(G, N, 2)`` float16, bfloat16 or float32.
        group_size: inputs per scale.
        layout: the packing machine's: bytes are arranged by the instruction set torch ran on, and
            nothing in them tells; None for this machine's.
        name: the weight, for errors.

    Raises:
        ValueError, TypeError: tensors that do not fit together, scales that are not finite.
    """
    n, half = check_matrix(name, packed, (torch.uint8,))
    k = half * 2
    if n % 16:
        raise ValueError(f"{name} must have a multiple of 16 outputs, got {n}")
    if group_size < 1:
        raise ValueError(f"{name}: group_size must be at least 1, got {group_size}")
    check_tensor(
        f"{name}'s scales_and_zeros", scales_and_zeros, (groups(k, group_size), n, 2), FLOATS
    )
    check_finite(f"{name}'s scales_and_zeros", scales_and_zeros)
    if layout is None:
        layout = int4pack_layout()
    if layout not in _BLOCKS:
        raise ValueError(f"{name}: layout must be one of {', '.join(_BLOCKS)}, got {layout!r}")
    scale, zero = scales_and_zeros.permute(2, 1, 0).contiguous()
    return LowBitWeight("int4", _unpack(packed, layout), scale, group_size, offset=zero)


def _unpack(packed: Tensor, layout: Layout) -> Tensor:
    """Blocks of outputs are ``[k, outputs / 2]`` bytes; what a byte's halves are is the layout's."""
    n, k = packed.shape[0], packed.shape[1] * 2
    block, halves = _BLOCKS[layout]
    whole = n // block * block
    parts = [_unpack_blocks(packed[:whole].reshape(-1, k, block // 2), halves)]
    if whole < n:  # the last block is short, and packed in pairs everywhere
        parts.append(_unpack_blocks(packed[whole:].reshape(1, k, (n - whole) // 2), halves=False))
    return torch.cat(parts)


def _unpack_blocks(block: Tensor, halves: bool) -> Tensor:
    """``(blocks, K, outputs / 2)`` bytes to ``(outputs, K)`` codes."""
    count, k, pairs = block.shape
    # byte j has outputs j and j + outputs / 2, or outputs 2j and 2j + 1
    codes = torch.stack([block & 15, block >> 4], dim=2 if halves else 3)
    return codes.reshape(count, k, 2 * pairs).transpose(1, 2).reshape(count * 2 * pairs, k)
