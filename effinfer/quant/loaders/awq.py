"""AWQ checkpoints (arXiv 2306.00978) in AutoAWQ's "gemm" layout."""

from __future__ import annotations

import torch
from torch import Tensor

from effinfer.ops.lowbit_weight import LowBitWeight, groups
from effinfer.quant.loaders.common import (
    FLOATS,
    check_finite,
    check_matrix,
    check_tensor,
    integer_weight,
    unpack_words,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word holds, lowest first


def awq_weight(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int, name: str = "awq"
) -> LowBitWeight:
    """An AWQ layer's tensors, exactly: ``w = scale * (code - zero)``, 4 bits.

    AutoAWQ computes that in ``scales``' dtype, where only the product rounds:
    ``.dequantize(scales.dtype)`` has its bits.

    Args:
        qweight: ``(K, N / 8)`` int32: eight outputs a word, in ``ORDER``.
        qzeros: ``(G, N / 8)`` int32, packed alike; zeros as they are, not minus 1.
        scales: ``(G, N)`` float16, bfloat16 or float32.
        group_size: inputs per scale; -1 for all.
        name: the layer, for errors.

    Raises:
        ValueError, TypeError: tensors that do not fit together, scales that are not finite.
    """
    k, words = check_matrix(f"{name}.qweight", qweight, (torch.int32,))
    if group_size == -1:
        group_size = k
    if group_size < 1:
        raise ValueError(f"{name}: group_size must be -1 or at least 1, got {group_size}")
    group_count = groups(k, group_size)
    check_tensor(f"{name}.qzeros", qzeros, (group_count, words), (torch.int32,))
    check_tensor(f"{name}.scales", scales, (group_count, words * 8), FLOATS)
    check_finite(f"{name}.scales", scales)
    return integer_weight(
        _outputs(f"{name}.qweight", qweight),
        scales.t(),
        _outputs(f"{name}.qzeros", qzeros),
        bits=4,
        group_size=group_size,
    )


def _outputs(name: str, words: Tensor) -> Tensor:
    """``(rows, N / 8)`` words to ``(N, rows)`` codes."""
    nibbles = unpack_words(name, words.t(), 4).reshape(-1, 8, words.shape[0])
    codes = torch.empty_like(nibbles)
    codes[:, ORDER] = nibbles
    return codes.flatten(0, 1)
