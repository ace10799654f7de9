"""Softmax attention over keys and values in pages (PagedAttention, arXiv 2309.06180)."""

from __future__ import annotations

import math
from typing import cast

import torch

from effinfer._native import native
from effinfer.ops._register import Op, inference_only, public

_SCHEMA = (
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor seq_of_row,"
    " Tensor position, Tensor? plane, float scale, int window, float softcap"
)


def _reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_of_row: torch.Tensor,
    position: torch.Tensor,
    plane: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, q_heads, _ = q.shape
    if k_pages.dim() == 4:
        k_pages, v_pages = k_pages[None], v_pages[None]
    block_size, kv_heads = k_pages.shape[2:4]
    planes = [0] * rows if plane is None else plane.tolist()
    out = q.new_zeros(rows, q_heads, v_pages.shape[-1])
    for row, (line, last) in enumerate(zip(seq_of_row.tolist(), position.tolist(), strict=True)):
        if last < 0:
            continue
        seen = torch.arange(max(0, last + 1 - window) if window else 0, last + 1, device=q.device)
        block = block_table[line].long()[seen // block_size]
        key = k_pages[planes[row]][block, seen % block_size].to(wide)  # (keys, kv_heads, head_dim)
        value = v_pages[planes[row]][block, seen % block_size].to(wide)
        query = q[row].to(wide).reshape(kv_heads, q_heads // kv_heads, q.shape[-1])
        score = torch.einsum("hgd,thd->hgt", query, key) * scale
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        result = torch.einsum("hgt,thd->hgd", torch.softmax(score, -1), value)
        out[row] = result.flatten(0, 1).to(q.dtype)
    return out


def _reference_out(*args: object) -> None:
    cast(torch.Tensor, args[-1]).copy_(_reference(*args[:-1]))  # type: ignore[arg-type]


def _fake(q: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v_pages.shape[-1]))


def _fake_out() -> None:
    return None


def _run_out(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_of_row: torch.Tensor,
    position: torch.Tensor,
    plane: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    out: torch.Tensor,
) -> None:
    inference_only("paged_attention", q, k_pages, v_pages)
    native(q).paged_attention(
        q, k_pages, v_pages, block_table, seq_of_row, position, plane, scale, window, softcap, out
    )


def _run(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_of_row: torch.Tensor,
    position: torch.Tensor,
    plane: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    out = _fake(q, v_pages)
    _run_out(
        q, k_pages, v_pages, block_table, seq_of_row, position, plane, scale, window, softcap, out
    )
    return out


_OP = Op("paged_attention", _SCHEMA + ") -> Tensor", run=_run, fake=_fake, reference=_reference)
_OP_OUT = Op(
    "paged_attention_out",
    _SCHEMA + ", Tensor(a!) out) -> ()",
    run=_run_out,
    fake=_fake_out,
    reference=_reference_out,
)


@public(_OP)
def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_of_row: torch.Tensor,
    position: torch.Tensor,
    *,
    plane: torch.Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of rows of any sequences, at any positions, over their pages.

    Row r attends to positions ``0..position[r]`` of sequence ``seq_of_row[r]``; position t lies in
    slot ``t % block_size`` of block ``block_table[sequence, t // block_size]``. Query head h reads kv
    head ``h // (q_heads // kv_heads)``. Prompt chunks, single tokens and drafts share one call;
    adjacent rows of one sequence and plane read their keys once.

    Args:
        q: ``(rows, q_heads, head_dim)``, float32, bfloat16 or float16; the last dimension is
            contiguous, the others have any strides (a slice of a fused projection).
        k_pages: ``(blocks, block_size, kv_heads, head_dim)``, or with a leading dimension of planes
            (recursive models: one plane per loop); any float dtype. Positions are contiguous, if
            block_size is a multiple of 16, or else the last dimension; other strides are any. The
            former is how keys are read, and the latter costs a transposition at every read: make
            pages as ``(blocks, kv_heads, head_dim, block_size)`` and ``permute(0, 3, 1, 2)`` them.
        v_pages: the same with its own dtype, strides and head_dim; the last dimension contiguous.
            As ``(blocks, kv_heads, block_size, head_dim)`` transposed a head reads them in one piece.
        block_table: int32 ``(sequences, max_blocks)``. Entries that no row reads may hold anything.
        seq_of_row: int32 ``(rows,)``, which line of ``block_table`` a row reads.
        position: int32 ``(rows,)``, the row's own position; negative for padding, whose result is 0.
        plane: int32 ``(rows,)``, the plane a row reads, by default 0.
        scale: factor of the scores, by default ``head_dim ** -0.5``.
        window: if positive, a row attends to its last ``window`` positions only.
        softcap: if positive, scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        out: ``(rows, q_heads, v_head_dim)`` of q's dtype, written and returned.

    Returns:
        ``(rows, q_heads, v_head_dim)`` in q's dtype. Sums are float32 in an order that depends on the
        row's own keys alone: its bits are the same in any batch, chunking, page layout and number of
        threads, and nothing outside its own range can touch it, not even a NaN. Error bound: relative
        L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16) for scores up to 8 in
        size; in float32 it grows by 2.5e-7 for each further unit of the largest score.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; a sequence, plane, position
            or block out of range; a scale that is not finite. Nothing is written then.
        RuntimeError: an input requires grad.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"paged_attention: scale must be finite, got {scale}")
    args = (q, k_pages, v_pages, block_table, seq_of_row, position, plane, scale, window, softcap)
    if out is None:
        return cast(torch.Tensor, _OP(*args))
    _OP_OUT(*args, out)
    return out
