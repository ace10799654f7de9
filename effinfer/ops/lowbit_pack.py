"""Codes into the kernels' panels and back: the layouts of ``csrc/ops/lowbit_linear/lowbit_linear.h``,
whole matrices at a time.

Most formats keep four consecutive ``k`` of an output in four bytes, so codes are moved and combined
as 32-bit words of four.
"""

from __future__ import annotations

import mmap

import torch

from effinfer.ops.lowbit_weight import FORMATS, PANEL

_HUGE = 2 << 20
_HAS_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")
_DENSE_CENTRE = 13  # 9 + 3 + 1: the largest magnitude of three ternary digits


def pack_codes(format: str, codes: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out`` (panels, units, unit_bytes) from ``codes`` (N, K) uint8; bytes past N and K
    become zero."""
    if not out.numel():
        return
    layout = FORMATS[format]
    panels, units, _ = out.shape
    n, k = codes.shape
    if (n, k) != (panels * PANEL, units * layout.unit):
        blank = layout.centre if format in ("int8", "ternary_dense") else 0  # whose bytes are zero
        grid = codes.new_full((panels * PANEL, units * layout.unit), blank)
        grid[:n, :k] = codes
        codes = grid
    codes = codes.contiguous()
    if format == "binary":
        out.copy_(_panels(_binary_bytes(codes), units, 4).transpose(2, 3).flatten(2))
    elif format == "ternary_dense":
        nibbles, signs = _dense_parts(codes)
        out[..., :128].copy_(_panels(nibbles, units, 8).transpose(2, 3).flatten(2))
        out[..., 128:].copy_(_panels(signs, units, 2).flatten(2))
    else:
        words = codes.view(torch.int32)
        if format == "int3":
            low, high = words & 0x03030303, (words >> 2) & 0x01010101
            wide = out.view(torch.int32)
            wide[..., :32].copy_(_word_panels(_or_planes(low, 4, 2), units, 2))
            wide[..., 32:].copy_(_word_panels(_or_planes(high, 8, 1), units, 1))
        else:
            planes = {"int8": 1, "int4": 2}.get(format, 4)
            combined = _or_planes(words, planes, 8 // planes)
            if format == "int8":
                combined = combined ^ _as_int32(0x80808080)
            out.view(torch.int32).copy_(_word_panels(combined, units, 1))


def unpack_codes(format: str, packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The codes (N, K) that :func:`pack_codes` was given."""
    if not packed.numel():
        return packed.new_empty(n, k)
    units = packed.shape[1]
    packed = packed.contiguous()
    if format == "binary":
        grid = packed.view(*packed.shape[:2], 4, PANEL).transpose(2, 3)
        codes = torch.stack([(grid >> b) & 1 for b in range(8)], -1)
    elif format == "ternary_dense":
        codes = _dense_codes(packed)
    else:
        words = packed.view(torch.int32)
        if format == "int3":
            low = words[..., :32].reshape(*words.shape[:2], 2, PANEL).transpose(2, 3)
            high = words[..., 32:]
            parts = [
                ((low[..., p // 4] >> (p % 4 * 2)) & 0x03030303) | (((high >> p) & 0x01010101) << 2)
                for p in range(8)
            ]
        elif format == "int8":
            parts = [words ^ _as_int32(0x80808080)]
        else:
            planes = 2 if format == "int4" else 4
            mask = 0x0F0F0F0F if planes == 2 else 0x03030303
            parts = [(words >> (8 // planes * p)) & mask for p in range(planes)]
        codes = torch.stack(parts, -1).view(torch.uint8)
    rows = codes.reshape(packed.shape[0], units, PANEL, -1).transpose(1, 2)
    return rows.reshape(packed.shape[0] * PANEL, units * FORMATS[format].unit)[:n, :k].contiguous()


def pack_groups(values: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out`` (panels, G, 16) from ``values`` (N, G); zeros past N."""
    n, groups = values.shape
    if n != out.shape[0] * PANEL:
        grid = values.new_zeros(out.shape[0] * PANEL, groups)
        grid[:n] = values
        values = grid
    out.copy_(values.view(out.shape[0], PANEL, groups).transpose(1, 2))


def unpack_groups(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The values (N, G) that :func:`pack_groups` was given."""
    return packed.transpose(1, 2).flatten(0, 1)[:n].contiguous()


def new_packed(like: torch.Tensor, panels: int, units: int, unit_bytes: int) -> torch.Tensor:
    """An empty uint8 tensor for panels on ``like``'s device, on huge pages where it is large."""
    shape = (panels, units, unit_bytes)
    size = panels * units * unit_bytes
    if not _HAS_HUGE_PAGES or not like.is_cpu or type(like) is not torch.Tensor or size < _HUGE:
        return like.new_empty(shape, dtype=torch.uint8)
    # Its own mapping: of 8 MB that a heap hands out, a quarter lies in pages at the ends, which are
    # small, and all of it where the heap used it before.
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    skipped = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=skipped).view(shape)


def _as_int32(bits: int) -> int:
    return bits - (1 << 32)


def _panels(values: torch.Tensor, units: int, each: int) -> torch.Tensor:
    """(N, units * each) as (panels, units, 16, each)."""
    return values.view(values.shape[0] // PANEL, PANEL, units, each).transpose(1, 2)


def _word_panels(words: torch.Tensor, units: int, each: int) -> torch.Tensor:
    """Words (N, units * each) as (panels, units, each * 16)."""
    return _panels(words, units, each).transpose(2, 3).flatten(2)


def _or_planes(words: torch.Tensor, planes: int, bits: int) -> torch.Tensor:
    """Words (N, units * planes) of small codes into (N, units): plane p in bits ``bits * p`` on."""
    parts = words.view(words.shape[0], words.shape[1] // planes, planes)
    combined = parts[..., 0].clone()
    for p in range(1, planes):
        combined |= parts[..., p] << (bits * p)
    return combined


def _binary_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes of one bit to a byte, the first in the lowest bit."""
    eights = codes.reshape(codes.shape[0], -1, 8)
    combined = eights[..., 0].clone()
    for b in range(1, 8):
        combined |= eights[..., b] << b
    return combined


def _dense_parts(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of triples of ternary codes: magnitudes, two to a byte, and signs, sixteen to two bytes."""
    triples = codes.view(codes.shape[0], -1, 3)
    number = 9 * triples[..., 0] + 3 * triples[..., 1] + triples[..., 2]  # base 3, at most 26
    negative = number < _DENSE_CENTRE
    magnitude = torch.where(negative, _DENSE_CENTRE - number, number - _DENSE_CENTRE)
    nibbles = magnitude[:, 0::2] | (magnitude[:, 1::2] << 4)
    return nibbles, _binary_bytes(negative.view(torch.uint8))


def _dense_codes(packed: torch.Tensor) -> torch.Tensor:
    """(panels, units, 16, 48) of ternary codes."""
    grid = packed[..., :128].reshape(*packed.shape[:2], 8, PANEL).transpose(2, 3)
    magnitude = torch.stack([grid & 15, grid >> 4], -1).flatten(3)
    words = packed[..., 128:].reshape(*packed.shape[:2], PANEL, 2)
    negative = torch.stack([(words >> b) & 1 for b in range(8)], -1).flatten(3).bool()
    number = torch.where(negative, _DENSE_CENTRE - magnitude, _DENSE_CENTRE + magnitude)
    return torch.stack([number // 9, number // 3 % 3, number % 3], -1).flatten(3)
