"""GPTQ checkpoints (arXiv 2210.17323) as GPTQModel, AutoGPTQ and optimum write them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from effinfer.ops.lowbit_weight import LowBitWeight, groups
from effinfer.quant.loaders.common import (
    FLOATS,
    check_finite,
    check_tensor,
    integer_weight,
    unpack_words,
)

GPTQ_BITS = (2, 3, 4, 8)
ZeroFormat = Literal["gptq", "gptq_v2"]


def gptq_weight(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    checkpoint_format: ZeroFormat = "gptq",
    sym: bool = False,
    name: str = "gptq",
) -> LowBitWeight:
    """A GPTQ layer's tensors, exactly: ``w = scale * (code - zero)``.

    The references compute that in ``scales``' dtype, where the difference is exact and the product
    rounds once: ``.dequantize(scales.dtype)`` has their bits, ``.dequantize()`` the unrounded value
    (11 + 8 significant bits).

    Args:
        qweight: ``(K * bits / 32, N)`` int32, codes of a column as a little-endian bit stream.
        qzeros: ``(G, N * bits / 32)`` int32, the same along a row.
        scales: ``(G, N)`` float16, bfloat16 or float32.
        g_idx: ``(K,)`` integer, the group of each input (act-order, with or without static groups);
            None for ``k // group_size``.
        bits: 2, 3, 4 or 8.
        group_size: inputs per scale; -1 for all.
        checkpoint_format: "gptq" stores ``zero - 1`` modulo ``2 ** bits``, "gptq_v2" the zero.
        sym: the file says its quantization is symmetric; its zeros are then the middle code, and
            zeros that are so in the other format decide against ``checkpoint_format``.
        name: the layer, for errors.

    Raises:
        ValueError, TypeError: tensors that do not fit together, a group index out of range or with
            groups of uneven sizes, scales that are not finite.
    """
    if bits not in GPTQ_BITS:
        raise ValueError(f"{name}: bits must be one of {GPTQ_BITS}, got {bits}")
    codes = unpack_words(f"{name}.qweight", qweight, bits)
    k, n = codes.shape
    if group_size == -1:
        group_size = k
    if group_size < 1:
        raise ValueError(f"{name}: group_size must be -1 or at least 1, got {group_size}")
    group_count = groups(k, group_size)
    check_tensor(f"{name}.scales", scales, (group_count, n), FLOATS)
    check_finite(f"{name}.scales", scales)
    check_tensor(f"{name}.qzeros", qzeros, (group_count, n * bits // 32), (torch.int32,))
    stored = unpack_words(f"{name}.qzeros", qzeros.t(), bits)
    if stored.shape[0] != n:
        raise ValueError(f"{name}.qzeros must hold {n} zeros a group, got {stored.shape[0]}")
    order = None if g_idx is None else _act_order(f"{name}.g_idx", g_idx, k, group_size)
    return integer_weight(
        codes.t() if order is None else codes.index_select(0, order).t(),
        scales.t(),
        _zeros(stored, bits, checkpoint_format, sym, name),
        bits=bits,
        group_size=group_size,
        order=order,
    )


def _zeros(stored: Tensor, bits: int, checkpoint_format: str, sym: bool, name: str) -> Tensor:
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"{name}: checkpoint_format must be 'gptq' or 'gptq_v2', got {checkpoint_format!r}"
        )
    middle = 1 << (bits - 1)
    minus_one = checkpoint_format == "gptq"
    if sym and bool((stored == middle - 1).all()):
        minus_one = True
    elif sym and bool((stored == middle).all()):
        minus_one = False
    return (stored + 1) & ((1 << bits) - 1) if minus_one else stored


def _act_order(name: str, g_idx: Tensor, k: int, group_size: int) -> Tensor | None:
    """The inputs sorted by group, or None where they are so already."""
    check_tensor(name, g_idx, (k,), (torch.int32, torch.int64))
    g_idx = g_idx.long()
    count = groups(k, group_size)
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= count:
        raise ValueError(
            f"{name} must lie in 0..{count - 1}, got {int(g_idx.min())}..{int(g_idx.max())}"
        )
    plain = torch.arange(k) // group_size
    if torch.equal(g_idx, plain):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], plain):
        raise ValueError(f"{name} must give every group {group_size} inputs, the last one the rest")
    return order
