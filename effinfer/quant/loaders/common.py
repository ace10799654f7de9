"""What every checkpoint loader needs: checks that name the tensor, bit streams, format choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effinfer.ops.lowbit_weight import FORMATS, LowBitWeight, check_group_size

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORD = 32  # bits


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise TypeError or ValueError, naming the tensor, where it is not what the format says."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int]:
    """The shape of a matrix with elements in it."""
    if tensor.dim() != 2 or not tensor.numel():
        raise ValueError(f"{name} must be a matrix with elements, got shape {tuple(tensor.shape)}")
    rows, columns = tensor.shape
    check_tensor(name, tensor, (rows, columns), dtypes)
    return rows, columns


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError for NaN or infinity: no quantizer writes them, a damaged file does."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def unpack_words(name: str, words: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` each from int32 words that hold a little-endian bit stream down the rows.

    Args:
        name: the tensor's, for errors.
        words: ``(R, C)`` int32; ``R`` whole periods, after which a code starts a word again (3
            bits: 32 codes in 3 words, of which two straddle words).
        bits: 1 to 8.

    Returns:
        ``(R * 32 / bits, C)`` uint8.
    """
    check_matrix(name, words, (torch.int32,))
    if not 1 <= bits <= 8:
        raise ValueError(f"{name}: bits must be 1 to 8, got {bits}")
    period = math.lcm(bits, WORD)
    in_words, in_codes = period // WORD, period // bits
    if words.shape[0] % in_words:
        raise ValueError(
            f"{name}: {bits}-bit codes must fill a multiple of {in_words} rows, got {words.shape[0]}"
        )
    stream = words.reshape(-1, in_words, words.shape[1])
    codes = torch.empty(stream.shape[0], in_codes, words.shape[1], dtype=torch.uint8)
    for i in range(in_codes):
        word, shift = divmod(i * bits, WORD)
        field = stream[:, word] >> shift  # arithmetic, but the mask drops what the sign filled in
        if shift + bits > WORD:
            kept = WORD - shift
            field = (field & ((1 << kept) - 1)) | (stream[:, word + 1] << kept)
        codes[:, i] = (field & ((1 << bits) - 1)).to(torch.uint8)
    return codes.flatten(0, 1)


def integer_format(bits: int, group_size: int, k: int) -> str:
    """The narrowest integer format for codes of ``bits`` that takes this group size."""
    for name in ("int2", "int3", "int4", "int8"):
        if FORMATS[name].bits >= bits:
            try:
                check_group_size(name, group_size, k)
            except ValueError:
                continue
            return name
    raise ValueError(
        f"a group must be a multiple of 16 columns, or all {k} of them, got {group_size}"
    )


def integer_weight(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    bits: int,
    group_size: int,
    order: Tensor | None = None,
) -> LowBitWeight:
    """``scale * (code - zero)`` with integer zeros ``(N, G)`` uint8, which the format's own centre
    replaces where they all equal it."""
    format = integer_format(bits, group_size, codes.shape[1])
    is_centre = bool((zero == FORMATS[format].centre).all())
    return LowBitWeight(
        format,
        codes.contiguous(),
        scale.contiguous(),
        group_size,
        zero=None if is_centre else zero.contiguous(),
        order=order,
    )


def ternary_weight(codes: Tensor, scale: Tensor, group_size: int) -> LowBitWeight:
    """``scale * (code - 1)`` for 2-bit codes, which no encoder lets be 3, but files can hold it."""
    if bool((codes <= 2).all()):
        return LowBitWeight("ternary", codes, scale, group_size)
    zero = torch.ones(scale.shape, dtype=torch.uint8)
    return LowBitWeight("int2", codes, scale, group_size, zero=zero)
